// Weights that modules have packed for inference.
#pragma once

#include <string>
#include <vector>

#include "../../kernels/cpu/channels_last/projection.h"
#include "../weights.h"

namespace effattn {

// A contiguous tensor of float32 whose shape no signature can say, kept alive by `alive`.
inline const float* floats(const char* op, const std::string& argument, const Tensor& t,
                           const std::vector<int64_t>& shape, Tensors& alive) {
  EFFATTN_REQUIRE(is_here(t) && t.scalar_type() == ScalarType::Float, op, ": ", argument,
                  ": expected float32 on ", kHere);
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  for (size_t i = 0; i < shape.size(); ++i) {
    fits = fits && t.size(i) == shape[i];
    expected += (i ? ", " : "") + std::to_string(shape[i]);
  }
  EFFATTN_REQUIRE(fits, op, ": ", argument, ": expected shape (", expected, "), got ", shape_text(t));
  return floats(t, alive);
}

// An image (B, C, H, W).
inline void require_image(const char* op, const Tensor& x) {
  const auto type = x.scalar_type();
  EFFATTN_REQUIRE(is_here(x), op, ": x: expected a tensor on ", kHere);
  EFFATTN_REQUIRE(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                  ": x: expected float32, bfloat16 or float16");
  EFFATTN_REQUIRE(x.dim() == 4, op, ": x: expected 4 dimensions (B, C, H, W), got shape ", shape_text(x));
}

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
