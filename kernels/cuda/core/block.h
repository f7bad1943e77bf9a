// What all threads of a block do: products of matrices that lie anywhere on tensor cores, softmax, sums.
#pragma once

#include "fragment.h"
#include "mma.h"

namespace effattn::cuda {

// Elements whose type is known when a kernel runs: for kernels that do much with each of them.
EFFATTN_DEVICE float element(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(data)[i]);
  return to_float(static_cast<const Float16*>(data)[i]);
}
EFFATTN_DEVICE void set_element(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else if (dtype == DType::kBFloat16) {
    static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(x);
  } else {
    static_cast<Float16*>(data)[i] = from_float<Float16>(x);
  }
}

// Rows of `kFloats` in shared memory so that eight rows by four columns meet in no bank.
EFFATTN_INLINE constexpr int shared_stride(int floats) { return (floats + 7) / 8 * 8 + 4; }

// Tiles of a product that a warp has in registers: wider ones would leave room for half as many blocks.
constexpr int kTileRows = 16, kTileCols = 16;
// Products are summed from zero for so much of the depth: tensor cores round towards zero, and a long sum
// would fall behind.
constexpr int kTileDepth = 64;

// acc += a b over the depth; a(row, k) and b(k, col) are asked for within their bounds only.
template <class A, class B>
EFFATTN_DEVICE void tile_product(float (&acc)[kTileCols / 8][4], int row, int rows, int col, int cols,
                                 int depth, A a, B b) {
  const int g = row_lane(), t = col_lane();
  EFFATTN_NOT_UNROLLED
  for (int begin = 0; begin < depth; begin += kTileDepth) {
    const int end = min(begin + kTileDepth, depth);
    float tile[kTileCols / 8][4] = {};
    EFFATTN_NOT_UNROLLED
    for (int k = begin; k < end; k += 8) {
      const auto of_a = [&](int r, int at) { return r < rows && at < end ? a(r, at) : 0.0f; };
      const float fa[4] = {of_a(row + g, k + t), of_a(row + g + 8, k + t), of_a(row + g, k + t + 4),
                           of_a(row + g + 8, k + t + 4)};
      EFFATTN_UNROLL
      for (int j = 0; j < kTileCols / 8; ++j) {
        const int c = col + 8 * j + g;
        const auto of_b = [&](int at) { return c < cols && at < end ? b(at, c) : 0.0f; };
        const float fb[2] = {of_b(k + t), of_b(k + t + 4)};
        mma_m16n8k8_float<false>(tile[j], fa, fb);
      }
    }
    add_registers(acc, tile);
  }
}

// f(row, col, value) of what a lane has of a tile, within bounds.
template <class F>
EFFATTN_DEVICE void each_of_tile(const float (&acc)[kTileCols / 8][4], int row, int rows, int col, int cols,
                                 F f) {
  EFFATTN_UNROLL
  for (int j = 0; j < kTileCols / 8; ++j) {
    EFFATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int r = row + row_lane() + e / 2 * 8, c = col + 8 * j + 2 * col_lane() + e % 2;
      if (r < rows && c < cols) f(r, c, acc[j][e]);
    }
  }
}

// `count` products of rows x cols: out(i, row, col, sum over k of a(i, row, k) b(i, k, col)). Warps take
// tiles.
template <class A, class B, class Out>
EFFATTN_DEVICE void products(int warps, int count, int rows, int cols, int depth, A a, B b, Out out) {
  const int down = (rows + kTileRows - 1) / kTileRows, across = (cols + kTileCols - 1) / kTileCols;
  for (int tile = warp_index(); tile < count * down * across; tile += warps) {
    const int i = tile / (down * across), row = tile / across % down * kTileRows,
              col = tile % across * kTileCols;
    float acc[kTileCols / 8][4] = {};
    tile_product(
        acc, row, rows, col, cols, depth, [&](int r, int k) { return a(i, r, k); },
        [&](int k, int c) { return b(i, k, c); });
    each_of_tile(acc, row, rows, col, cols, [&](int r, int c, float x) { out(i, r, c, x); });
  }
}

// f(i) for all i below a count, by threads.
template <int kThreads, class F>
EFFATTN_DEVICE void for_each(int count, F f) {
  for (int i = thread_index(); i < count; i += kThreads) f(i);
}

// The same for a count that is known: where it is whole blocks nothing is asked, and three are in flight
// together.
template <int kThreads, int kCount, class F>
EFFATTN_DEVICE void for_each_of(F f) {
  constexpr int kInFlight = 3;
  EFFATTN_NOT_UNROLLED
  for (int begin = 0; begin < kCount; begin += kInFlight * kThreads) {
    EFFATTN_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int at = begin + i * kThreads;
      if (at < kCount && (at + kThreads <= kCount || at + thread_index() < kCount)) f(at + thread_index());
    }
  }
}

EFFATTN_DEVICE float warp_sum(float x) { return sum_of_rows(sum_of_cols(x)); }
EFFATTN_DEVICE float warp_max(float x) {
  EFFATTN_UNROLL
  for (int bits = 1; bits < kLanes; bits *= 2) {
    const float other = shfl_xor(x, bits);
    x = other > x || other != other ? other : x;
  }
  return x;
}

EFFATTN_DEVICE float row_max(const float* row, int count) {
  float largest = -kInfinity;
  for (int i = lane_index(); i < count; i += kLanes) {
    const float x = row[i];
    largest = x > largest || x != x ? x : largest;
  }
  return warp_max(largest);
}

// What all blocks of a cluster have in shared memory at at(number), added up in order: f(number, sum), each
// in one of the blocks.
template <int kThreads, class At, class F>
EFFATTN_DEVICE void cluster_sum(int cluster, int count, At at, F f) {
  sync_cluster();
  for (int i = cluster_rank() * kThreads + thread_index(); i < count; i += cluster * kThreads) {
    const float* const of_block = at(i);
    float total = 0;
    for (int rank = 0; rank < cluster; ++rank) total += load_dsmem(of_block, rank);
    f(i, total);
  }
  sync_cluster();  // nobody may leave while others read
}

// Rows of logits in place to their softmax, a warp a row. Where all are -infinity it is NaN, as torch has it.
EFFATTN_DEVICE void softmax_rows(int warps, float* logits, int rows, int keys, int stride) {
  for (int row = warp_index(); row < rows; row += warps) {
    float* const at = logits + static_cast<int64_t>(row) * stride;
    const float largest = row_max(at, keys);
    float total = 0;
    for (int key = lane_index(); key < keys; key += kLanes) total += at[key] = exponential(at[key] - largest);
    const float inverse = 1 / warp_sum(total);
    for (int key = lane_index(); key < keys; key += kLanes) at[key] *= inverse;
  }
}

// The same rows' gradients in place: of the softmax to those of its logits.
EFFATTN_DEVICE void softmax_rows_backward(int warps, const float* softmax, float* grad, int rows, int keys,
                                          int stride) {
  for (int row = warp_index(); row < rows; row += warps) {
    const int64_t begin = static_cast<int64_t>(row) * stride;
    float along = 0;
    for (int key = lane_index(); key < keys; key += kLanes) along += softmax[begin + key] * grad[begin + key];
    along = warp_sum(along);
    for (int key = lane_index(); key < keys; key += kLanes) {
      grad[begin + key] = softmax[begin + key] * (grad[begin + key] - along);
    }
  }
}

}  // namespace effattn::cuda
