// Kernels with a fault each, and the same without: what the emulator is for.
#include <cstdio>
#include <cstring>

#include "../../kernels/cuda/launch.h"

namespace effattn::cuda {
namespace {

constexpr int kThreads = 64;

struct Fault {
  bool missing_barrier, beyond_shared, beyond_global, divergent, not_tf32, waits_alone;
  float* out;
};

EFFATTN_KERNEL(kThreads, 1)
faulty(EFFATTN_PARAMETERS(Fault) p) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  shared[i + (p.beyond_shared && i == kThreads - 1 ? 1 : 0)] = static_cast<float>(i);
  if (p.divergent && i % 2 == 0) {
    sync_warp();
  } else if (p.waits_alone && i < kLanes) {
    return;
  } else if (!p.missing_barrier) {
    sync_block();
  }
  float c[4] = {};
  const float a[4] = {shared[kThreads - 1 - i], 0, 0, 0}, b[2] = {p.not_tf32 ? 1.0001f : 1.0f, 0};
  if (i < kLanes) multiply_tf32(c, a, b);
  p.out[i + (p.beyond_global ? kThreads : 0)] = shared[kThreads - 1 - i] + 0 * c[0];
}

}  // namespace
}  // namespace effattn::cuda

int main(int count, char** arguments) {
  using namespace effattn::cuda;
  Fault p{};
  bool* const faults[] = {&p.missing_barrier, &p.beyond_shared, &p.beyond_global,
                          &p.divergent,       &p.not_tf32,      &p.waits_alone};
  const char* const names[] = {"missing_barrier", "beyond_shared", "beyond_global",
                               "divergent",       "not_tf32",      "waits_alone"};
  for (int i = 0; count > 1 && i < 6; ++i) *faults[i] = std::strcmp(arguments[1], names[i]) == 0;
  float* const out = new float[kThreads];
  p.out = out;
  const Execution execution{};
  launch(faulty, {1, kThreads, kThreads * 4}, execution, p);
  float wrong = 0;
  for (int i = 0; i < kThreads; ++i) {
    if (!(out[i] == static_cast<float>(kThreads - 1 - i))) ++wrong;
  }
  std::printf("%g wrong\n", wrong);
  delete[] out;
  return wrong > 0 ? 3 : 0;
}
