// Hands out pieces of the memory that a pass works in.
//
// All of it is one allocation, into which an address sanitizer cannot see. In a sanitized build every piece
// is therefore followed by a gap that must not be touched, and holds NaN until something is written.
#pragma once

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "tile.h"

namespace effattn::cpu::EFFATTN_ISA {

class Scratch {
 public:
  static constexpr int64_t kAlignment = 16;  // floats of a cache line
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kGap = kAlignment;
#else
  static constexpr int64_t kGap = 0;
#endif

  Scratch(float* memory, int64_t floats) : next_(memory), end_(memory + floats) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory, floats * sizeof(float));
    for (int64_t i = 0; i < floats; ++i) memory[i] = __builtin_nanf("");
    ASAN_POISON_MEMORY_REGION(memory, floats * sizeof(float));
#endif
  }

  // Begins on a cache line, if the memory does.
  float* floats(int64_t count) {
    float* const piece = next_;
    next_ += round_up(count, kAlignment) + kGap;
#ifdef __SANITIZE_ADDRESS__
    if (next_ > end_) __builtin_trap();
    ASAN_UNPOISON_MEMORY_REGION(piece, round_up(count, kAlignment) * sizeof(float));
#endif
    return piece;
  }

  // Channel-major rows are a cache line longer than the power of two that they mostly are, so that they do
  // not share cache sets.
  Tile tile(int64_t tokens, int64_t channels, bool channel_major) {
    const int64_t rows = channel_major ? channels : tokens;
    const int64_t stride = padded(channel_major ? tokens : channels) + (channel_major ? kAlignment : 0);
    return {floats(rows * stride), stride, channel_major};
  }

 private:
  float* next_;
  [[maybe_unused]] float* end_;
};

}  // namespace effattn::cpu::EFFATTN_ISA
