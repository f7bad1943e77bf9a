// Multi-scale aggregation and multi-scale linear attention on the CPU: the plan and the entry points.
//
// Everything is computed on rows of the image in float, channel by channel, whatever the memory order; the
// depthwise result and the scale never leave a thread's cache.
#pragma once

#include <cstdint>

#include "../../params/multi_scale.h"
#include "../core/image.h"
#include "../core/isa.h"
#include "../core/parallel.h"

namespace effattn::cpu {

struct MultiScalePlan {
  int64_t rows;            // of the image, taken at once; a function of the sizes only
  int64_t scratch_floats;  // what a thread works in: forward and backward, with the attention
  int64_t scratch_floats_backward;
  int64_t flops_aggregation;  // forward, without the attention
};

// For the instruction set in use.
EFFATTN_EXPORT MultiScalePlan plan(const MultiScaleParams& problem);

// out: (batch, (1 + scales) * 3 * heads * head_dim, tokens), qkv and the scales.
void aggregate(const MultiScaleParams& problem, const Parallel& parallel);
void aggregate_backward(const MultiScaleParams& problem, const Parallel& parallel);

// out: (batch, (1 + scales) * heads * head_dim, tokens). `sums`: what relu_linear_attention keeps, for
// batch x (1 + scales) * heads groups, or null.
void attend(const MultiScaleParams& problem, float* sums, const Parallel& parallel);
void attend_backward(const MultiScaleParams& problem, const float* sums, const Parallel& parallel);

// --- what each instruction set provides -------------------------------------------------------------

// Some channels of an image in float: a row a channel, tokens contiguous.
template <class Float>
struct Plane {
  Float* data;
  int64_t stride;
};

// All work in one thread, in `scratch`; from depthwise on, on the `head_dim` channels of one group.
struct MultiScalePasses {
  int64_t (*scratch_floats)(const MultiScaleParams&, int64_t rows);
  // `channels` of an image from `token` on, to and from float.
  void (*load)(DType, const Image&, int64_t token, int64_t tokens, int64_t channels, const Plane<float>& to);
  void (*store)(DType, const Image&, int64_t token, int64_t tokens, int64_t channels,
                const Plane<float>& from);
  // mixed: `rows` rows from row `first` on of the convolution of `in`, which begins at the image's first
  // token. scale: the weights of the group.
  void (*depthwise)(const MultiScaleParams&, int64_t kernel, const ScaleWeights<const float>& scale,
                    int64_t first, int64_t rows, const Plane<const float>& in, const Plane<float>& mixed,
                    float* scratch);
  // out = pointwise * mixed + bias
  void (*pointwise)(const MultiScaleParams&, const ScaleWeights<const float>& scale, int64_t tokens,
                    const Plane<const float>& mixed, const Plane<float>& out, float* scratch);
  // grad_mixed = pointwise^T * grad_out; adds to the gradients of pointwise and its bias.
  void (*pointwise_backward)(const MultiScaleParams&, const ScaleWeights<const float>& scale,
                             const ScaleWeights<float>& gradients, int64_t tokens,
                             const Plane<const float>& mixed, const Plane<const float>& grad_out,
                             const Plane<float>& grad_mixed, float* scratch);
  // For whole planes: adds to grad_in and to the gradients of depthwise and its bias.
  void (*depthwise_backward)(const MultiScaleParams&, int64_t kernel, int64_t rows,
                             const ScaleWeights<const float>& scale, const ScaleWeights<float>& gradients,
                             const Plane<const float>& in, const Plane<const float>& grad_mixed,
                             const Plane<float>& grad_in, float* scratch);
};

const MultiScalePasses& multi_scale_passes(Isa isa);

#define EFFATTN_ROW(name, lanes)                \
  namespace name {                              \
  const MultiScalePasses& multi_scale_passes(); \
  }
EFFATTN_ISA_LIST(EFFATTN_ROW)
#undef EFFATTN_ROW

}  // namespace effattn::cpu
