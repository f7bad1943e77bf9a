// Tensors (B, C, H, W) as kernels see them.
#pragma once

#include <vector>

#include "../kernels/params/image.h"
#include "tensor.h"

namespace effattn {

// Tokens must be one dimension of one stride; a view that is none, such as a crop, is copied.
inline Tensor with_mergeable_rows(const Tensor& t) {
  const bool mergeable = t.size(2) <= 1 || t.size(3) <= 1 || t.stride(2) == t.size(3) * t.stride(3);
  return mergeable ? t : torch::stable::contiguous(t);
}

inline Image image(const Tensor& t) {
  const int64_t token_stride = t.size(3) > 1 ? t.stride(3) : t.size(2) > 1 ? t.stride(2) : 1;
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.size(1) == 1 ? 1 : t.stride(1), token_stride};
}

inline Tensor new_image(const Tensor& like, const std::vector<int64_t>& shape, Image& into) {
  Tensor t = empty_in_order_of(like, shape, Kind::kImage);
  into = image(t);
  return t;
}

}  // namespace effattn
