// What this library was built with, and of which sources, as libeffattn says it of itself (csrc/build.py).
extern "C" __attribute__((visibility("default"))) const char* effattn_kernels_build() {
  return EFFATTN_BUILD;
}
