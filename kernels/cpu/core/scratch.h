// Hands out pieces of the memory that a pass works in.
#pragma once

#include "tile.h"
#include "arena.h"

namespace effattn::cpu::EFFATTN_ISA {

class Scratch {
 public:
  static constexpr int64_t kAlignment = 16;  // floats of a cache line
  static constexpr int64_t kGap = kGapFloats;

  Scratch(float* memory, int64_t floats) : next_(memory), end_(memory + floats) { poison(memory, floats); }

  // Begins on a cache line, if the memory does.
  float* floats(int64_t count) {
    float* const piece = next_;
    next_ += round_up(count, kAlignment) + kGap;
    if (kGap > 0 && next_ > end_) __builtin_trap();
    spoil(piece, round_up(count, kAlignment));
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
  float* end_;
};

}  // namespace effattn::cpu::EFFATTN_ISA
