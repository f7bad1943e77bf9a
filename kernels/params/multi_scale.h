// Multi-scale aggregation and multi-scale linear attention, whatever computes them: the problem.
//
// qkv has 3 * heads groups of head_dim channels: q, k and v of one head after the other. A scale convolves
// every channel with a k x k kernel of its own, then mixes the channels of each group:
//
//   mixed_c = depthwise_c * qkv_c    scale_o = sum_c pointwise_oc mixed_c
//
// The heads of qkv itself are scale 0.
#pragma once

#include <cstdint>

#include "image.h"

namespace effattn {

// One scale. Contiguous floats; biases may be null.
template <class Float>
struct ScaleWeights {
  Float* depthwise;       // (3 * heads * head_dim, kernel, kernel)
  Float* pointwise;       // (3 * heads * head_dim, head_dim), a row an output
  Float* depthwise_bias;  // (3 * heads * head_dim)
  Float* pointwise_bias;
};

struct MultiScaleParams {
  static constexpr int kMaxScales = 8;

  DType dtype;
  int64_t batch, heads, head_dim, height, width;
  int scales;  // beside qkv itself
  int64_t kernels[kMaxScales];
  ScaleWeights<const float> weights[kMaxScales];
  Image qkv;
  Image out;                                  // forward
  Image grad_out, grad_qkv;                   // backward; grad_out is read only
  ScaleWeights<float> gradients[kMaxScales];  // backward
  float eps;                                  // of the attention

  int64_t tokens() const { return height * width; }
  int64_t all_heads() const { return (1 + scales) * heads; }
};

}  // namespace effattn
