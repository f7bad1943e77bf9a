// The square of a ReLU on a GPU: entry points, as those of the CPU.
#pragma once

#include "../../params/squared_relu.h"
#include "../core/execution.h"

namespace effattn::cuda {

void squared_relu(const SquaredReluParams& params, const Execution& execution);
void squared_relu_backward(const SquaredReluParams& params, const Execution& execution);

}  // namespace effattn::cuda
