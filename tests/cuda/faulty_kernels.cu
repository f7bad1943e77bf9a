// Kernels with a fault each, and the same without: what the emulator is for.
#include <cstdio>
#include <cstring>

#include "../../kernels/cuda/core/launch.h"

namespace effattn::cuda {
namespace {

constexpr int kThreads = 64;

struct Fault {
  bool missing_barrier, beyond_shared, beyond_global, divergent, not_tf32, waits_alone;
  bool not_aligned, not_waited_for, not_copied, not_ended, read_early, first_dependent;
  float* out;
  const float* in;
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
  if (i < kLanes) mma_m16n8k8_tf32(c, a, b);
  p.out[i + (p.beyond_global ? kThreads : 0)] = shared[kThreads - 1 - i] + 0 * c[0];
}

// Copies 16 bytes a thread, and takes an 8 x 8 matrix of pairs of the warp from them, of which it keeps lane
// 0's.
EFFATTN_KERNEL(kThreads, 1)
faulty_copy(EFFATTN_PARAMETERS(Fault) p) {
  char* const shared = shared_memory();
  const int i = thread_index();
  if (!p.not_waited_for) grid_dependency_wait();
  cp_async_16(shared + 16 * i, p.out + 4 * i, true);
  cp_async_commit();
  if (!p.not_copied) cp_async_wait<0>();
  sync_block();
  uint32_t x[4];
  ldmatrix_x4<false>(x, shared + 16 * i + (p.not_aligned && i == 0 ? 4 : 0));
  if (p.not_copied && !p.not_ended) cp_async_wait<0>();
  sync_block();
  p.out[4 * i] = float_of(x[0]);
}

// Takes what an earlier launch wrote.
EFFATTN_KERNEL(kThreads, 1)
faulty_reader(EFFATTN_PARAMETERS(Fault) p) {
  const int i = thread_index();
  const float early = p.in[i];
  grid_dependency_wait();
  p.out[i] = p.read_early && i == 5 ? early : p.in[i];
}

}  // namespace
}  // namespace effattn::cuda

int main(int count, char** arguments) {
  using namespace effattn::cuda;
  Fault p{};
  struct {
    const char* name;
    bool* fault;
  } const faults[] = {{"missing_barrier", &p.missing_barrier},
                      {"beyond_shared", &p.beyond_shared},
                      {"beyond_global", &p.beyond_global},
                      {"divergent", &p.divergent},
                      {"not_tf32", &p.not_tf32},
                      {"waits_alone", &p.waits_alone},
                      {"not_aligned", &p.not_aligned},
                      {"not_waited_for", &p.not_waited_for},
                      {"not_copied", &p.not_copied},
                      {"not_ended", &p.not_ended},
                      {"read_early", &p.read_early},
                      {"first_dependent", &p.first_dependent}};
  for (const auto& [name, fault] : faults) *fault = count > 1 && std::strcmp(arguments[1], name) == 0;
  p.not_copied |= p.not_ended;
  float* const out = new float[kThreads];
  std::memset(out, 0xff, kThreads * 4);
  p.out = out;
  const Execution execution{};
  launch(faulty, {1, kThreads, kThreads * 4, 1, p.first_dependent}, execution, p);
  float wrong = 0;
  // Four numbers a thread, of which the first becomes the first pair of the warp's matrix in the thread's
  // lane: row lane / 4, words lane % 4.
  alignas(16) float copied[4 * kThreads];
  for (int i = 0; i < 4 * kThreads; ++i) copied[i] = static_cast<float>(i);
  p.out = copied;
  launch(faulty_copy, {1, kThreads, kThreads * 16, 1, true}, execution, p);
  float read[kThreads];
  p.out = read;
  p.in = out;
  launch(faulty_reader, {1, kThreads, 0, 1, true}, execution, p);
  run_launches();
  for (int i = 0; i < kThreads; ++i) {
    const int lane = i % kLanes, row = i / kLanes * kLanes + lane / 4;
    if (!(copied[4 * i] == static_cast<float>(4 * row + lane % 4))) ++wrong;
  }
  for (int i = 0; i < kThreads; ++i) {
    if (!(read[i] == static_cast<float>(kThreads - 1 - i))) ++wrong;
  }
  std::printf("%g wrong\n", wrong);
  delete[] out;
  return wrong > 0 ? 3 : 0;
}
