// The operators' schemas, once for all backends: those of effattn/ops. Backends register their kernels for
// their device.
#include <torch/csrc/stable/library.h>

#include "../signature.h"
#include "signatures.h"  // made by csrc/build.py

STABLE_TORCH_LIBRARY(effattn, m) {
  for (const auto& [name, text] : effattn::kSignatures)
    for (const std::string& schema : effattn::Signature(name).schemas()) m.def(schema.c_str());
  for (const char* const schema : effattn::kSchemas) m.def(schema);
}
