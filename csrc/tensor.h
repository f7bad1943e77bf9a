// What the glue of every operator needs from tensors: checks that name the argument, and allocation in a
// given memory order.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/params/dtype.h"
#include "backend.h"

namespace effattn {

using torch::headeronly::ScalarType;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

// Unless `condition` holds, fails with the rest streamed together; torch turns it into a RuntimeError.
// A macro, so that the text is only made when it is needed.
#define EFFATTN_REQUIRE(condition, ...) \
  do {                                  \
    if (!(condition)) [[unlikely]]      \
      ::effattn::fail(__VA_ARGS__);     \
  } while (false)

template <class Sizes>
std::string sizes_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ')';
  return text.str();
}

inline std::string shape_text(const Tensor& t) { return sizes_text(t.sizes()); }

// Whether a number is finite in float32, as kernels take it.
inline bool fits_float(double number) { return std::abs(number) <= std::numeric_limits<float>::max(); }

// The storage type of a kernel's argument. float64 is not among them: the reference serves it.
inline DType kernel_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// `like`'s shape with another last dimension.
inline std::vector<int64_t> shape_with_last(const Tensor& like, int64_t last) {
  std::vector<int64_t> shape = shape_of(like);
  shape.back() = last;
  return shape;
}

// On the device of `like`.
inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const int32_t type = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float16();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type, device_type(),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// Strides of a dense tensor of `sizes`, the dimension at(0) outermost in memory.
template <class At>
std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, const At& at) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[at(i)] = step;
    EFFATTN_REQUIRE(!__builtin_mul_overflow(step, std::max<int64_t>(sizes[at(i)], 1), &step),
                    "expected a result whose elements can be counted, not one of shape ", sizes_text(sizes));
  }
  return strides;
}

// Strides of a dense tensor of `sizes` whose dimensions lie in memory in the order of `like`'s: what
// makes the reshape behind an attention free. Expanded dimensions (stride 0) come outermost.
// Of images (B, C, H, W), rows must follow each other: where those of `like` do not, as in a transposed one,
// the order is that of the dimensions. effattn/backends/_memory.py does the same for fake tensors.
enum class Kind { kAny, kImage };
inline std::vector<int64_t> strides_in_order_of(const Tensor& like, const std::vector<int64_t>& sizes,
                                                Kind kind) {
  std::vector<int64_t> strides;
  for (const int64_t step : like.strides()) strides.push_back(step == 0 ? INT64_MAX : step);
  std::vector<int64_t> order(sizes.size());
  for (size_t i = 0; i < order.size(); ++i) {
    size_t at = i;  // outermost first; insertion sort, stable
    for (; at > 0 && strides[order[at - 1]] < strides[i]; --at) order[at] = order[at - 1];
    order[at] = static_cast<int64_t>(i);
  }
  if (kind == Kind::kImage) {
    const auto rows = std::find(order.begin(), order.end(), 2);
    if (rows + 1 == order.end() || rows[1] != 3) std::iota(order.begin(), order.end(), 0);
  }
  return dense_strides(sizes, [&](size_t i) { return order[i]; });
}

inline Tensor empty_in_order_of(const Tensor& like, const std::vector<int64_t>& sizes,
                                Kind kind = Kind::kAny) {
  return empty_strided(like, sizes, strides_in_order_of(like, sizes, kind), like.scalar_type());
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  return dense_strides(sizes, [](size_t i) { return i; });
}

// Contiguous, in float32.
inline Tensor empty_floats(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_strided(like, sizes, contiguous_strides(sizes), ScalarType::Float);
}

}  // namespace effattn
