// EfficientFormer's attention, backward: weights and gradients of logits of all pairs are written in float32,
// since the gradients of k, v and the bias are sums over other blocks' queries; then multiplied.
#include "../core/reduction.h"
#include "logits.h"

namespace effattn::cuda {
namespace biased {
namespace {

// sums[g][h] of a tile = sum over all pairs of a_g b_h, and vector[g] that of a_g.
EFFATTN_DEVICE void sum_pairs(const Args& p, int64_t index, const float* a, const float* b, float* sums,
                              float* vector) {
  const int64_t one = int64_t{p.rows} * p.stride;
  const auto pair = [&](int k) { return k / p.keys * p.stride + k % p.keys; };
  products(
      kWarps, 1, p.heads, p.heads, p.rows * p.keys, [&](int, int g, int k) { return a[g * one + pair(k)]; },
      [&](int, int k, int h) { return b[h * one + pair(k)]; },
      [&](int, int g, int h, float x) { sums[(index * p.heads + g) * p.heads + h] = x; });
  for (int g = warp_index(); g < p.heads; g += kWarps) {
    float total = 0;
    for (int k = lane_index(); k < p.rows * p.keys; k += kLanes) total += a[g * one + pair(k)];
    total = warp_sum(total);
    if (lane_index() == 0) vector[index * p.heads + g] = total;
  }
}

// Of all pairs of a block to memory.
EFFATTN_DEVICE void keep(const Args& p, const TileCoord& at, const float* from, float* to) {
  for_each<kThreads>(p.heads_per_block * p.rows * p.keys, [&](int i) {
    const int head = i / (p.rows * p.keys), row = i / p.keys % p.rows, key = i % p.keys;
    if (at.query + row >= p.queries) return;
    const int64_t of = (at.batch * p.heads + at.head + head) * p.queries + at.query + row;
    to[of * p.keys + key] = from[(head * p.rows + row) * int64_t{p.stride} + key];
  });
}

template <class T, bool kSpills>
EFFATTN_DEVICE void gradients_of_tile(const Args& p, const TalkingHeads<const float>& mix, int64_t index) {
  const TileCoord at(p, index);
  const int rows = p.heads_per_block * p.rows;
  float* const softmax = buffer<kSpills>(p, 0);
  float* const grad = buffer<kSpills>(p, 1);
  // With talking heads: the logits before the first mixing, and the gradients before the second one's
  // transpose.
  float* const unmixed = p.has_talking_heads() ? buffer<kSpills>(p, 3) : softmax;
  float* const mixed = p.has_talking_heads() ? buffer<kSpills>(p, 2) : grad;
  EFFATTN_NOT_UNROLLED
  for (int i = 0; i < 2; ++i) {
    pairs<T>(p, at,
             i == 0 ? Pairs{p.q, p.k, p.head_dim, p.scale, p.bias, unmixed}
                    : Pairs{p.out, p.v, p.value_dim, 1, nullptr, mixed});  // grad_out v^T
  }
  sync_block();
  if (p.has_talking_heads()) {
    mix_heads(p, mix.logits, mix.logits_bias, false, unmixed, softmax);
    mix_heads(p, mix.weights, nullptr, true, mixed, grad);
    sync_block();
  }
  softmax_rows(kWarps, softmax, rows, p.keys, p.stride);
  sync_block();
  if (p.has_talking_heads()) {
    sum_pairs(p, index, mixed, softmax, p.grad_mix.weights, p.grad_mix.weights_bias);
  } else {
    keep(p, at, softmax, p.weights);
  }
  softmax_rows_backward(kWarps, softmax, grad, rows, p.keys, p.stride);
  sync_block();
  if (!p.has_talking_heads()) return keep(p, at, grad, p.grad_logits);
  mix_heads(p, mix.weights, mix.weights_bias, false, softmax, mixed);
  sum_pairs(p, index, grad, unmixed, p.grad_mix.logits, p.grad_mix.logits_bias);
  sync_block();
  keep(p, at, mixed, p.weights);
  mix_heads(p, mix.logits, nullptr, true, grad, unmixed);
  sync_block();
  keep(p, at, unmixed, p.grad_logits);
}

template <class T, bool kSpills>
EFFATTN_KERNEL(kThreads, 4)
softmax_gradients(EFFATTN_PARAMETERS(Args) p) {
  const TalkingHeads<const float> mix = shared_mix(p);
  for (int64_t index = block_index(); index < p.count; index += p.blocks) {
    gradients_of_tile<T, kSpills>(p, mix, index);
    sync_block();
  }
}

// out = factor matrix x, or of the transposed matrix: (rows, inners) of every head in float32, contiguous.
struct Multiply {
  const float* matrix;
  HeadsView x, out;
  float factor;
  int heads, rows, inners, channels, tiles;
};

constexpr int kMultiplied = 64;  // rows of a block

// In float32, so much is summed over at a time.
constexpr int kInners = 32;
constexpr int kMatrixStride = shared_stride(kInners), kChannelStride = shared_stride(kTileChannels);
// Of narrow types as much as there are rows: the tile of the matrix lies as the matrix does.
constexpr int kNarrowInners = kMultiplied, kNarrowTile = kMultiplied * narrow_stride(kMultiplied);

template <class T>
constexpr int64_t kMultiplyBytes =
    kIsNarrow<T> ? 2 * kNarrowTile * (2 + kPartsOf<T>)
                 : 4 * (kMultiplied * kMatrixStride + (kMultiplied + kInners) * kChannelStride);

template <bool kTransposed>
EFFATTN_DEVICE void multiply_floats(const Multiply& p, const float* data, const Matrix<const float>& x,
                                    const Matrix<float>& out, int row0) {
  float* const matrix = reinterpret_cast<float*>(shared_memory());
  float* const values = matrix + kMultiplied * kMatrixStride;
  float* const sums = values + kInners * kChannelStride;
  const Matrix<const float> from{
      data, kTransposed ? 1 : int64_t{p.inners}, kTransposed ? int64_t{p.rows} : 1, p.rows, p.inners, 0};
  for (int first = 0; first < p.channels; first += kTileChannels) {
    const int cols = min(kTileChannels, p.channels - first);
    for (int inner = 0; inner < max(p.inners, 1); inner += kInners) {
      const int count = min(kInners, p.inners - inner);
      stage_tile<kThreads>(from, row0, kMultiplied, inner, count, matrix, kMatrixStride);
      stage_tile<kThreads>(x, inner, count, first, cols, values, kChannelStride);
      sync_block();
      products(
          kWarps, 1, kMultiplied, cols, count,
          [&](int, int row, int k) { return matrix[row * kMatrixStride + k]; },
          [&](int, int k, int c) { return values[k * kChannelStride + c]; },
          [&](int, int row, int c, float value) {
            float& sum = sums[row * kChannelStride + c];
            sum = (inner == 0 ? 0.0f : sum) + p.factor * value;
          });
      sync_block();
    }
    unstage_tile<kThreads>(sums, kChannelStride, out, row0, kMultiplied, first, cols);
    sync_block();
  }
}

template <class T, bool kTransposed>
EFFATTN_DEVICE void multiply_narrow(const Multiply& p, const float* data, const Matrix<const T>& x,
                                    const Matrix<T>& out, int row0) {
  uint16_t* const shared = reinterpret_cast<uint16_t*>(shared_memory());
  constexpr int stride = narrow_stride(kMultiplied);
  const NarrowTile<2> matrix{shared, stride, kNarrowTile};
  const NarrowTile<kPartsOf<T>> values{shared + 2 * kNarrowTile, stride, kNarrowTile};
  // As it lies in memory.
  const int height = kTransposed ? p.inners : p.rows, width = kTransposed ? p.rows : p.inners;
  const Matrix<const float> from{data, width, 1, height, width, width % 4 == 0 ? 16 : 0};
  for (int first = 0; first < p.channels; first += kNarrowValues) {
    const int cols = min(kNarrowValues, p.channels - first);
    const WarpTile tile(kMultiplied, cols);
    NarrowSums<kMaxGroups> sums, total;
    sums.clear();
    total.clear();
    for (int inner = 0; inner < p.inners; inner += kNarrowInners) {
      const int count = min(kNarrowInners, p.inners - inner), depth = whole_steps(count);
      if constexpr (kTransposed) {
        stage_narrow<kThreads>(from, inner, depth, row0, min(kMultiplied, p.rows - row0), matrix);
      } else {
        stage_narrow<kThreads>(from, row0, kMultiplied, inner, count, matrix);
      }
      stage_narrow<kThreads>(x, inner, depth, first, cols, values);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      if (inner % kNarrowDepth == 0) sums.add_to(total);  // tensor cores truncate: no longer chain of sums
      sums.multiply_add<T>(TileOperand<2, true, kTransposed>(matrix, tile.row),
                           TileOperand<kPartsOf<T>, false, true>(values, tile.col), tile.groups, depth);
      sync_block();
    }
    total.add_to(sums);
    store_sums(sums, tile, out, row0, kMultiplied, first, cols, [&](int) { return p.factor; });
  }
}

template <class T, bool kTransposed>
EFFATTN_KERNEL(kThreads, 4)
multiply_heads(EFFATTN_PARAMETERS(Multiply) p) {
  const int64_t group = block_index() / p.tiles, batch = group / p.heads, head = group % p.heads;
  const int row0 = static_cast<int>(block_index() % p.tiles) * kMultiplied;
  const float* const data = p.matrix + group * p.rows * p.inners;
  const auto x = head_of<const T>(p.x, batch, head, p.inners, p.channels);
  const auto out = head_of<T>(p.out, batch, head, p.rows, p.channels);
  if constexpr (kIsNarrow<T>) {
    multiply_narrow<T, kTransposed>(p, data, x, out, row0);
  } else {
    multiply_floats<kTransposed>(p, data, x, out, row0);
  }
}

}  // namespace
}  // namespace biased

void biased_attention_backward(const BiasedAttentionParams& params, const Execution& execution) {
  using namespace biased;
  const int buffers = params.heads.talking() ? 4 : 2;
  Args p = args_of(params, buffers, true, execution);
  p.out = view_of(params, params.grad_out);
  const int64_t heads = p.heads, one = int64_t{p.heads} * p.queries * p.keys;
  p.weights = execution.workspace(params.batch * one);
  p.grad_logits = execution.workspace(params.batch * one);
  const Grid grid = grid_of(p);
  using Mix = TalkingHeads<float>;
  const PartialSums<Mix> mix(params.grad_mix,
                             {{&Mix::logits, heads * heads},
                              {&Mix::logits_bias, heads},
                              {&Mix::weights, heads * heads},
                              {&Mix::weights_bias, heads}},
                             p.count, execution);
  p.grad_mix = mix.of_parts;
  with_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    launch(p.spilled_buffers > 0 ? softmax_gradients<T, true> : softmax_gradients<T, false>, grid, execution,
           p);
    const auto multiply = [&](const float* matrix, bool transposed, const HeadsView& x,
                              const HeadsOperand& out, int channels, float factor) {
      const int rows = transposed ? p.keys : p.queries;
      const int tiles = static_cast<int>(ceil_div(rows, kMultiplied));
      launch(transposed ? multiply_heads<T, true> : multiply_heads<T, false>,
             {params.batch * heads * tiles, kThreads, kMultiplyBytes<T>}, execution,
             Multiply{matrix, x, view_of(params, out), factor, p.heads, rows, transposed ? p.queries : p.keys,
                      channels, tiles});
    };
    multiply(p.grad_logits, false, p.k, params.grad_q, p.head_dim, p.scale);
    multiply(p.grad_logits, true, p.q, params.grad_k, p.head_dim, p.scale);
    multiply(p.weights, true, p.out, params.grad_v, p.value_dim, 1);
  });
  add_up(p.grad_logits, params.grad_bias, 1, params.batch, one, execution);
  mix.add_up();
}

}  // namespace effattn::cuda
