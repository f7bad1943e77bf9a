// Multi-scale aggregation and multi-scale linear attention.
//
// qkv has 3 * heads groups of head_dim channels: q, k and v of one head after the other. The branch of a
// scale is a depthwise k x k convolution, then a 1x1 convolution in groups of head_dim channels:
//
//   mixed_c = depthwise_c * qkv_c    out_o = sum_c pointwise_oc mixed_c
//
// Before the branches' heads come those of qkv itself.
#pragma once

#include <cstdint>

#include "image.h"

namespace effattn {

// Of one branch. Contiguous floats; biases may be null.
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
