// The main inner loop of every pass: a small matrix product held in registers,
//     acc[r][:] = start + sum_p a(r, p) * b[p][:]
// with a read as scalars (any strides) and b as vectors.
#pragma once

#include "fetch.h"

namespace effattn::cpu::EFFATTN_ISA {

// The register block: kRows x 3 sums (kRowsIfNarrow x 1, to have enough sums under way), 3 vectors of b and
// one scalar of a must fit the register file (32 registers with AVX-512 and NEON, 16 before).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kRowsIfNarrow = 16;
#else
constexpr int kRows = 4, kRowsIfNarrow = 8;
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
                                             const Edge& edge, Fetch& fetch) {
  Vec acc[R][V];
  {
    auto at = edge.at(row, col);
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r, at.next_row()) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = at.start(v);
    }
  }
  // A pointer for every four rows: the other three are reached by address arithmetic, where a pointer
  // or an offset for each row would not fit the general registers.
  const float* scalars[(R + 3) / 4];
  EFFATTN_UNROLL
  for (int r = 0; r < R; r += 4) scalars[r / 4] = a.data + (row + r) * a.row_stride;
  const float* vectors = b.data + col;
  const auto step = [&]() __attribute__((always_inline)) {
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
  const auto finish = [&]<bool Whole>() __attribute__((always_inline)) {
    auto at = edge.at(row, col);
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r, at.next_row()) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) at.template finish<Whole>(v, acc[r][v]);
    }
  };
  if (edge.whole(col + V * kLanes)) {
    finish.template operator()<true>();
  } else {
    finish.template operator()<false>();
  }
}

// Rows from `row` on, in blocks of R and of ever smaller ones for the rest.
template <int R, int V, class Edge>
EFFATTN_INLINE void product_rows(int64_t row, int64_t rows, Scalars a, Vectors b, int64_t depth, int64_t col,
                                 const Edge& edge, Fetch& fetch) {
  for (; row + R <= rows; row += R) product_block<R, V>(a, b, depth, row, col, edge, fetch);
  if constexpr (R > 1) product_rows<R / 2, V>(row, rows, a, b, depth, col, edge, fetch);
}

// `edge.at(row, col)` walks down the result, row by row: start(v) gives the initial value of its vth vector
// from col on, finish<Whole>(v, acc) takes the result. `edge.whole(end)` tells whether columns up to `end`
// may be written as whole vectors. `cols` counts floats and is rounded up to whole vectors. `fetch` is drawn
// from along the way.
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
      product_rows<kRowsIfNarrow, 1>(0, rows, a, b, depth, col, edge, fetch);
    }
  }
}

// A pointer that moves on by a row. The compiler is kept from computing each row's address anew, for which it
// would run out of registers.
template <class T>
struct RowPointer {
  T* at;
  int64_t stride;
  EFFATTN_INLINE void next_row() {
    at += stride;
    asm("" : "+r"(at));
  }
};

// Writes the product to a float matrix, or adds it to what stands there.
template <bool Add>
struct IntoMatrix {
  float* data;
  int64_t row_stride;

  struct Row : RowPointer<float> {
    EFFATTN_INLINE Vec start(int v) const { return Add ? load(this->at + v * kLanes) : Vec{}; }
    template <bool>
    EFFATTN_INLINE void finish(int v, Vec acc) const {
      store(this->at + v * kLanes, acc);
    }
  };
  EFFATTN_INLINE Row at(int64_t row, int64_t col) const {
    return {data + row * row_stride + col, row_stride};
  }
  EFFATTN_INLINE bool whole(int64_t) const { return true; }
};
using AddTo = IntoMatrix<true>;
using WriteTo = IntoMatrix<false>;

}  // namespace effattn::cpu::EFFATTN_ISA
