// The card that tests emulate: of the kind that EFFATTN_EMULATED_CAPABILITY says, 90 unless told.
#include <cstdlib>

#include "backend.h"

namespace effattn {

cuda::Card OnDevice::card() const {
  const char* const capability = std::getenv("EFFATTN_EMULATED_CAPABILITY");
  return {capability != nullptr ? std::atoi(capability) : 90, 132};
}

}  // namespace effattn

extern "C" __attribute__((visibility("default"))) const char* effattn_cuda_build() { return "emulated; "; }
