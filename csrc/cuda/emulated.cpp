// The card that tests emulate: EFFATTN_EMULATED_CAPABILITY, 90 unless told, and
// EFFATTN_EMULATED_MULTIPROCESSORS, 132 unless told.
#include <cstdlib>

#include "backend.h"

namespace effattn {

cuda::Card OnDevice::card() const {
  const auto told = [](const char* name, int otherwise) {
    const char* const value = std::getenv(name);
    return value != nullptr ? std::atoi(value) : otherwise;
  };
  return {told("EFFATTN_EMULATED_CAPABILITY", 90), told("EFFATTN_EMULATED_MULTIPROCESSORS", 132)};
}

}  // namespace effattn

extern "C" __attribute__((visibility("default"))) const char* effattn_cuda_build() {
  return EFFATTN_CUDA_BUILD;
}
extern "C" __attribute__((visibility("default"))) const char* effattn_cuda_driver() { return ""; }
