// Dtypes, devices, layouts and numbers as Python shows them, for messages.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "tensor.h"

namespace effattn {

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      return "dtype " + std::to_string(static_cast<int>(type));
  }
}

inline std::string device_name(const Tensor& t) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  if (type == aoti_torch_device_type_meta()) return "meta";
  return "device type " + std::to_string(type);
}

inline int32_t layout_of(const Tensor& t) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return layout;
}

inline std::string layout_name(const Tensor& t) {
  const int32_t layout = layout_of(t);
  if (layout == aoti_torch_layout_sparse_coo()) return "torch.sparse_coo";
  if (layout == aoti_torch_layout_sparse_csr()) return "torch.sparse_csr";
  if (layout == aoti_torch_layout_sparse_csc()) return "torch.sparse_csc";
  if (layout == aoti_torch_layout_sparse_bsr()) return "torch.sparse_bsr";
  if (layout == aoti_torch_layout_sparse_bsc()) return "torch.sparse_bsc";
  if (layout == aoti_torch_layout__mkldnn()) return "torch._mkldnn";
  return std::to_string(layout);
}

// As Python shows a float: with as few digits as name it.
inline std::string number_text(double number) {
  if (std::isnan(number)) return "nan";
  std::array<char, 40> text;
  int decimals = -1;
  do {
    std::snprintf(text.data(), text.size(), "%.*e", ++decimals, number);
  } while (std::strtod(text.data(), nullptr) != number);
  if (!std::isfinite(number)) return text.data();
  const int exponent = std::atoi(std::strchr(text.data(), 'e') + 1);
  if (exponent >= -4 && exponent < 16)
    std::snprintf(text.data(), text.size(), "%.*f", std::max(decimals - exponent, 1), number);
  return text.data();
}

}  // namespace effattn
