// Weights of operators: float32 whatever the images are, contiguous while a call runs.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace effattn {

using Tensors = std::vector<Tensor>;
// Of a list that may be empty, which AOTInductor leaves out.
using MaybeTensors = std::optional<Tensors>;

inline const Tensors& given(const MaybeTensors& list) {
  static const Tensors none;
  return list ? *list : none;
}

// A contiguous tensor of float32, kept alive by `alive`.
inline const float* floats(const Tensor& t, Tensors& alive) {
  // Asked first: through the dispatcher the answer costs as much as a small call's check of everything else.
  alive.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return static_cast<const float*>(alive.back().const_data_ptr());
}

// The element of a list that may have none.
inline const float* floats(const Tensors& list, size_t i, Tensors& alive) {
  return list.empty() ? nullptr : floats(list[i], alive);
}

// A new tensor of float32 with the shape of `like`: a gradient of weights.
inline Tensor new_floats(const Tensor& like, float*& into) {
  Tensor t = empty_floats(like, shape_of(like));
  into = static_cast<float*>(t.mutable_data_ptr());
  return t;
}

}  // namespace effattn
