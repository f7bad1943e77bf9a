// Multi-scale aggregation and multi-scale linear attention on the CPU: the plan and the entry points.
//
// Everything is computed on rows of the image in float, channel by channel, whatever the memory order; what a
// branch makes never leaves a thread's cache.
#pragma once

#include <cstdint>

#include "../../params/multi_scale.h"
#include "../core/isa.h"
#include "../core/parallel.h"

namespace effattn::cpu {

struct MultiScalePlan {
  int64_t rows;            // of the image, taken at once; a function of the sizes only
  int64_t scratch_floats;  // what a thread works in: forward and backward, with the attention
  int64_t scratch_floats_backward;
};

// For the instruction set in use.
EFFATTN_EXPORT MultiScalePlan plan(const MultiScaleParams& params);

// out: (batch, (1 + scales) * 3 * heads * head_dim, tokens), qkv and what the branches make of it.
EFFATTN_EXPORT void aggregate(const MultiScaleParams& params, const Parallel& parallel);
EFFATTN_EXPORT void aggregate_backward(const MultiScaleParams& params, const Parallel& parallel);

// out: (batch, (1 + scales) * heads * head_dim, tokens). `kv_state`: what linear attention keeps, for
// batch x (1 + scales) * heads groups, or null.
EFFATTN_EXPORT void attend(const MultiScaleParams& params, float* kv_state, const Parallel& parallel);
EFFATTN_EXPORT void attend_backward(const MultiScaleParams& params, const float* kv_state,
                                    const Parallel& parallel);

}  // namespace effattn::cpu
