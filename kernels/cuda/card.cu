#include <mutex>
#include <vector>

#include "fragment.h"
#include "launch.h"

namespace effattn::cuda {
namespace {

EFFATTN_KERNEL(kLanes, 1) nothing(EFFATTN_PARAMETERS(int) p) { static_cast<void>(p); }

}  // namespace

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
