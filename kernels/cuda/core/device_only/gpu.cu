#include <mutex>
#include <string>
#include <vector>

#include "../fragment.h"
#include "../launch.h"

namespace effattn::cuda {
namespace {

EFFATTN_KERNEL(kLanes, 1) nothing(EFFATTN_PARAMETERS(int) p) { static_cast<void>(p); }

}  // namespace

const char* unfit_driver() {
  static const std::string found = [] {
    int driver = 0, runtime = 0;
    for (const cudaError_t error : {cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime)}) {
      if (error == cudaSuccess) continue;
      cudaGetLastError();  // which would be the next call's otherwise
      return std::string("cannot ask for the driver: ") +
             cudaGetErrorString(error);  // callers know no exceptions
    }
    // Of one major version, every driver runs every library.
    if (driver / 1000 >= runtime / 1000) return std::string();
    return "is compiled with CUDA " + std::to_string(runtime / 1000) + ", the driver knows CUDA " +
           std::to_string(driver / 1000);
  }();
  return found.c_str();
}

void make_current(int device) { check(cudaSetDevice(device), "a device"); }

Card card(int device) {
  static std::mutex mutex;
  static std::vector<Card> cards;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(device) >= cards.size()) cards.resize(device + 1, Card{0, 0});
  Card& found = cards[device];
  if (found.capability == 0) {
    const auto attribute = [device](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), "attributes of a device");
      return value;
    };
    // A card may run what was translated from code for older ones, which knows no clusters.
    cudaFuncAttributes compiled{};
    check(cudaFuncGetAttributes(&compiled, nothing), "attributes of a kernel");
    found = {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
             attribute(cudaDevAttrMultiProcessorCount)};
    found.capability = least(found.capability, compiled.ptxVersion);
  }
  return found;
}

}  // namespace effattn::cuda
