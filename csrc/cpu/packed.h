// Weights that modules have packed for inference.
#pragma once

#include <string>
#include <vector>

#include "../../kernels/cpu/channels_last/projection.h"
#include "../weights.h"

namespace effattn {

// A 1x1 convolution, packed; `bias` may be null.
inline cpu::ProjectionWeights packed_projection(const char* op, const std::string& argument, const Tensor& t,
                                                const Tensor* bias, int64_t inputs, int64_t outputs,
                                                Tensors& alive) {
  constexpr int64_t width = cpu::kPackedOutputs;
  const float* const data = floats(op, argument, t, {ceil_div(outputs, width), inputs, width}, alive);
  return {inputs, outputs, data,
          bias == nullptr ? nullptr : floats(op, argument + "_bias", *bias, {outputs}, alive), true};
}

}  // namespace effattn
