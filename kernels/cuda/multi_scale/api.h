// Multi-scale aggregation and attention on a GPU: entry points, as those of the CPU.
#pragma once

#include "../../params/multi_scale.h"
#include "../core/execution.h"

namespace effattn::cuda {

void aggregate(const MultiScaleParams& params, const Execution& execution);
void aggregate_backward(const MultiScaleParams& params, const Execution& execution);
// `kv_state`: what linear attention keeps, for batch x (1 + scales) * heads groups, or null.
void attend(const MultiScaleParams& params, float* kv_state, const Execution& execution);
void attend_backward(const MultiScaleParams& params, const float* kv_state, const Execution& execution);

}  // namespace effattn::cuda
