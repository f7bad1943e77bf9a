// Whether modules and their tensors are as they were: what effattn/nn/fold_cache.py asks on every call.
#pragma once

#include <pybind11/pybind11.h>

namespace effattn {

void bind_fingerprint(pybind11::module_& m);

}  // namespace effattn
