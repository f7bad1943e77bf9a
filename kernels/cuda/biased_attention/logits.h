// What forward and backward of EfficientFormer's attention share.
//
// A block takes some queries of a head, or of all heads with talking heads, and has all their logits in
// shared memory: no running maximum, and mixing heads is a sum over what lies there. What does not fit is in
// workspace of the block's own.
//
// Narrow types multiply as they are, or with float32 in two parts of bfloat16 (narrow_product.h); float32
// does in TF32.
#pragma once

#include "../core/float_tile.h"
#include "../core/launch.h"
#include "../core/narrow_product.h"
#include "../core/tensors.h"
#include "api.h"

namespace effattn::cuda::biased {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;
constexpr int kMaxQueries = 64;
// Heads whose mixing matrices are in shared memory, at most.
constexpr int kMaxSharedMix = 32;
// Of a tile of keys or values.
constexpr int kMaxStagedBytes = 18 * 1024;
// Channels of narrow values that are staged at once: of 64 rows by so many, a warp has 16 x 64 in registers.
constexpr int kNarrowValues = 64, kMaxGroups = kNarrowValues / kGroupCols;

struct HeadsView {
  HeadsOperand tensor;
  int access;  // bytes at once, of Matrix
};

struct Args {
  HeadsView q, k, v, out;  // out: of the backward grad_out
  const float* bias;
  TalkingHeads<const float> mix;
  float scale;
  int heads, queries, keys, head_dim, value_dim;
  int heads_per_block;
  int rows;    // queries of a block
  int stride;  // of logits in shared memory
  int tiles;
  int64_t count, blocks;  // tiles of all heads and images; a block takes each `blocks`-th
  // Buffers of logits in shared memory; and, of every block, those that do not fit.
  int in_shared, spilled_buffers;
  bool mix_is_shared;
  int staged_keys;                // of a tile of keys or values
  int staged_stride;              // elements from row to row, of that tile and of queries
  int queries_bytes, keys_bytes;  // of staged tiles
  float* spilled;
  // Backward, of all pairs (batch, heads, queries, keys); and of each block, sums for the mixing of heads.
  float *weights, *grad_logits;
  TalkingHeads<float> grad_mix;

  constexpr bool has_talking_heads() const { return mix.logits != nullptr; }
  // Rounded up to what tiles are aligned to.
  constexpr int64_t mix_bytes() const { return mix_is_shared ? (8 * heads * heads + 15) / 16 * 16 : 0; }
  constexpr int64_t buffer() const { return int64_t{heads_per_block} * rows * stride; }
  constexpr int64_t shared_bytes(int buffers) const {
    return mix_bytes() + queries_bytes + keys_bytes + 4 * buffers * buffer();
  }
};

// Shared memory: the matrices of the mixing; a tile of queries, or of the output; a tile of keys or values;
// logits.
template <class Element = float>
EFFATTN_DEVICE Element* staged_queries(const Args& p) {
  return reinterpret_cast<Element*>(shared_memory() + p.mix_bytes());
}
template <class Element = float>
EFFATTN_DEVICE Element* staged_keys(const Args& p) {
  return reinterpret_cast<Element*>(shared_memory() + p.mix_bytes() + p.queries_bytes);
}
// Logits of all pairs of a block, or what becomes of them. Without kSpills the compiler knows that they are
// in shared memory, and addresses them as such.
template <bool kSpills>
EFFATTN_DEVICE float* buffer(const Args& p, int i) {
  if (!kSpills || i < p.in_shared) return reinterpret_cast<float*>(shared_memory() + p.shared_bytes(i));
  return p.spilled + (block_index() * p.spilled_buffers + i - p.in_shared) * p.buffer();
}

// A head of a tensor, a row a token.
template <class T>
EFFATTN_DEVICE Matrix<T> head_of(const HeadsView& view, int64_t batch, int64_t head, int tokens,
                                 int channels) {
  const HeadsOperand& t = view.tensor;
  return {static_cast<T*>(t.data) + batch * t.batch_stride + head * t.head_stride,
          t.token_stride,
          t.channel_stride,
          tokens,
          channels,
          view.access};
}

// Of a factor of numbers in two parts: float16 has more bits than one part.
template <class T>
constexpr int kPartsOf = std::is_same_v<T, BFloat16> ? 1 : 2;

// What a block works on.
struct TileCoord {
  int64_t batch;
  int head, query;

  EFFATTN_DEVICE TileCoord(const Args& p, int64_t index) {
    const int groups = p.heads / p.heads_per_block;
    const int64_t group = index / p.tiles;
    query = static_cast<int>(index % p.tiles) * p.rows;
    head = static_cast<int>(group % groups) * p.heads_per_block;
    batch = group / groups;
  }
};

// Where a row of a tile begins in what there is for all pairs of an image.
EFFATTN_DEVICE int64_t row_of_pairs(const Args& p, const TileCoord& at, int head, int row) {
  return (static_cast<int64_t>(at.head + head) * p.queries + at.query + row) * p.keys;
}

// to[row][key] of each head = factor (sum of a b^T over the channels) + bias[row][key] of that head, 0 behind
// the last query; the bias may be null.
struct Pairs {
  const HeadsView &of_queries, &of_keys;
  int channels;
  float factor;
  const float* bias;
  float* to;
};

EFFATTN_DEVICE void pairs_of_floats(const Args& p, const TileCoord& at, const Pairs& of) {
  float* const queries = staged_queries(p);
  float* const keys = staged_keys(p);
  for (int head = 0; head < p.heads_per_block; ++head) {
    const auto a = head_of<const float>(of.of_queries, at.batch, at.head + head, p.queries, of.channels);
    const auto b = head_of<const float>(of.of_keys, at.batch, at.head + head, p.keys, of.channels);
    float* const to = of.to + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < max(of.channels, 1); first += kTileChannels) {
      const int cols = min(kTileChannels, of.channels - first);
      const bool is_last = first + kTileChannels >= of.channels;
      stage_tile<kThreads>(a, at.query, p.rows, first, cols, queries, p.staged_stride);
      for (int key0 = 0; key0 < p.keys; key0 += p.staged_keys) {
        const int count = min(p.staged_keys, p.keys - key0);
        stage_tile<kThreads>(b, key0, count, first, cols, keys, p.staged_stride);
        sync_block();
        products(
            kWarps, 1, p.rows, count, cols,
            [&](int, int row, int c) { return queries[row * p.staged_stride + c]; },
            [&](int, int c, int key) { return keys[key * p.staged_stride + c]; },
            [&](int, int row, int key, float x) {
              float& pair = to[row * int64_t{p.stride} + key0 + key];
              const float sum = first == 0 ? x : pair + x;
              if (!is_last) {
                pair = sum;
              } else if (at.query + row < p.queries) {
                const int64_t of_pair = row_of_pairs(p, at, head, row) + key0 + key;
                pair = of.factor * sum + (of.bias == nullptr ? 0.0f : of.bias[of_pair]);
              } else {
                pair = 0;
              }
            });
        sync_block();
      }
    }
  }
}

// The same of a narrow type. Behind the last key too there is 0, up to whole steps.
template <class T>
EFFATTN_DEVICE void pairs_of_narrow(const Args& p, const TileCoord& at, const Pairs& of) {
  if (p.keys == 0) return;  // or nobody would wait for the queries
  constexpr int groups = 2, warp_cols = groups * kGroupCols;
  const NarrowTile<1> queries{staged_queries<uint16_t>(p), p.staged_stride, 0};
  const NarrowTile<1> keys{staged_keys<uint16_t>(p), p.staged_stride, 0};
  for (int head = 0; head < p.heads_per_block; ++head) {
    const auto a = head_of<const T>(of.of_queries, at.batch, at.head + head, p.queries, of.channels);
    const auto b = head_of<const T>(of.of_keys, at.batch, at.head + head, p.keys, of.channels);
    float* const to = of.to + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < max(of.channels, 1); first += kTileChannels) {
      const int cols = min(kTileChannels, of.channels - first);
      stage_narrow<kThreads>(a, at.query, p.rows, first, cols, queries);
      for (int key0 = 0; key0 < p.keys; key0 += p.staged_keys) {
        const int count = min(p.staged_keys, p.keys - key0);
        stage_narrow<kThreads>(b, key0, count, first, cols, keys);
        cp_async_commit();
        const int across = (count + warp_cols - 1) / warp_cols;
        const int tiles = (p.rows + kTileRows - 1) / kTileRows * across;
        for (int tile0 = 0; tile0 < tiles; tile0 += kWarps) {
          const int tile = tile0 + warp_index();
          const int row = tile / across * kTileRows, col = tile % across * warp_cols;
          const int there = tile < tiles ? min(groups, whole_steps(count - col) / kGroupCols) : 0;
          // What is added to the products: the bias, or what the channels before these gave. It is asked for
          // before they are multiplied, and of the first tile while the operands still come.
          NarrowSums<groups> sums, added;
          const auto add = [&](const float* source, auto begin_of_row) {
            added.fill(row, col, there, [&](int r) {
              const bool inside = source != nullptr && r < p.rows && at.query + r < p.queries;
              return [=, begin = key0 + begin_of_row(r), last = inside ? count : 0](int key) {
                return key < last ? source[begin + key] : 0.0f;
              };
            });
          };
          if (first == 0) {
            add(of.bias, [&](int r) { return row_of_pairs(p, at, head, r); });
          } else {
            add(of.to, [&](int r) { return (static_cast<int64_t>(head) * p.rows + r) * p.stride; });
          }
          if (tile0 == 0) {
            cp_async_wait<0>();
            sync_block();
          }
          if (there == 0) continue;
          sums.clear();
          sums.multiply_add<T>(TileOperand<1, true, false>(queries, row),
                               TileOperand<1, false, false>(keys, col), there, cols);
          sums.each_pair(added, row, col, there, [&](int r) {
            float* const of_row = to + r * int64_t{p.stride} + key0;
            return [&, of_row, r, last = at.query + r < p.queries ? count : 0](int key, const float (&x)[2],
                                                                               const float (&add)[2]) {
              if (r >= p.rows) return;
              store_words(of_row + key, Words<2>{{bits_of(key < last ? of.factor * x[0] + add[0] : 0),
                                                  bits_of(key + 1 < last ? of.factor * x[1] + add[1] : 0)}});
            };
          });
        }
        sync_block();
      }
    }
  }
}

template <class T>
EFFATTN_DEVICE void pairs(const Args& p, const TileCoord& at, const Pairs& of) {
  if constexpr (kIsNarrow<T>) {
    pairs_of_narrow<T>(p, at, of);
  } else {
    pairs_of_floats(p, at, of);
  }
}

// to_g = sum over h of matrix(g, h) from_h + bias_g, of all pairs of a block; the matrix may be transposed,
// the bias null. Some g at a time, so that what is read of from_h is used for all of them. kSplit: to words
// of two parts.
template <bool kSplit = false>
EFFATTN_DEVICE void mix_heads(const Args& p, const float* matrix, const float* bias, bool transposed,
                              const float* from, float* to) {
  constexpr int kAtATime = 4;
  const int64_t one = int64_t{p.rows} * p.stride;
  const int row = transposed ? 1 : p.heads, col = transposed ? p.heads : 1;
  for_each<kThreads>(p.rows * p.keys, [&](int i) {
    const int64_t pair = i / p.keys * int64_t{p.stride} + i % p.keys;
    for (int first = 0; first < p.heads; first += kAtATime) {
      float total[kAtATime];
      EFFATTN_UNROLL
      for (int e = 0; e < kAtATime; ++e) {
        total[e] = bias != nullptr && first + e < p.heads ? bias[first + e] : 0.0f;
      }
      for (int h = 0; h < p.heads; ++h) {
        const float x = from[h * one + pair];
        EFFATTN_UNROLL
        for (int e = 0; e < kAtATime; ++e) {
          if (first + e < p.heads) total[e] += matrix[(first + e) * row + h * col] * x;
        }
      }
      EFFATTN_UNROLL
      for (int e = 0; e < kAtATime; ++e) {
        if (first + e < p.heads) to[(first + e) * one + pair] = kSplit ? split_word(total[e]) : total[e];
      }
    }
  });
}

// The matrices of the mixing in shared memory.
EFFATTN_DEVICE TalkingHeads<const float> shared_mix(const Args& p) {
  TalkingHeads<const float> mix = p.mix;
  if (!p.mix_is_shared) return mix;
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int one = p.heads * p.heads;
  for_each<kThreads>(one, [&](int i) {
    shared[i] = mix.logits[i];
    shared[one + i] = mix.weights[i];
  });
  sync_block();
  mix.logits = shared;
  mix.weights = shared + one;
  return mix;
}

// What a warp has of 64 rows and as many columns, or of fewer rows.
struct WarpTile {
  int row, col, groups;

  EFFATTN_DEVICE WarpTile(int rows, int cols) {
    const int down = (rows + kTileRows - 1) / kTileRows;  // 1, 2 or 4
    row = warp_index() % down * kTileRows;
    col = warp_index() / down * (down * kGroupCols);
    groups = min(down, whole_steps(cols - col) / kGroupCols);
  }
};

// Rows and columns of a matrix from some on = what a warp has of a product, times factor(row).
template <class T, class F>
EFFATTN_DEVICE void store_sums(const NarrowSums<kMaxGroups>& sums, const WarpTile& tile, const Matrix<T>& to,
                               int first_row, int rows, int first_col, int cols, F factor) {
  const bool by_pairs = to.col_stride == 1 && to.access == 16;
  sums.each_pair(tile.row, tile.col, tile.groups, [&](int row) {
    const bool inside = row < rows && first_row + row < to.rows;
    T* const of_row = to.data + (first_row + row) * to.row_stride + first_col * to.col_stride;
    return [=, scale = inside ? factor(row) : 0.0f](int col, const float (&x)[2]) {
      if (!inside) return;
      T* const place = of_row + col * to.col_stride;
      if (by_pairs && col + 1 < cols) {
        store_words(place, Words<1>{{pack<T>(scale * x[0], scale * x[1])}});
      } else {
        if (col < cols) place[0] = from_float<T>(scale * x[0]);
        if (col + 1 < cols) place[to.col_stride] = from_float<T>(scale * x[1]);
      }
    };
  });
}

// --- launches ---------------------------------------------------------------------------------------

inline HeadsView view_of(const BiasedAttentionParams& params, const HeadsOperand& t) {
  const bool by_channels = t.channel_stride == 1;
  const int64_t step = by_channels ? t.token_stride : t.channel_stride;
  const bool is_aligned = alignment(t.data, {t.batch_stride, t.head_stride, step}, params.dtype) == 16;
  return {t, is_aligned && (by_channels || t.token_stride == 1) ? 16 : 0};
}

inline Args args_of(const BiasedAttentionParams& params, int buffers, bool is_backward,
                    const Execution& execution) {
  const SoftmaxHeads& heads = params.heads;
  Args p{};
  for (const int64_t size : {heads.heads, heads.queries, heads.keys, heads.head_dim, heads.value_dim}) {
    require(size <= INT32_MAX / 64, "sizes must be below 2^25, got ", size);
  }
  p.q = view_of(params, params.q);
  p.k = view_of(params, params.k);
  p.v = view_of(params, params.v);
  p.bias = heads.bias;
  p.mix = heads.mix;
  p.scale = heads.softmax_scale;
  p.heads = static_cast<int>(heads.heads);
  p.queries = static_cast<int>(heads.queries);
  p.keys = static_cast<int>(heads.keys);
  p.head_dim = static_cast<int>(heads.head_dim);
  p.value_dim = static_cast<int>(heads.value_dim);
  p.heads_per_block = p.has_talking_heads() ? p.heads : 1;
  p.mix_is_shared = p.has_talking_heads() && p.heads <= kMaxSharedMix;
  p.rows = kMaxQueries;
  while (p.rows > 1 && p.rows / 2 >= p.queries) p.rows /= 2;
  const bool is_narrow = params.dtype != DType::kFloat32;
  p.stride = is_narrow ? SplitRows::stride(p.keys) : shared_stride(p.keys);
  // Values are multiplied with grad_out in the backward, as keys are with queries.
  const int max_values = is_narrow && !is_backward ? kNarrowValues : kTileChannels;
  const int channels = max(1, max(min(kTileChannels, p.head_dim), min(max_values, p.value_dim)));
  p.staged_stride = is_narrow ? narrow_stride(channels) : shared_stride(channels);
  const int element_bytes = is_narrow ? 2 : 4;
  const int parts = params.dtype == DType::kFloat16 && !is_backward ? kPartsOf<Float16> : 1;
  const int key_bytes = parts * element_bytes * p.staged_stride;
  p.staged_keys =
      max(kTileRows, min(kMaxStagedBytes / key_bytes / kTileRows * kTileRows, whole_steps(p.keys)));
  p.keys_bytes = p.staged_keys * key_bytes;
  const auto take_rows = [&](int rows) {
    p.rows = rows;
    p.queries_bytes = element_bytes * p.staged_stride * (is_narrow ? whole_steps(rows) : rows);
  };
  take_rows(p.rows);
  const auto fits = [&](int count) { return p.shared_bytes(count) <= kMaxSharedBytes; };
  // Of more keys than a chain has, more rows would not fit: weighted_narrow_values counts on it.
  static_assert(int64_t{4} * 2 * kTileRows * kNarrowDepth > kMaxSharedBytes);
  // Fewer rows than a product has are no gain.
  while (p.rows > kTileRows && !fits(buffers)) take_rows(p.rows / 2);
  while (p.in_shared < buffers && fits(p.in_shared + 1)) ++p.in_shared;
  p.spilled_buffers = buffers - p.in_shared;
  require(int64_t{p.heads_per_block} * p.rows * p.stride <= INT32_MAX,
          "the kernels take fewer than 2^31 logits at a time, got ", p.heads_per_block, " heads of ", p.rows,
          " x ", p.stride);
  p.tiles = static_cast<int>(ceil_div(p.queries, p.rows));
  p.count = p.blocks = params.batch * (p.heads / max(p.heads_per_block, 1)) * p.tiles;
  if (p.spilled_buffers > 0) {
    p.blocks = min(p.count, 2 * execution.gpu.multiprocessors);
    p.spilled = execution.workspace(p.blocks * p.spilled_buffers * p.buffer());
  }
  return p;
}

inline Grid grid_of(const Args& p) { return {p.blocks, kThreads, p.shared_bytes(p.in_shared)}; }

}  // namespace effattn::cuda::biased
