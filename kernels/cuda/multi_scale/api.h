// Multi-scale aggregation and attention on a card: entry points, as those of the CPU.
#pragma once

#include "../../params/multi_scale.h"
#include "../core/execution.h"

namespace effattn::cuda {

void aggregate(const MultiScaleParams& problem, const Execution& execution);
void aggregate_backward(const MultiScaleParams& problem, const Execution& execution);
// `sums`: what relu_linear_attention keeps, for batch x (1 + scales) * heads groups, or null.
void attend(const MultiScaleParams& problem, float* sums, const Execution& execution);
void attend_backward(const MultiScaleParams& problem, const float* sums, const Execution& execution);

}  // namespace effattn::cuda
