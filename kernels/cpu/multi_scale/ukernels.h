// The micro-kernels of multi-scale aggregation.
#pragma once

#include "../../params/multi_scale.h"
#include "../core/arena.h"
#include "../core/isa.h"
#include "../core/rows.h"

namespace effattn::cpu {

// Some channels of an image in float: a row a channel, tokens contiguous.
template <class Float>
using Plane = Rows<Float>;

// On the `head_dim` channels of one group. `branch`: the weights of the group.
struct MultiScaleUkernels {
  int64_t (*scratch_floats)(const MultiScaleParams&, int64_t rows);
  // mixed: `rows` rows from row `first` on of the convolution of `in`, which begins at the image's first
  // token.
  void (*depthwise)(const MultiScaleParams&, int64_t kernel, const ScaleWeights<const float>& branch,
                    int64_t first, int64_t rows, const Plane<const float>& in, const Plane<float>& mixed,
                    Arena);
  // out = pointwise * mixed + bias
  void (*pointwise)(const MultiScaleParams&, const ScaleWeights<const float>& branch, int64_t tokens,
                    const Plane<const float>& mixed, const Plane<float>& out, Arena);
  // grad_mixed = pointwise^T * grad_out; adds to the gradients of pointwise and its bias.
  void (*pointwise_backward)(const MultiScaleParams&, const ScaleWeights<const float>& branch,
                             const ScaleWeights<float>& gradients, int64_t tokens,
                             const Plane<const float>& mixed, const Plane<const float>& grad_out,
                             const Plane<float>& grad_mixed);
  // For whole planes: adds to grad_in and to the gradients of depthwise and its bias.
  void (*depthwise_backward)(const MultiScaleParams&, int64_t kernel, int64_t rows,
                             const ScaleWeights<const float>& branch, const ScaleWeights<float>& gradients,
                             const Plane<const float>& in, const Plane<const float>& grad_mixed,
                             const Plane<float>& grad_in, Arena);
};

EFFATTN_DISPATCH_TABLE(MultiScaleUkernels, multi_scale_ukernels)

}  // namespace effattn::cpu
