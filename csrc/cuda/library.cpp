// What this library was built with, and for; Python asks for it without CUDA.
extern "C" __attribute__((visibility("default"))) const char* effattn_cuda_build() {
  return EFFATTN_CUDA_BUILD;
}
