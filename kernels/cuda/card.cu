#include <mutex>
#include <vector>

#include "launch.h"

namespace effattn::cuda {

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
    found = {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
             attribute(cudaDevAttrMultiProcessorCount)};
  }
  return found;
}

}  // namespace effattn::cuda
