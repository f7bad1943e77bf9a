// What the library says of itself, to Python: without a GPU, and without asking CUDA but for the driver.
#include <string>

#include "../../kernels/cuda/core/execution.h"
#include "../../kernels/cuda/core/launch_record.h"
#include "../../kernels/cuda/core/limits.h"

#define EFFATTN_EXPORT extern "C" __attribute__((visibility("default")))

// Its compiler, the architectures that it is compiled for, and the digest of its sources.
EFFATTN_EXPORT const char* effattn_cuda_build() { return EFFATTN_CUDA_BUILD; }

// Why the driver of this machine cannot run it; empty if it can.
EFFATTN_EXPORT const char* effattn_cuda_driver() { return effattn::cuda::unfit_driver(); }

// Its operators, and the largest sizes that each takes, as "op op.size=128 ...".
EFFATTN_EXPORT const char* effattn_cuda_limits() {
  static const std::string text = effattn::cuda::limits_text();
  return text.c_str();
}

// The last launch of this process, for tests and for whoever looks at a process that hangs.
EFFATTN_EXPORT const char* effattn_cuda_last_launch() {
  static thread_local std::string text;
  text = effattn::cuda::last_launches().last().text("");
  return text.c_str();
}
