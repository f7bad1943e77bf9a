// The one inner loop of every pass: a small matrix product held in registers,
//     acc[r][:] = start + sum_p a(r, p) * b[p][:]
// with a read as scalars (any strides) and b as vectors.
#pragma once

#include "fetch.h"

namespace effattn::cpu::EFFATTN_ISA {

// The register block: kRows x 3 sums, 3 vectors of b and one scalar of a must fit the register file (32
// registers with AVX-512 and NEON, 16 before).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif

struct Scalars {  // a(r, p) = data[r * row_stride + p * step]
  const float* data;
  int64_t row_stride;
  int64_t step;
};

struct Vectors {  // b[p][c] = data[p * row_stride + c]
  const float* data;
  int64_t row_stride;
};

// A function of its own: inlined, its pointers would compete for registers with all that surrounds them, and
// the compiler reloads them at every step.
template <int R, int V, class Edge>
__attribute__((noinline)) void product_block(Scalars a, Vectors b, int64_t depth, int64_t row, int64_t col,
                                             const Edge& where, Fetch& fetch) {
  const Edge edge = where;  // in registers: behind a reference, each store might have changed it
  Vec acc[R][V];
  EFFATTN_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFATTN_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] = edge.start(row + r, col + v * kLanes);
  }
  // A pointer for every four rows: the other three are reached by address arithmetic, where a pointer
  // or an offset for each row would not fit the general registers.
  const float* scalars[(R + 3) / 4];
  EFFATTN_UNROLL
  for (int r = 0; r < R; r += 4) scalars[r / 4] = a.data + (row + r) * a.row_stride;
  const float* vectors = b.data + col;
  const auto step = [&] {
    Vec line[V];
    EFFATTN_UNROLL
    for (int v = 0; v < V; ++v) line[v] = load(vectors + v * kLanes);
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec scalar = broadcast(scalars[r / 4][r % 4 * a.row_stride]);
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] += scalar * line[v];
    }
    EFFATTN_UNROLL
    for (int r = 0; r < R; r += 4) scalars[r / 4] += a.step;
    vectors += b.row_stride;
  };
  // Wide blocks take long enough for three lines a step, narrow ones for one.
  constexpr int kFetched = V == 3 ? 3 : 1;
  int64_t p = 0;
  while (p < depth && fetch.lines() > 0) {
    const char* at = fetch.at();
    const int64_t steps = smaller(depth - p, (fetch.lines() + kFetched - 1) / kFetched);
    for (const int64_t end = p + steps; p < end; ++p, at += kFetched * Fetch::kLineBytes) {
      EFFATTN_UNROLL
      for (int i = 0; i < kFetched; ++i) __builtin_prefetch(at + i * Fetch::kLineBytes, 0, 2);
      step();
    }
    fetch.skip(steps * kFetched);
  }
  for (; p < depth; ++p) step();
  if (edge.whole(col + V * kLanes)) {
    EFFATTN_UNROLL
    for (int v = 0; v < V; ++v) {
      EFFATTN_UNROLL
      for (int r = 0; r < R; ++r) edge.template finish<true>(row + r, col + v * kLanes, acc[r][v]);
    }
  } else {
    EFFATTN_UNROLL
    for (int v = 0; v < V; ++v) {
      EFFATTN_UNROLL
      for (int r = 0; r < R; ++r) edge.template finish<false>(row + r, col + v * kLanes, acc[r][v]);
    }
  }
}

// Rows from `row` on, in blocks of R and of ever smaller ones for the rest.
template <int R, int V, class Edge>
EFFATTN_INLINE void product_rows(int64_t row, int64_t rows, Scalars a, Vectors b, int64_t depth, int64_t col,
                                 const Edge& edge, Fetch& fetch) {
  for (; row + R <= rows; row += R) product_block<R, V>(a, b, depth, row, col, edge, fetch);
  if constexpr (R > 1) product_rows<R / 2, V>(row, rows, a, b, depth, col, edge, fetch);
}

// `edge.start(row, col)` gives the initial vector, `edge.finish<Whole>(row, col, acc)` takes the result;
// `edge.whole(end)` tells whether columns up to `end` may be written as whole vectors.
// `cols` counts floats and is rounded up to whole vectors. `fetch` is drawn from along the way.
template <class Edge>
inline void product(int64_t rows, int64_t cols, Scalars a, Vectors b, int64_t depth, const Edge& edge,
                    Fetch& fetch) {
  for (int64_t col = 0, width; col < cols; col += width * kLanes) {
    const int64_t vectors = (cols - col + kLanes - 1) / kLanes;
    // Four are two and two: a single vector has too few sums under way to hide the latency of an addition.
    width = vectors == 4 ? 2 : smaller(vectors, 3);
    if (width == 3) {
      product_rows<kRows, 3>(0, rows, a, b, depth, col, edge, fetch);
    } else if (width == 2) {
      product_rows<kRows, 2>(0, rows, a, b, depth, col, edge, fetch);
    } else {
      product_rows<8, 1>(0, rows, a, b, depth, col, edge, fetch);
    }
  }
}

// Adds the product to a float matrix.
struct AddTo {
  float* data;
  int64_t row_stride;
  EFFATTN_INLINE Vec start(int64_t row, int64_t col) const { return load(data + row * row_stride + col); }
  EFFATTN_INLINE bool whole(int64_t) const { return true; }
  template <bool>
  EFFATTN_INLINE void finish(int64_t row, int64_t col, Vec acc) const {
    store(data + row * row_stride + col, acc);
  }
};

// Writes the product to a float matrix.
struct WriteTo {
  float* data;
  int64_t row_stride;
  EFFATTN_INLINE Vec start(int64_t, int64_t) const { return Vec{}; }
  EFFATTN_INLINE bool whole(int64_t) const { return true; }
  template <bool>
  EFFATTN_INLINE void finish(int64_t row, int64_t col, Vec acc) const {
    store(data + row * row_stride + col, acc);
  }
};

}  // namespace effattn::cpu::EFFATTN_ISA
