// Tiles of 16-bit elements in shared memory, for products on tensor cores (narrow_product.h).
//
// Tensors of a 16-bit type lie there as they are; float32 numbers, and float16 ones that are multiplied with
// such, in two parts of bfloat16, split once when they are placed.
#pragma once

#include "fragment.h"
#include "mma.h"

namespace effattn::cuda {

// Tiles are padded with zeros to multiples of this: the depth of a product's step.
constexpr int kNarrowStep = 16;
EFFATTN_INLINE constexpr int whole_steps(int count) {
  return (count + kNarrowStep - 1) / kNarrowStep * kNarrowStep;
}
// Elements from row to row: an odd multiple of 16 bytes, so that eight rows meet in no bank.
EFFATTN_INLINE constexpr int narrow_stride(int cols) { return whole_steps(cols) + 8; }

// kParts: 2 where an element is the sum of two of bfloat16; the low one lies `part` elements behind the high
// one.
template <int kParts>
struct NarrowTile {
  uint16_t* data;
  int stride, part;

  EFFATTN_DEVICE static NarrowTile in(char* shared, int rows, int cols) {
    const int stride = narrow_stride(cols);
    return {reinterpret_cast<uint16_t*>(shared), stride, rows * stride};
  }
  EFFATTN_INLINE static constexpr int64_t bytes(int rows, int cols) {
    return int64_t{2} * kParts * rows * narrow_stride(cols);
  }

  EFFATTN_DEVICE uint16_t* at(int row, int col) const { return data + (row * stride + col); }
  // Neighbours in a row, from an even column on.
  template <class T, int kCount>
  EFFATTN_DEVICE void put(int row, int col, const Packed<T, kCount>& x) const {
    if constexpr (kParts == 2) {
      put_pairs<kCount>(at(row, col), [&](int i) { return x.get(i); });
    } else {
      static_assert(kIsNarrow<T>);
      x.template store<2 * kCount>(reinterpret_cast<T*>(at(row, col)));
    }
  }
  EFFATTN_DEVICE void put(int row, int col, float first, float second) const {
    put_pairs<2>(at(row, col), [&](int i) { return i == 0 ? first : second; });
  }
  // kCount neighbours, get(i) of each, where there are two parts.
  template <int kCount, class Get>
  EFFATTN_DEVICE void put_pairs(uint16_t* to, Get get) const {
    static_assert(kParts == 2);
    Words<kCount / 2> high, low;
    EFFATTN_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      const BFloat16Parts parts = split_bf16(get(2 * i), get(2 * i + 1));
      high.words[i] = parts.high;
      low.words[i] = parts.low;
    }
    store_words(to, high);
    store_words(to + part, low);
  }
  EFFATTN_DEVICE void put(int row, int col, float x) const {
    static_assert(kParts == 2);
    const BFloat16Parts parts = split_bf16(x, 0);
    *at(row, col) = static_cast<uint16_t>(parts.high);
    at(row, col)[part] = static_cast<uint16_t>(parts.low);
  }

  // What a lane gives ldmatrix_x4 of 16 x 16 elements from a row and a column on: as the first operand of a
  // product, whose rows the tile holds, or as the second, whose columns it holds. kDepthDown: the depth of
  // the product goes down the rows of the tile, else along them.
  template <bool kIsFirst, bool kDepthDown>
  EFFATTN_DEVICE uint16_t* lane_row(int row, int col) const {
    // Of the four 8 x 8 matrices, the second lies below the first, or beside it.
    constexpr bool below = kIsFirst != kDepthDown;
    const int lane = lane_index();
    return at(row + (below ? lane % 16 : lane / 16 * 8 + lane % 8),
              col + (below ? lane / 16 * 8 : lane / 8 % 2 * 8));
  }
  template <bool kIsFirst, bool kDepthDown>
  EFFATTN_DEVICE void load(SplitOperand& x, int row, int col) const {
    static_assert(kParts == 2);
    const uint16_t* const from = lane_row<kIsFirst, kDepthDown>(row, col);
    ldmatrix_x4<kDepthDown>(x.parts[0], from);
    ldmatrix_x4<kDepthDown>(x.parts[1], from + part);
  }
  template <bool kDepthDown>
  EFFATTN_DEVICE void load_a(SplitOperand& x, int row, int col) const {
    load<true, kDepthDown>(x, row, col);
  }
  // Registers 0 and 1 are of the first eight columns, 2 and 3 of the others.
  template <bool kDepthDown>
  EFFATTN_DEVICE void load_b(SplitOperand& x, int row, int col) const {
    load<false, kDepthDown>(x, row, col);
  }
};

using SplitTile = NarrowTile<2>;

// f(i, j) for all i below `rows` and j below `cols`, by threads; neighbours have neighbouring j. Without a
// division: some threads have nothing to do where `cols` is no power of two.
template <int kThreads, class F>
EFFATTN_DEVICE void for_each_pair(int rows, int cols, F f) {
  int shift = 0;
  EFFATTN_NOT_UNROLLED
  while (1 << shift < cols) ++shift;
  for (int i = thread_index(); i >> shift < rows; i += kThreads) {
    const int col = i & ((1 << shift) - 1);
    if (col < cols) f(i >> shift, col);
  }
}

// to(row, col) of some rows and columns of a matrix, by all threads of a block; zeros behind its last row,
// and behind `cols` up to whole steps. It is there after cp_async_wait() and a barrier.
template <int kThreads, int kParts, class T>
EFFATTN_DEVICE void stage_narrow(const Matrix<const T>& from, int first_row, int rows, int first_col,
                                 int cols, const NarrowTile<kParts>& to) {
  constexpr int vector = kVector<T>;
  const bool along_cols = from.col_stride == 1;
  const int whole =
      along_cols && from.access == 16 && first_col % vector == 0 ? cols / vector : 0;  // of a row, vectors
  if (whole > 0) {
    for_each_pair<kThreads>(rows, whole, [&](int row, int i) {
      const bool inside = first_row + row < from.rows;
      const T* const at =
          from.data + (inside ? first_row + row : 0) * from.row_stride + first_col + i * vector;
      if constexpr (kParts == 1) {
        cp_async_16(to.at(row, i * vector), at, inside);
      } else {
        Packed<T, vector> packed{};
        if (inside) packed.template load<16>(at);
        to.put(row, i * vector, packed);
      }
    });
  }
  const int done = whole * vector, pairs = (whole_steps(cols) - done) / 2;
  const auto pair = [&](int row, int i) {
    Packed<T, 2> packed{};
    const int col = done + 2 * i;
    const T* const at = from.data + (first_row + row) * from.row_stride + (first_col + col) * from.col_stride;
    EFFATTN_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (first_row + row >= from.rows || col + e >= cols) continue;
      if constexpr (kIsNarrow<T>) {
        packed.set_bits(e, at[e * from.col_stride].bits);
      } else {
        packed.set(e, at[e * from.col_stride]);
      }
    }
    to.put(row, col, packed);
  };
  // Neighbouring threads read what lies together.
  if (along_cols) {
    for_each_pair<kThreads>(rows, pairs, pair);
  } else {
    for_each_pair<kThreads>(pairs, rows, [&](int i, int row) { pair(row, i); });
  }
}

}  // namespace effattn::cuda
