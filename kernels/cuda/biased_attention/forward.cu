// EfficientFormer's attention, forward.
#include "../core/limits.h"
#include "logits.h"

namespace effattn::cuda {
namespace biased {
namespace {

const RegisteredOperator registered("biased_attention", {});

// out = weights v, of all heads of a block, in float32.
EFFATTN_DEVICE void weighted_values(const Args& p, const TileCoord& at, const float* weights) {
  float* const sums = staged_queries(p);
  float* const values = staged_keys(p);
  for (int head = 0; head < p.heads_per_block; ++head) {
    const auto v = head_of<const float>(p.v, at.batch, at.head + head, p.keys, p.value_dim);
    const auto out = head_of<float>(p.out, at.batch, at.head + head, p.queries, p.value_dim);
    const float* const of_head = weights + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < p.value_dim; first += kTileChannels) {
      const int cols = min(kTileChannels, p.value_dim - first);
      for (int key0 = 0; key0 < max(p.keys, 1); key0 += p.staged_keys) {
        const int count = min(p.staged_keys, p.keys - key0);
        stage_tile<kThreads>(v, key0, count, first, cols, values, p.staged_stride);
        sync_block();
        products(
            kWarps, 1, p.rows, cols, count,
            [&](int, int row, int key) { return of_head[row * int64_t{p.stride} + key0 + key]; },
            [&](int, int key, int c) { return values[key * p.staged_stride + c]; },
            [&](int, int row, int c, float x) {
              float& sum = sums[row * p.staged_stride + c];
              sum = key0 == 0 ? x : sum + x;
            });
        sync_block();
      }
      unstage_tile<kThreads>(sums, p.staged_stride, out, at.query, p.rows, first, cols);
      sync_block();
    }
  }
}

// --- weights times values of a narrow type ----------------------------------------------------------

// Rows of logits, a warp a row, to e^(logit - the largest of the row), in words of two parts; at the end of
// each stands what makes them its softmax as a factor (factor_of_row). Where all are -infinity it is NaN.
EFFATTN_DEVICE void exponentials(float* logits, int rows, int keys, int stride) {
  for (int row = warp_index(); row < rows; row += kWarps) {
    float* const at = logits + static_cast<int64_t>(row) * stride;
    const float largest = row_max(at, keys);
    float total = 0;
    for (int key = lane_index(); key < keys; key += kLanes) {
      const float x = exponential(at[key] - largest);
      total += x;
      at[key] = split_word(x);
    }
    total = warp_sum(total);
    // Without keys there is nothing to multiply.
    if (lane_index() == 0) at[stride - 1] = keys > 0 ? 1 / total : 0.0f;
  }
}
EFFATTN_DEVICE float factor_of_row(const float* row, int stride) { return row[stride - 1]; }

template <class T>
EFFATTN_DEVICE NarrowTile<kPartsOf<T>> staged_values(const Args& p) {
  return {staged_keys<uint16_t>(p), p.staged_stride, p.staged_keys * p.staged_stride};
}
// Some keys and channels of a head's values.
template <class T>
EFFATTN_DEVICE void stage_values(const Args& p, const TileCoord& at, int head, int key0, int first) {
  const auto v = head_of<const T>(p.v, at.batch, at.head + head, p.keys, p.value_dim);
  stage_narrow<kThreads>(v, key0, whole_steps(min(p.staged_keys, p.keys - key0)), first,
                         min(kNarrowValues, p.value_dim - first), staged_values<T>(p));
  cp_async_commit();
}

// out = weights v, of all heads of a block, the weights in words of two parts. What is first of the values is
// staged.
template <class T>
EFFATTN_DEVICE void weighted_narrow_values(const Args& p, const TileCoord& at, const float* weights) {
  bool is_staged = true;
  for (int head = 0; head < p.heads_per_block; ++head) {
    const auto out = head_of<T>(p.out, at.batch, at.head + head, p.queries, p.value_dim);
    const float* const of_head = weights + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < p.value_dim; first += kNarrowValues) {
      const int cols = min(kNarrowValues, p.value_dim - first);
      const WarpTile tile(p.rows, cols);
      NarrowSums<kMaxGroups> sums;
      // Where keys are so many that a chain ends before the last one, a block has 16 rows, a warp one group.
      NarrowSums<1> total;
      sums.clear();
      total.clear();
      for (int key0 = 0, depth = 0; key0 < p.keys; key0 += p.staged_keys) {
        if (!is_staged) stage_values<T>(p, at, head, key0, first);
        is_staged = false;
        cp_async_wait<0>();
        sync_block();
        const int count = min(p.staged_keys, p.keys - key0);
        if ((depth += count) > kNarrowDepth) {
          sums.add_to(total);
          depth = count;
        }
        sums.multiply_add<T>(SplitRows(of_head + key0, p.stride, tile.row, p.rows),
                             TileOperand<kPartsOf<T>, false, true>(staged_values<T>(p), tile.col),
                             tile.groups, count);
        sync_block();
      }
      total.add_to(sums);
      store_sums(sums, tile, out, at.query, p.rows, first, cols, [&](int row) {
        return p.has_talking_heads() ? 1.0f : factor_of_row(of_head + row * int64_t{p.stride}, p.stride);
      });
    }
  }
}

template <class T, bool kSpills>
EFFATTN_KERNEL(kThreads, 4)
attend(EFFATTN_PARAMETERS(Args) p) {
  float* const first = buffer<kSpills>(p, 0);
  const TalkingHeads<const float> mix = shared_mix(p);
  for (int64_t index = block_index(); index < p.count; index += p.blocks) {
    const TileCoord at(p, index);
    pairs<T>(p, at, {p.q, p.k, p.head_dim, p.scale, p.bias, first});
    // The values are prefetched behind the softmax.
    if constexpr (kIsNarrow<T>) stage_values<T>(p, at, 0, 0, 0);
    sync_block();
    if (p.has_talking_heads()) {
      float* const second = buffer<kSpills>(p, 1);
      mix_heads(p, mix.logits, mix.logits_bias, false, first, second);
      sync_block();
      softmax_rows(kWarps, second, p.heads_per_block * p.rows, p.keys, p.stride);
      sync_block();
      mix_heads<kIsNarrow<T>>(p, mix.weights, mix.weights_bias, false, second, first);
    } else if constexpr (kIsNarrow<T>) {
      exponentials(first, p.rows, p.keys, p.stride);
    } else {
      softmax_rows(kWarps, first, p.rows, p.keys, p.stride);
    }
    sync_block();
    if constexpr (kIsNarrow<T>) {
      weighted_narrow_values<T>(p, at, first);
    } else {
      weighted_values(p, at, first);
    }
  }
}

}  // namespace
}  // namespace biased

void biased_attention(const BiasedAttentionParams& params, const Execution& execution) {
  using namespace biased;
  const int buffers = params.heads.talking() ? 2 : 1;
  Args p = args_of(params, buffers, false, execution);
  p.out = view_of(params, params.out);
  with_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    launch(p.spilled_buffers > 0 ? attend<T, true> : attend<T, false>, grid_of(p), execution, p);
  });
}

}  // namespace effattn::cuda
