// The GPU that tests emulate: EFFATTN_EMULATED_CAPABILITY, 90 unless told, and
// EFFATTN_EMULATED_MULTIPROCESSORS, 132 unless told.
#include <cstdlib>
#include <cstring>

#include "../../../kernels/cuda/core/emulated/emulator.h"
#include "../backend.h"

namespace effattn {

cuda::Gpu OnDevice::gpu() const {
  const auto told = [](const char* name, int otherwise) {
    const char* const value = std::getenv(name);
    return value != nullptr ? std::atoi(value) : otherwise;
  };
  return {told("EFFATTN_EMULATED_CAPABILITY", 90), told("EFFATTN_EMULATED_MULTIPROCESSORS", 132)};
}

void OnDevice::poison(float* workspace, int64_t floats) const { std::memset(workspace, 0xff, 4 * floats); }

void OnDevice::end() const { cuda::run_launches(); }

}  // namespace effattn

const char* effattn::cuda::unfit_driver() { return ""; }
