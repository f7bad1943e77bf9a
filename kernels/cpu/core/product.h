// The main inner loop of every micro-kernel: a small matrix product held in registers,
//     acc[r][:] = start + sum_p a(r, p) * b[p][:]
// with a read as scalars and b as vectors.
#pragma once

#include "factors.h"
#include "prefetch.h"

namespace effattn::cpu::EFFATTN_ISA {

// The registers of a block.
template <int R, int V, class Scalars, class T, bool Relu>
struct Block {
  using Cursor = typename Scalars::template Cursor<R>;
  static constexpr int kSteps = Cursor::kSteps;
  static constexpr int kChains = kSteps > 1 && V == 1 && R < kRowsIfOneVector ? 2 : 1;
  Vec acc[kChains][R][V];
  Cursor scalars;
  const T* vectors;
  int64_t vectors_stride;

  EFFATTN_INLINE void step(int s) {
    Vec line[V];
    EFFATTN_UNROLL
    for (int v = 0; v < V; ++v) line[v] = Vectors<T, Relu>::at(vectors + v * kLanes);
    vectors += vectors_stride;
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec scalar = broadcast(scalars(r, s));
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) acc[s % kChains][r][v] += scalar * line[v];
    }
  }
  EFFATTN_INLINE void steps() {
    EFFATTN_UNROLL
    for (int s = 0; s < kSteps; ++s) step(s);
    scalars.advance(kSteps);
  }
};

// A function of its own: inlined, its pointers would compete for registers with all that surrounds them, and
// the compiler reloads them at every step.
template <int R, int V, class Scalars, class T, bool Relu, class Edge>
__attribute__((noinline)) void product_block(Scalars a, Vectors<T, Relu> b, int64_t depth, int64_t row,
                                             int64_t col, const Edge& edge, PrefetchQueue& prefetch) {
  Block<R, V, Scalars, T, Relu> block{{}, {a, row}, b.data + col, b.row_stride};
  {
    auto at = edge.at(row, col);
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r, at.next_row()) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) block.acc[0][r][v] = at.start(v);
    }
  }
  constexpr int kSteps = block.kSteps;
  // Wide blocks take long enough for three lines a step, narrow ones for one.
  constexpr int kPrefetched = kSteps * (V == 3 ? 3 : 1);
  int64_t groups = depth / kSteps;
  while (groups > 0 && prefetch.lines() > 0) {
    const char* at = prefetch.at();
    const int64_t n = min(groups, (prefetch.lines() + kPrefetched - 1) / kPrefetched);
    for (int64_t i = 0; i < n; ++i, at += kPrefetched * PrefetchQueue::kLineBytes) {
      EFFATTN_UNROLL
      for (int l = 0; l < kPrefetched; ++l) __builtin_prefetch(at + l * PrefetchQueue::kLineBytes, 0, 2);
      block.steps();
    }
    groups -= n;
    prefetch.skip(n * kPrefetched);
  }
  for (; groups > 0; --groups) block.steps();
  if constexpr (kSteps > 1) {
    for (int64_t p = depth / kSteps * kSteps; p < depth; ++p) {
      block.step(0);
      block.scalars.advance(1);
    }
  }
  auto& acc = block.acc[0];
  if constexpr (block.kChains == 2) {
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] += block.acc[1][r][v];
    }
  }
  auto at = edge.at(row, col);
  if (edge.whole(col + V * kLanes)) {
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r, at.next_row()) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v) at.template finish<true>(v, acc[r][v]);
    }
  } else {
    EFFATTN_UNROLL
    for (int r = 0; r < R; ++r, at.next_row()) {
      EFFATTN_UNROLL
      for (int v = 0; v < V; ++v)
        v + 1 < V ? at.template finish<true>(v, acc[r][v]) : at.template finish<false>(v, acc[r][v]);
    }
  }
}

// Rows from `row` on, in blocks of R and of ever smaller ones for the rest.
template <int R, int V, class Scalars, class T, bool Relu, class Edge>
EFFATTN_INLINE void product_rows(int64_t row, int64_t rows, Scalars a, Vectors<T, Relu> b, int64_t depth,
                                 int64_t col, const Edge& edge, PrefetchQueue& prefetch) {
  for (; row + R <= rows; row += R) product_block<R, V>(a, b, depth, row, col, edge, prefetch);
  if constexpr (R > 1) product_rows<R / 2, V>(row, rows, a, b, depth, col, edge, prefetch);
}

// `edge.at(row, col)` walks down the result, row by row: start(v) gives the initial value of its vth vector
// from col on, finish<Whole>(v, acc) takes the result. `edge.whole(end)` tells whether columns up to `end`
// may be written as whole vectors. `cols` counts floats and is rounded up to whole vectors. Lines of
// `prefetch` are asked for from along the way.
template <int Rows = kRows, class Scalars, class T, bool Relu, class Edge>
inline void product(int64_t rows, int64_t cols, Scalars a, Vectors<T, Relu> b, int64_t depth,
                    const Edge& edge, PrefetchQueue& prefetch) {
  for (int64_t col = 0, width; col < cols; col += width * kLanes) {
    const int64_t vectors = (cols - col + kLanes - 1) / kLanes;
    // Four are two and two: a single vector has too few sums under way to hide the latency of an addition.
    width = vectors == 4 ? 2 : min(vectors, 3);
    if (width == 3) {
      product_rows<Rows, 3>(0, rows, a, b, depth, col, edge, prefetch);
    } else if (width == 2) {
      product_rows<Rows, 2>(0, rows, a, b, depth, col, edge, prefetch);
    } else {
      product_rows<Scalars::kMaxRows, 1>(0, rows, a, b, depth, col, edge, prefetch);
    }
  }
}

// Without anything to prefetch.
template <int Rows = kRows, class Scalars, class T, bool Relu, class Edge>
inline void product(int64_t rows, int64_t cols, Scalars a, Vectors<T, Relu> b, int64_t depth,
                    const Edge& edge) {
  PrefetchQueue nothing;
  product<Rows>(rows, cols, a, b, depth, edge, nothing);
}

// Calls f(offset, count) for whole vectors of a tile's tokens. The last one may reach back over tokens that
// are done, even of the tile before, and does them again.
template <class F>
EFFATTN_INLINE void in_whole_vectors(int64_t tokens, const F& f) {
  const int64_t whole = tokens / kLanes * kLanes;
  if (whole > 0) f(0, whole);
  if (whole < tokens) f(tokens - kLanes, kLanes);
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

// Where a product goes: rounded to T, after an epilogue, whose at(row, col) gives the initial vectors of a
// row and what is done to its results. With Padded, columns behind the last may be written.
template <class T, class Epilogue, bool Padded = false>
struct StoreTo {
  T* data;
  int64_t row_stride;
  Epilogue epilogue = {};
  int64_t cols = 0;

  struct Row : RowPointer<T> {
    typename Epilogue::Row epilogue;
    int64_t cols;  // from here on
    EFFATTN_INLINE Vec start(int v) const { return epilogue.start(v); }
    template <bool Whole>
    EFFATTN_INLINE void finish(int v, Vec acc) const {
      T* const to = this->at + v * kLanes;
      if constexpr (Whole || Padded) {
        store(to, epilogue(v, acc, to));
      } else {
        store_first(to, epilogue(v, acc, to), cols - v * kLanes);
      }
    }
    EFFATTN_INLINE void next_row() {
      RowPointer<T>::next_row();
      epilogue.next_row();
    }
  };
  EFFATTN_INLINE Row at(int64_t row, int64_t col) const {
    return {{data + row * row_stride + col, row_stride}, epilogue.at(row, col), cols - col};
  }
  EFFATTN_INLINE bool whole(int64_t end) const { return Padded || end <= cols; }
};
template <class Epilogue>
using StorePadded = StoreTo<float, Epilogue, true>;

struct NoEpilogue {
  struct Row {
    EFFATTN_INLINE Vec start(int) const { return Vec{}; }
    EFFATTN_INLINE Vec operator()(int, Vec acc, const void*) const { return acc; }
    EFFATTN_INLINE void next_row() {}
  };
  EFFATTN_INLINE Row at(int64_t, int64_t) const { return {}; }
};
using WriteTo = StorePadded<NoEpilogue>;

// Adds to what stands there. At the end: sums of few terms, then a sum of sums, lose less to rounding than
// one long sum.
struct Adding {
  struct Row : NoEpilogue::Row {
    EFFATTN_INLINE Vec operator()(int, Vec acc, const float* to) const { return load(to) + acc; }
  };
  EFFATTN_INLINE Row at(int64_t, int64_t) const { return {}; }
};
using AddTo = StorePadded<Adding>;

// Starts at a bias, a number a row or a column.
template <bool PerRow>
struct Biased {
  const float* bias;

  struct Row : NoEpilogue::Row {
    const float* bias;
    EFFATTN_INLINE Vec start(int v) const { return PerRow ? broadcast(*bias) : load(bias + v * kLanes); }
    EFFATTN_INLINE void next_row() {
      if constexpr (PerRow) ++bias;
    }
  };
  EFFATTN_INLINE Row at(int64_t row, int64_t col) const { return {{}, bias + (PerRow ? row : col)}; }
};

// Times a factor a row or a column.
template <bool PerRow>
struct Scaled {
  const float* factors;

  struct Row : NoEpilogue::Row {
    const float* factors;
    EFFATTN_INLINE Vec operator()(int v, Vec acc, const void*) const {
      return acc * (PerRow ? broadcast(*factors) : load(factors + v * kLanes));
    }
    EFFATTN_INLINE void next_row() {
      if constexpr (PerRow) ++factors;
    }
  };
  EFFATTN_INLINE Row at(int64_t row, int64_t col) const { return {{}, factors + (PerRow ? row : col)}; }
};

}  // namespace effattn::cpu::EFFATTN_ISA
