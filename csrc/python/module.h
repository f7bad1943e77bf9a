// What effattn._C is made of: a static Bindings in every other file here adds its part.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "../../kernels/params/dtype.h"

namespace effattn {

struct Bindings {
  explicit Bindings(void (*add)(pybind11::module_& m));
};

// Both throw Python's ValueError.
DType dtype_named(const std::string& name);
void require_sizes(std::initializer_list<int64_t> sizes);

}  // namespace effattn
