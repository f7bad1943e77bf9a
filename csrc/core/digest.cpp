// What this library was built with, and of which sources (csrc/build.py).
extern "C" __attribute__((visibility("default"))) const char* effattn_build() { return EFFATTN_BUILD; }
