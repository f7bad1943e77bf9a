// The attention module of EfficientViT for small images on the CPU: a 1x1 convolution to q, k and v,
// multi-scale linear attention, a 1x1 convolution back. A thread makes the q, k and v of a head and attends
// to them while they are in its cache; they never go to memory. All in float, whatever the images are stored
// as.
#pragma once

#include "../multi_scale/plan.h"

namespace effattn::cpu {

struct LiteMLAParams {
  MultiScaleParams attention;  // its images are ignored
  int64_t in_channels, out_channels;
  const float *qkv_weight, *qkv_bias;    // (3 * heads * head_dim, in_channels); bias or null
  const float *proj_weight, *proj_bias;  // (out_channels, all heads * head_dim)
  Image x, out;
};

EFFATTN_EXPORT void lite_mla(const LiteMLAParams& params, const Parallel& parallel);

}  // namespace effattn::cpu
