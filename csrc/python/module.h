// What effattn._C is made of: a static Shown in every other file here adds its part.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "../../kernels/params/dtype.h"

namespace effattn {

struct Shown {
  explicit Shown(void (*bind)(pybind11::module_& m));
};

// Both throw Python's ValueError.
DType dtype_named(const std::string& name);
void require_sizes(std::initializer_list<int64_t> sizes);

}  // namespace effattn
