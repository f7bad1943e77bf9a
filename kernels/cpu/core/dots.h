// Sums over rows of memory: a row alone, and products of the rows of two matrices.
#pragma once

#include "factors.h"

namespace effattn::cpu::EFFATTN_ISA {

inline float sum_of_lanes(Vec x) {
  float lanes[kLanes], total = 0.0f;
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

inline float sum_of_row(const float* row, int64_t count) {
  constexpr int kChains = 4;
  Vec totals[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    EFFATTN_UNROLL
    for (int c = 0; c < kChains; ++c) totals[c] += load(row + i + c * kLanes);
  }
  for (; i < count; i += kLanes) totals[0] += load_first(row + i, count - i);
  return sum_of_lanes((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// out(r, c) += sum_t a(r, t) b(c, t) for R rows of a and C of b. Tokens are in the lanes, so that neither has
// to be transposed.
template <int R, int C>
__attribute__((noinline)) void dot_block(float* out, int64_t out_stride, const Rows<const float>& a,
                                         const Rows<const float>& b, int64_t tokens) {
  Vec acc[R][C] = {};
  const auto step = [&](int64_t t, const auto& read) {
    Vec columns[C];
    EFFATTN_UNROLL
    for (int c = 0; c < C; ++c) columns[c] = read(b.row(c) + t);
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec row = read(a.row(r) + t);
      EFFATTN_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] += row * columns[c];
    }
  };
  int64_t t = 0;
  for (; t + kLanes <= tokens; t += kLanes) {
    step(t, [](const float* from) __attribute__((always_inline)) { return load(from); });
  }
  if (t < tokens) {
    step(t, [&](const float* from) __attribute__((always_inline)) { return load_first(from, tokens - t); });
  }
  EFFATTN_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFATTN_UNROLL
    for (int c = 0; c < C; ++c) out[r * out_stride + c] += sum_of_lanes(acc[r][c]);
  }
}

constexpr int kDotRows = kRows / 2, kDotColumns = kRows / 2;  // and as many vectors to read

template <int R, int C>
void dot_columns(float* out, int64_t out_stride, const Rows<const float>& a, const Rows<const float>& b,
                 int64_t column, int64_t columns, int64_t tokens) {
  for (; column + C <= columns; column += C) {
    dot_block<R, C>(out + column, out_stride, a, b.from(column), tokens);
  }
  if constexpr (C > 1) dot_columns<R, C / 2>(out, out_stride, a, b, column, columns, tokens);
}

template <int R>
void dot_block_rows(float* out, int64_t out_stride, const Rows<const float>& a, const Rows<const float>& b,
                    int64_t row, int64_t rows, int64_t columns, int64_t tokens) {
  for (; row + R <= rows; row += R) {
    dot_columns<R, kDotColumns>(out + row * out_stride, out_stride, a.from(row), b, 0, columns, tokens);
  }
  if constexpr (R > 1) dot_block_rows<R / 2>(out, out_stride, a, b, row, rows, columns, tokens);
}

// All `rows` of a with all `columns` of b.
inline void dot_rows(float* out, int64_t out_stride, const Rows<const float>& a, const Rows<const float>& b,
                     int64_t rows, int64_t columns, int64_t tokens) {
  dot_block_rows<kDotRows>(out, out_stride, a, b, 0, rows, columns, tokens);
}

}  // namespace effattn::cpu::EFFATTN_ISA
