// The operators' schemas, once for all backends: those of effattn/ops. Backends register their kernels for
// their device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(effattn, m) {
  for (const char* const schema : {
#include "schemas.inc"  // made by csrc/build.py
       })
    m.def(schema);
}
