// Weights of operators: float32 whatever the images are, contiguous while a call runs.
#pragma once

#include <string>
#include <vector>

#include "../../kernels/cpu/project_tokens.h"
#include "../tensor.h"

namespace effattn {

using Tensors = std::vector<Tensor>;

constexpr int64_t kMostChannels = 1 << 16;  // of a head, where the caller says them beside the weights

// A contiguous tensor of float32 on the CPU, kept alive by `alive`.
inline const float* floats(const char* op, const std::string& argument, const Tensor& t,
                           const std::vector<int64_t>& shape, Tensors& alive) {
  EFFATTN_REQUIRE(t.is_cpu() && t.scalar_type() == ScalarType::Float, op, ": ", argument,
                  " must be float32 on the CPU");
  require_shape(op, argument.c_str(), t, shape);
  // Asked first: through the dispatcher the answer costs as much as a small call's check of everything else.
  alive.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return static_cast<const float*>(alive.back().const_data_ptr());
}

// A 1x1 convolution, packed; `bias` may be null.
inline cpu::ProjectionWeights packed_projection(const char* op, const std::string& argument, const Tensor& t,
                                                const Tensor* bias, int64_t inputs, int64_t outputs,
                                                Tensors& alive) {
  constexpr int64_t width = cpu::kPackedOutputs;
  const float* const data = floats(op, argument, t, {cpu::ceil_div(outputs, width), inputs, width}, alive);
  return {inputs, outputs, data,
          bias == nullptr ? nullptr : floats(op, argument + "_bias", *bias, {outputs}, alive), true};
}

// A new tensor of float32 with the shape of `like`: a gradient of weights.
inline Tensor new_floats(const Tensor& like, float*& into) {
  const auto sizes = like.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  Tensor t = empty_strided(shape, contiguous_strides(shape), ScalarType::Float);
  into = static_cast<float*>(t.mutable_data_ptr());
  return t;
}

}  // namespace effattn
