// What the kernels take, for Python, which looks for another backend where a call asks for more.
#include <string>

#include "../../kernels/cuda/limits.h"
#include "../../kernels/params/multi_scale.h"

extern "C" __attribute__((visibility("default"))) const char* effattn_cuda_limits() {
  using namespace effattn;
  static const std::string limits =
      "channels=" + std::to_string(cuda::kMostChannels) + " kernel=" + std::to_string(cuda::kMostKernel) +
      " scales=" + std::to_string(MultiScaleParams::kMaxScales) +
      " heads=" + std::to_string(cuda::kMostHeads) + " dimensions=" + std::to_string(cuda::kMostGroups + 2);
  return limits.c_str();
}
