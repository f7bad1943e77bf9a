// What the glue of the operators has of the CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <chrono>

#include "../../kernels/cpu/core/parallel.h"

#define EFFATTN_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m)

namespace effattn {

using torch::stable::Tensor;
namespace kernels = cpu;

constexpr const char* kHere = "the CPU";
inline bool is_here(const Tensor& t) { return t.is_cpu(); }
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }

// Whether no call has come for so long that the pool's threads sleep: an idle OpenMP spins for 3 to 9 ms.
// Torch's own calls go unseen, so in a model only the first small call of ours after a pause is alone.
inline bool pool_sleeps() {
  constexpr int64_t kSleepsAfter = 50'000'000;  // ns
  static std::atomic<int64_t> last_call{0};
  const int64_t now = std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
  return now - last_call.exchange(now, std::memory_order_relaxed) > kSleepsAfter;
}

// Torch's own pool, never a second one.
inline cpu::Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()), pool_sleeps(),
          [](const void*, int64_t count, void (*body)(const void*, int64_t, int64_t), const void* context) {
            torch::stable::parallel_for(0, count, 1,
                                        [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          nullptr};
}

// How a call on a tensor is run.
inline cpu::Parallel execution(const Tensor&) { return torch_threads(); }

}  // namespace effattn
