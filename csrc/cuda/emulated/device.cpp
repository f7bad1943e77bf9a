// The GPU that tests emulate: EFFATTN_EMULATED_CAPABILITY, 90 by default, and
// EFFATTN_EMULATED_MULTIPROCESSORS, 132 by default.
#include <cstdlib>
#include <cstring>

#include "../../../kernels/cuda/core/emulated/emulator.h"
#include "../backend.h"

namespace effattn {

cuda::Gpu OnDevice::gpu() const {
  const auto setting = [](const char* name, int otherwise) {
    const char* const value = std::getenv(name);
    return value != nullptr ? std::atoi(value) : otherwise;
  };
  return {setting("EFFATTN_EMULATED_CAPABILITY", 90), setting("EFFATTN_EMULATED_MULTIPROCESSORS", 132)};
}

void OnDevice::poison(float* workspace, int64_t floats) const { std::memset(workspace, 0xff, 4 * floats); }

void OnDevice::end() const { cuda::run_launches(); }

}  // namespace effattn

const char* effattn::cuda::unfit_driver() { return ""; }
