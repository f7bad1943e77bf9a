// Memory that a thread will need next, asked for while it computes.
#pragma once

#include "tile.h"

namespace effattn::cpu::EFFATTN_ISA {

// The cache lines of the blocks that come next. A product takes a few of them at each of its steps, so that
// they arrive beside the arithmetic; asked for in a burst, they would only make the thread wait earlier.
class PrefetchQueue {
 public:
  static constexpr int kLineBytes = 64;
  static constexpr int kMaxBlocks = 4;  // of what one micro-kernel reads and writes

  template <class T>
  void add(const Place<T>& block, int64_t tokens, int64_t channels) {
    const bool along_tokens = block.token_stride == 1;
    const int64_t rows = along_tokens ? channels : tokens, cols = along_tokens ? tokens : channels;
    const int64_t step = along_tokens ? block.channel_stride : block.token_stride;
    const char* const first = reinterpret_cast<const char*>(block.data);
    constexpr int64_t width = sizeof(T);
    if (rows == 0 || cols == 0 || blocks_ == kMaxBlocks) return;
    const bool dense = step == cols;
    queue_[blocks_++] = {first, dense ? 1 : rows, ceil_div((dense ? rows * cols : cols) * width, kLineBytes),
                         step * width};
    if (lines_ == 0) start_row();
  }

  // Lines that follow each other from at() on.
  EFFATTN_INLINE int64_t lines() const { return lines_; }
  EFFATTN_INLINE const char* at() const { return at_; }
  // Goes on behind `count` lines, at most a few more than lines().
  EFFATTN_INLINE void skip(int64_t count) {
    at_ += count * kLineBytes;
    lines_ -= count;
    if (lines_ <= 0) next_row();
  }

 private:
  struct Block {
    const char* first;
    int64_t rows, lines, step;
  };

  void start_row() {
    at_ = queue_[block_].first;
    lines_ = queue_[block_].lines;
  }
  void next_row() {
    Block& block = queue_[block_];
    block.first += block.step;
    if (--block.rows == 0) ++block_;
    lines_ = 0;
    if (block_ < blocks_) start_row();
  }

  Block queue_[kMaxBlocks];
  int blocks_ = 0, block_ = 0;
  const char* at_ = nullptr;
  int64_t lines_ = 0;
};

}  // namespace effattn::cpu::EFFATTN_ISA
