// The channels of a head in a value, and rows of its tokens.
#pragma once

#include "call.h"

namespace effattn::cpu {

// q, k, v or the result of a head, from a block of a value on.
struct HeadBlocks {
  View view;
  int64_t first, blocks, width;

  // Whether a token is one block, and tokens follow each other.
  bool is_dense() const { return blocks == 1 && view.row_stride == width * kBlock; }
  float* token(int64_t t) const { return view.own_row(first, 0) + t * kBlock; }

  // Calls f(pixels in memory, their number, the first one's number from `begin` on, block) row by row.
  template <class F>
  void for_rows(int64_t begin, int64_t end, const F& f) const {
    for (int64_t t = begin; t < end;) {
      const int64_t y = t / width, x = t % width, count = min(width - x, end - t);
      for (int64_t b = 0; b < blocks; ++b) f(view.own_row(first + b, y) + x * kBlock, count, t - begin, b);
      t += count;
    }
  }

  // Tokens as kernels read them: in place, or copied.
  Rows<float> gathered(int64_t begin, int64_t end, Arena& arena) const {
    if (is_dense()) return {token(begin), kBlock};
    const int64_t dim = blocks * kBlock;
    const Rows<float> rows{arena.floats((end - begin) * dim), dim};
    gather(begin, end, rows);
    return rows;
  }
  void gather(int64_t begin, int64_t end, const Rows<float>& to) const {
    for_rows(begin, end, [&](const float* from, int64_t count, int64_t first_token, int64_t b) {
      for (int64_t i = 0; i < count; ++i) {
        copy(to.row(first_token + i) + b * kBlock, from + i * kBlock, kBlock);
      }
    });
  }
  void scatter(int64_t begin, int64_t end, const Rows<const float>& from) const {
    for_rows(begin, end, [&](float* to, int64_t count, int64_t first_token, int64_t b) {
      for (int64_t i = 0; i < count; ++i) {
        copy(to + i * kBlock, from.row(first_token + i) + b * kBlock, kBlock);
      }
    });
  }
};

}  // namespace effattn::cpu
