// What this library was built with, and for; Python asks for it without CUDA.
#include "../../kernels/cuda/execution.h"

extern "C" __attribute__((visibility("default"))) const char* effattn_cuda_build() {
  return EFFATTN_CUDA_BUILD;
}
// Why the driver of this machine cannot run it; empty if it can.
extern "C" __attribute__((visibility("default"))) const char* effattn_cuda_driver() {
  return effattn::cuda::unfit_driver();
}
