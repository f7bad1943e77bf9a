// Cascaded group attention, that of EfficientViT (Microsoft).
//
// The channels of x are cut into as many groups as there are heads. Head i takes
//
//   feat_i = x_i + out_(i-1)    [q | k | v] = 1x1(feat_i)    q' = depthwise(q)
//   out_i = softmax(softmax_scale q' k^T + bias_i) v
//
// in each window of the image, padded with zeros at the border.
#pragma once

#include <cstdint>

#include "image.h"

namespace effattn {

// Of one head; contiguous floats, biases may be null.
template <class Float>
struct HeadWeights {
  Float* qkv;             // (2 key_dim + value_dim, value_dim)
  Float* qkv_bias;        // (2 key_dim + value_dim)
  Float* depthwise;       // (key_dim, kernel, kernel)
  Float* depthwise_bias;  // (key_dim)
};

// Of all heads, as micro-kernels read them: a row an input or a tap, and each of q, k and v padded to whole
// vectors.
struct PackedHeads {
  const float *qkv, *qkv_bias;   // (heads, value_dim, q | k | v), (heads, q | k | v)
  const float *taps, *tap_bias;  // (taps of all heads, q), (heads, q)
};

struct CascadeParams {
  DType dtype;
  int64_t batch, heads, key_dim, value_dim, height, width, window_height, window_width;
  float softmax_scale;
  const int64_t* kernels;                   // a head each, odd
  const HeadWeights<const float>* weights;  // a head each; null if they are packed, forward only
  PackedHeads packed;
  const float* bias;  // (heads, window tokens, window tokens)
  Image x;
  Image out;               // forward
  Image grad_out, grad_x;  // backward; grad_out is read only
  const HeadWeights<float>* gradients;
  float* grad_bias;

  int64_t channels() const { return heads * value_dim; }
  int64_t window_tokens() const { return window_height * window_width; }
  int64_t windows_down() const { return ceil_div(height, window_height); }
  int64_t windows_across() const { return ceil_div(width, window_width); }
  int64_t windows() const { return windows_down() * windows_across(); }
};

}  // namespace effattn
