// Matrices of bfloat16 in shared memory as operands of a warp's products, each number in two parts (pairs.h).
#pragma once

#include "split_float.h"

namespace effattn::cuda {

// Elements from row to row: eight of them by 16 bytes meet in no bank.
EFFATTN_INLINE constexpr int parts_stride(int cols) { return static_cast<int>(round_up(cols, 16)) + 8; }

// One operand of a 16 x 16 step, both parts.
struct Operand16 {
  uint32_t high[4], low[4];
};

struct PartsTile {
  uint16_t* high;
  int stride;
  int low;  // elements from a high part to its low one

  EFFATTN_DEVICE PartsTile(char* shared, int rows, int cols)
      : high(reinterpret_cast<uint16_t*>(shared)), stride(parts_stride(cols)), low(rows * stride) {}
  EFFATTN_INLINE static constexpr int64_t bytes(int rows, int cols) {
    return int64_t{4} * rows * parts_stride(cols);
  }

  EFFATTN_DEVICE void put(int row, int col, float x) const {
    const BFloat16Parts parts = split(x, 0);
    high[row * stride + col] = static_cast<uint16_t>(parts.high);
    high[low + row * stride + col] = static_cast<uint16_t>(parts.low);
  }
  // Of an even column and the next.
  EFFATTN_DEVICE void put_pair(int row, int col, float first, float second) const {
    const BFloat16Parts parts = split(first, second);
    uint16_t* const at = high + (row * stride + col);
    *reinterpret_cast<uint32_t*>(at) = parts.high;
    *reinterpret_cast<uint32_t*>(at + low) = parts.low;
  }

  // As the first operand: rows of the tile are its rows, and columns the depth; with kDepthRows, rows are the
  // depth.
  template <bool kDepthRows>
  EFFATTN_DEVICE void load_a(Operand16& x, int row, int col) const {
    const int lane = lane_index();
    if constexpr (kDepthRows) {
      load<true>(x, row + lane / 16 * 8 + lane % 8, col + lane / 8 % 2 * 8);
    } else {
      load<false>(x, row + lane % 16, col + lane / 16 * 8);
    }
  }
  // As the second: registers 0 and 1 are of its first eight columns, 2 and 3 of the others. Rows of the tile
  // are its columns, and columns the depth; with kDepthRows, rows are the depth.
  template <bool kDepthRows>
  EFFATTN_DEVICE void load_b(Operand16& x, int row, int col) const {
    const int lane = lane_index();
    if constexpr (kDepthRows) {
      load<true>(x, row + lane % 16, col + lane / 16 * 8);
    } else {
      load<false>(x, row + lane / 16 * 8 + lane % 8, col + lane / 8 % 2 * 8);
    }
  }

 private:
  template <bool kTransposed>
  EFFATTN_DEVICE void load(Operand16& x, int row, int col) const {
    const uint16_t* const at = high + (row * stride + col);
    ldmatrix_x4<kTransposed>(x.high, at);
    ldmatrix_x4<kTransposed>(x.low, at + low);
  }
};

// c += a b, 16 x 16 by 16. The low parts' product is 2^-17 of the whole on average, at most 2^-14, and of one
// sign with it: left out, it would be a bias.
EFFATTN_DEVICE void multiply_16(float (&c)[2][4], const Operand16& a, const Operand16& b) {
  EFFATTN_UNROLL
  for (int j = 0; j < 2; ++j) {
    mma_m16n8k16<BFloat16>(c[j], a.low, {b.low[2 * j], b.low[2 * j + 1]});
    mma_m16n8k16<BFloat16>(c[j], a.low, {b.high[2 * j], b.high[2 * j + 1]});
    mma_m16n8k16<BFloat16>(c[j], a.high, {b.low[2 * j], b.low[2 * j + 1]});
    mma_m16n8k16<BFloat16>(c[j], a.high, {b.high[2 * j], b.high[2 * j + 1]});
  }
}

}  // namespace effattn::cuda
