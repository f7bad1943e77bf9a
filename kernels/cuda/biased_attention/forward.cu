// EfficientFormer's attention, forward and backward.
//
// A block takes some queries of a head, or of all heads where they talk to each other, and has all their
// logits in shared memory: no running maximum, and mixing heads is a sum over what lies there. The backward
// writes weights and gradients of logits in float32, since the gradients of k, v and the bias are sums over
// other blocks' queries.
//
// Narrow types multiply as they are, or with float32 numbers in two parts (narrow_products.h); float32 does
// in TF32.
#include "api.h"

#include <string>

#include "../core/float_tile.h"
#include "../core/launch.h"
#include "../core/limits.h"
#include "../core/narrow_product.h"
#include "../core/reduction.h"
#include "../core/tensors.h"

namespace effattn::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;
constexpr int kMostQueries = 64;
// Heads whose mixing is in shared memory, at most.
constexpr int kMostSharedMix = 32;
// Of a tile of keys or values, about.
constexpr int kMostStagedBytes = 18 * 1024;
// Channels of narrow values that are staged at once: of 64 rows by so many, a warp has 16 x 64 in registers.
constexpr int kNarrowValues = 64, kMostGroups = kNarrowValues / kGroupCols;

struct HeadsView {
  HeadsOperand tensor;
  int access;  // bytes at once, of Matrix
};

struct Attention {
  HeadsView q, k, v, out;  // out: of the backward grad_out
  const float* bias;
  TalkingHeads<const float> mix;
  float scale;
  int heads, queries, keys, head_dim, value_dim;
  int together;  // heads of a block
  int rows;      // queries of a block
  int stride;    // of logits in shared memory
  int tiles;
  int64_t count, blocks;  // tiles of all heads and images; a block takes each `blocks`-th
  // Of the buffers of logits those in shared memory; and where the others are, of every block.
  int in_shared, spilled_buffers;
  bool mix_is_shared;
  int staged_keys,
      staged_stride;  // keys of a staged tile; and of it, and of a tile of queries, elements from row to row
  int queries_bytes, keys_bytes;  // of staged tiles
  float* spilled;
  // Backward, of all pairs (batch, heads, queries, keys); and of each block, sums for the mixing of heads.
  float *weights, *grad_logits;
  TalkingHeads<float> grad_mix;

  constexpr bool talk() const { return mix.logits != nullptr; }
  // Rounded up to what tiles are aligned to.
  constexpr int64_t mix_bytes() const { return mix_is_shared ? (8 * heads * heads + 15) / 16 * 16 : 0; }
  constexpr int64_t buffer() const { return int64_t{together} * rows * stride; }
  constexpr int64_t shared_bytes(int buffers) const {
    return mix_bytes() + queries_bytes + keys_bytes + 4 * buffers * buffer();
  }
};

// Shared memory: the matrices of the mixing; a tile of queries, or of the output; a tile of keys or values;
// logits.
template <class Element = float>
EFFATTN_DEVICE Element* staged_queries(const Attention& p) {
  return reinterpret_cast<Element*>(shared_memory() + p.mix_bytes());
}
template <class Element = float>
EFFATTN_DEVICE Element* staged_keys(const Attention& p) {
  return reinterpret_cast<Element*>(shared_memory() + p.mix_bytes() + p.queries_bytes);
}
// Logits of all pairs of a block, or what becomes of them. Without kSpills the compiler knows that they are
// in shared memory, and addresses them as such.
template <bool kSpills>
EFFATTN_DEVICE float* buffer(const Attention& p, int i) {
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
struct Place {
  int64_t batch;
  int head, query;

  EFFATTN_DEVICE Place(const Attention& p, int64_t index) {
    const int groups = p.heads / p.together;
    const int64_t group = index / p.tiles;
    query = static_cast<int>(index % p.tiles) * p.rows;
    head = static_cast<int>(group % groups) * p.together;
    batch = group / groups;
  }
};

// Where a row of a tile begins in what there is for all pairs of an image.
EFFATTN_DEVICE int64_t row_of_pairs(const Attention& p, const Place& at, int head, int row) {
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

EFFATTN_DEVICE void pairs_of_floats(const Attention& p, const Place& at, const Pairs& of) {
  float* const queries = staged_queries(p);
  float* const keys = staged_keys(p);
  for (int head = 0; head < p.together; ++head) {
    const auto a = head_of<const float>(of.of_queries, at.batch, at.head + head, p.queries, of.channels);
    const auto b = head_of<const float>(of.of_keys, at.batch, at.head + head, p.keys, of.channels);
    float* const to = of.to + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < most(of.channels, 1); first += kTileChannels) {
      const int cols = least(kTileChannels, of.channels - first);
      const bool is_last = first + kTileChannels >= of.channels;
      stage_tile<kThreads>(a, at.query, p.rows, first, cols, queries, p.staged_stride);
      for (int key0 = 0; key0 < p.keys; key0 += p.staged_keys) {
        const int count = least(p.staged_keys, p.keys - key0);
        stage_tile<kThreads>(b, key0, count, first, cols, keys, p.staged_stride);
        sync_block();
        products<false, false>(
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
EFFATTN_DEVICE void pairs_of_narrow(const Attention& p, const Place& at, const Pairs& of) {
  if (p.keys == 0) return;  // or nobody would wait for the queries
  constexpr int groups = 2, together = groups * kGroupCols;
  const NarrowTile<1> queries{staged_queries<uint16_t>(p), p.staged_stride, 0};
  const NarrowTile<1> keys{staged_keys<uint16_t>(p), p.staged_stride, 0};
  for (int head = 0; head < p.together; ++head) {
    const auto a = head_of<const T>(of.of_queries, at.batch, at.head + head, p.queries, of.channels);
    const auto b = head_of<const T>(of.of_keys, at.batch, at.head + head, p.keys, of.channels);
    float* const to = of.to + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < most(of.channels, 1); first += kTileChannels) {
      const int cols = least(kTileChannels, of.channels - first);
      stage_narrow<kThreads>(a, at.query, p.rows, first, cols, queries);
      for (int key0 = 0; key0 < p.keys; key0 += p.staged_keys) {
        const int count = least(p.staged_keys, p.keys - key0);
        stage_narrow<kThreads>(b, key0, count, first, cols, keys);
        cp_async_commit();
        const int across = (count + together - 1) / together;
        const int tiles = (p.rows + kTileRows - 1) / kTileRows * across;
        for (int tile0 = 0; tile0 < tiles; tile0 += kWarps) {
          const int tile = tile0 + warp_index();
          const int row = tile / across * kTileRows, col = tile % across * together;
          const int there = tile < tiles ? least(groups, whole_steps(count - col) / kGroupCols) : 0;
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
EFFATTN_DEVICE void pairs(const Attention& p, const Place& at, const Pairs& of) {
  if constexpr (kIsNarrow<T>) {
    pairs_of_narrow<T>(p, at, of);
  } else {
    pairs_of_floats(p, at, of);
  }
}

template <class T>
EFFATTN_DEVICE void logits(const Attention& p, const Place& at, float* to) {
  pairs<T>(p, at, {p.q, p.k, p.head_dim, p.scale, p.bias, to});
}

// to_g = sum over h of matrix(g, h) from_h + bias_g, of all pairs of a block; the matrix may be transposed,
// the bias null. Some g at a time, so that what is read of from_h is used for all of them. kSplit: to words
// of two parts.
template <bool kSplit = false>
EFFATTN_DEVICE void mix_heads(const Attention& p, const float* matrix, const float* bias, bool transposed,
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
EFFATTN_DEVICE TalkingHeads<const float> shared_mix(const Attention& p) {
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

// out = weights v, of all heads of a block, in float32.
EFFATTN_DEVICE void weighted_values(const Attention& p, const Place& at, const float* weights) {
  float* const sums = staged_queries(p);
  float* const values = staged_keys(p);
  for (int head = 0; head < p.together; ++head) {
    const auto v = head_of<const float>(p.v, at.batch, at.head + head, p.keys, p.value_dim);
    const auto out = head_of<float>(p.out, at.batch, at.head + head, p.queries, p.value_dim);
    const float* const of_head = weights + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < p.value_dim; first += kTileChannels) {
      const int cols = least(kTileChannels, p.value_dim - first);
      for (int key0 = 0; key0 < most(p.keys, 1); key0 += p.staged_keys) {
        const int count = least(p.staged_keys, p.keys - key0);
        stage_tile<kThreads>(v, key0, count, first, cols, values, p.staged_stride);
        sync_block();
        products<false, false>(
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
    const float largest = largest_of_row(at, keys);
    float total = 0;
    for (int key = lane_index(); key < keys; key += kLanes) {
      const float x = exponential(at[key] - largest);
      total += x;
      at[key] = split_word(x);
    }
    total = sum_of_warp(total);
    // Without keys there is nothing to multiply.
    if (lane_index() == 0) at[stride - 1] = keys > 0 ? 1 / total : 0.0f;
  }
}
EFFATTN_DEVICE float factor_of_row(const float* row, int stride) { return row[stride - 1]; }

template <class T>
EFFATTN_DEVICE NarrowTile<kPartsOf<T>> staged_values(const Attention& p) {
  return {staged_keys<uint16_t>(p), p.staged_stride, p.staged_keys * p.staged_stride};
}
// Some keys and channels of a head's values.
template <class T>
EFFATTN_DEVICE void stage_values(const Attention& p, const Place& at, int head, int key0, int first) {
  const auto v = head_of<const T>(p.v, at.batch, at.head + head, p.keys, p.value_dim);
  stage_narrow<kThreads>(v, key0, whole_steps(least(p.staged_keys, p.keys - key0)), first,
                         least(kNarrowValues, p.value_dim - first), staged_values<T>(p));
  cp_async_commit();
}

// What a warp has of 64 rows and as many columns, or of fewer rows.
struct WarpTile {
  int row, col, groups;

  EFFATTN_DEVICE WarpTile(int rows, int cols) {
    const int down = (rows + kTileRows - 1) / kTileRows;  // 1, 2 or 4
    row = warp_index() % down * kTileRows;
    col = warp_index() / down * (down * kGroupCols);
    groups = least(down, whole_steps(cols - col) / kGroupCols);
  }
};

// Rows and columns of a matrix from some on = what a warp has of a product, times factor(row).
template <class T, class F>
EFFATTN_DEVICE void store_sums(const NarrowSums<kMostGroups>& sums, const WarpTile& tile, const Matrix<T>& to,
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
        if (col < cols) place[0] = narrowed<T>(scale * x[0]);
        if (col + 1 < cols) place[to.col_stride] = narrowed<T>(scale * x[1]);
      }
    };
  });
}

// out = weights v, of all heads of a block, the weights in words of two parts. What is first of the values is
// staged.
template <class T>
EFFATTN_DEVICE void weighted_narrow_values(const Attention& p, const Place& at, const float* weights) {
  bool is_staged = true;
  for (int head = 0; head < p.together; ++head) {
    const auto out = head_of<T>(p.out, at.batch, at.head + head, p.queries, p.value_dim);
    const float* const of_head = weights + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < p.value_dim; first += kNarrowValues) {
      const int cols = least(kNarrowValues, p.value_dim - first);
      const WarpTile tile(p.rows, cols);
      NarrowSums<kMostGroups> sums;
      // Where keys are so many that a chain ends before the last one, a block has 16 rows, a warp one group.
      NarrowSums<1> total;
      sums.clear();
      total.clear();
      for (int key0 = 0, depth = 0; key0 < p.keys; key0 += p.staged_keys) {
        if (!is_staged) stage_values<T>(p, at, head, key0, first);
        is_staged = false;
        cp_async_wait<0>();
        sync_block();
        const int count = least(p.staged_keys, p.keys - key0);
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
        return p.talk() ? 1.0f : factor_of_row(of_head + row * int64_t{p.stride}, p.stride);
      });
    }
  }
}

template <class T, bool kSpills>
EFFATTN_KERNEL(kThreads, 4)
attend(EFFATTN_PARAMETERS(Attention) p) {
  float* const first = buffer<kSpills>(p, 0);
  const TalkingHeads<const float> mix = shared_mix(p);
  for (int64_t index = block_index(); index < p.count; index += p.blocks) {
    const Place at(p, index);
    logits<T>(p, at, first);
    // While the softmax is computed, the values come.
    if constexpr (kIsNarrow<T>) stage_values<T>(p, at, 0, 0, 0);
    sync_block();
    if (p.talk()) {
      float* const second = buffer<kSpills>(p, 1);
      mix_heads(p, mix.logits, mix.logits_bias, false, first, second);
      sync_block();
      softmax_rows(kWarps, second, p.together * p.rows, p.keys, p.stride);
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

// sums[g][h] of a tile = sum over all pairs of a_g b_h, and vector[g] that of a_g.
EFFATTN_DEVICE void sum_pairs(const Attention& p, int64_t index, const float* a, const float* b, float* sums,
                              float* vector) {
  const int64_t one = int64_t{p.rows} * p.stride;
  const auto pair = [&](int k) { return k / p.keys * p.stride + k % p.keys; };
  products<false, false>(
      kWarps, 1, p.heads, p.heads, p.rows * p.keys, [&](int, int g, int k) { return a[g * one + pair(k)]; },
      [&](int, int k, int h) { return b[h * one + pair(k)]; },
      [&](int, int g, int h, float x) { sums[(index * p.heads + g) * p.heads + h] = x; });
  for (int g = warp_index(); g < p.heads; g += kWarps) {
    float total = 0;
    for (int k = lane_index(); k < p.rows * p.keys; k += kLanes) total += a[g * one + pair(k)];
    total = sum_of_warp(total);
    if (lane_index() == 0) vector[index * p.heads + g] = total;
  }
}

// Of all pairs of a block to memory.
EFFATTN_DEVICE void keep(const Attention& p, const Place& at, const float* from, float* to) {
  for_each<kThreads>(p.together * p.rows * p.keys, [&](int i) {
    const int head = i / (p.rows * p.keys), row = i / p.keys % p.rows, key = i % p.keys;
    if (at.query + row >= p.queries) return;
    const int64_t of = (at.batch * p.heads + at.head + head) * p.queries + at.query + row;
    to[of * p.keys + key] = from[(head * p.rows + row) * int64_t{p.stride} + key];
  });
}

template <class T, bool kSpills>
EFFATTN_DEVICE void gradients_of_tile(const Attention& p, const TalkingHeads<const float>& mix,
                                      int64_t index) {
  const Place at(p, index);
  const int rows = p.together * p.rows;
  float* const softmax = buffer<kSpills>(p, 0);
  float* const grad = buffer<kSpills>(p, 1);
  // Of talking heads, what is mixed to these.
  float* const unmixed = p.talk() ? buffer<kSpills>(p, 3) : softmax;
  float* const mixed = p.talk() ? buffer<kSpills>(p, 2) : grad;
  EFFATTN_NOT_UNROLLED
  for (int i = 0; i < 2; ++i) {
    pairs<T>(p, at,
             i == 0 ? Pairs{p.q, p.k, p.head_dim, p.scale, p.bias, unmixed}
                    : Pairs{p.out, p.v, p.value_dim, 1, nullptr, mixed});
  }
  sync_block();
  if (p.talk()) {
    mix_heads(p, mix.logits, mix.logits_bias, false, unmixed, softmax);
    mix_heads(p, mix.weights, nullptr, true, mixed, grad);
    sync_block();
  }
  softmax_rows(kWarps, softmax, rows, p.keys, p.stride);
  sync_block();
  if (p.talk()) {
    sum_pairs(p, index, mixed, softmax, p.grad_mix.weights, p.grad_mix.weights_bias);
  } else {
    keep(p, at, softmax, p.weights);
  }
  softmax_rows_backward(kWarps, softmax, grad, rows, p.keys, p.stride);
  sync_block();
  if (!p.talk()) return keep(p, at, grad, p.grad_logits);
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
softmax_gradients(EFFATTN_PARAMETERS(Attention) p) {
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
    const int cols = least(kTileChannels, p.channels - first);
    for (int inner = 0; inner < most(p.inners, 1); inner += kInners) {
      const int count = least(kInners, p.inners - inner);
      stage_tile<kThreads>(from, row0, kMultiplied, inner, count, matrix, kMatrixStride);
      stage_tile<kThreads>(x, inner, count, first, cols, values, kChannelStride);
      sync_block();
      products<false, false>(
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
    const int cols = least(kNarrowValues, p.channels - first);
    const WarpTile tile(kMultiplied, cols);
    NarrowSums<kMostGroups> sums, total;
    sums.clear();
    total.clear();
    for (int inner = 0; inner < p.inners; inner += kNarrowInners) {
      const int count = least(kNarrowInners, p.inners - inner), depth = whole_steps(count);
      if constexpr (kTransposed) {
        stage_narrow<kThreads>(from, inner, depth, row0, least(kMultiplied, p.rows - row0), matrix);
      } else {
        stage_narrow<kThreads>(from, row0, kMultiplied, inner, count, matrix);
      }
      stage_narrow<kThreads>(x, inner, depth, first, cols, values);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      if (inner % kNarrowDepth == 0) sums.add_to(total);
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

// --- launches ---------------------------------------------------------------------------------------

HeadsView view_of(const BiasedAttentionParams& problem, const HeadsOperand& t) {
  const int64_t size = problem.dtype == DType::kFloat32 ? 4 : 2;
  uint64_t all = reinterpret_cast<uintptr_t>(t.data);
  const int64_t steps[] = {t.batch_stride, t.head_stride,
                           t.channel_stride == 1 ? t.token_stride : t.channel_stride};
  for (const int64_t step : steps) all |= static_cast<uint64_t>(step * size);
  return {t, all % 16 == 0 && (t.channel_stride == 1 || t.token_stride == 1) ? 16 : 0};
}

Attention attention_of(const BiasedAttentionParams& problem, int buffers, bool is_backward,
                       const Execution& execution) {
  const SoftmaxHeads& heads = problem.heads;
  Attention p{};
  for (const int64_t size : {heads.heads, heads.queries, heads.keys, heads.head_dim, heads.value_dim}) {
    if (size > INT32_MAX / 64)
      throw std::runtime_error("effattn: sizes must be below 2^25, got " + std::to_string(size));
  }
  p.q = view_of(problem, problem.q);
  p.k = view_of(problem, problem.k);
  p.v = view_of(problem, problem.v);
  p.bias = heads.bias;
  p.mix = heads.mix;
  p.scale = heads.scale;
  p.heads = static_cast<int>(heads.heads);
  p.queries = static_cast<int>(heads.queries);
  p.keys = static_cast<int>(heads.keys);
  p.head_dim = static_cast<int>(heads.head_dim);
  p.value_dim = static_cast<int>(heads.value_dim);
  p.together = p.talk() ? p.heads : 1;
  p.mix_is_shared = p.talk() && p.heads <= kMostSharedMix;
  p.rows = kMostQueries;
  while (p.rows > 1 && p.rows / 2 >= p.queries) p.rows /= 2;
  const bool is_narrow = problem.dtype != DType::kFloat32;
  p.stride = is_narrow ? SplitRows::stride(p.keys) : shared_stride(p.keys);
  // Values are multiplied with grad_out in the backward, as keys are with queries.
  const int most_values = is_narrow && !is_backward ? kNarrowValues : kTileChannels;
  const int channels = most(1, most(least(kTileChannels, p.head_dim), least(most_values, p.value_dim)));
  p.staged_stride = is_narrow ? narrow_stride(channels) : shared_stride(channels);
  const int element_bytes = is_narrow ? 2 : 4;
  const int parts = problem.dtype == DType::kFloat16 && !is_backward ? kPartsOf<Float16> : 1;
  const int key_bytes = parts * element_bytes * p.staged_stride;
  p.staged_keys =
      most(kTileRows, least(kMostStagedBytes / key_bytes / kTileRows * kTileRows, whole_steps(p.keys)));
  p.keys_bytes = p.staged_keys * key_bytes;
  const auto take_rows = [&](int rows) {
    p.rows = rows;
    p.queries_bytes = element_bytes * p.staged_stride * (is_narrow ? whole_steps(rows) : rows);
  };
  take_rows(p.rows);
  const auto fits = [&](int count) { return p.shared_bytes(count) <= kMostSharedBytes; };
  // Of more keys than a chain has, more rows would not fit: weighted_narrow_values counts on it.
  static_assert(int64_t{4} * 2 * kTileRows * kNarrowDepth > kMostSharedBytes);
  // Fewer rows than a product has are no gain.
  while (p.rows > kTileRows && !fits(buffers)) take_rows(p.rows / 2);
  while (p.in_shared < buffers && fits(p.in_shared + 1)) ++p.in_shared;
  p.spilled_buffers = buffers - p.in_shared;
  if (int64_t{p.together} * p.rows * p.stride > INT32_MAX) {
    throw std::runtime_error("effattn: the kernels take fewer than 2^31 logits at a time, got " +
                             std::to_string(p.together) + " heads of " + std::to_string(p.rows) + " x " +
                             std::to_string(p.stride));
  }
  p.tiles = static_cast<int>(ceil_div(p.queries, p.rows));
  p.count = p.blocks = problem.batch * (p.heads / most(p.together, 1)) * p.tiles;
  if (p.spilled_buffers > 0) {
    p.blocks = min(p.count, 2 * execution.card.multiprocessors);
    p.spilled = execution.workspace(p.blocks * p.spilled_buffers * p.buffer());
  }
  return p;
}

const RegisteredOperator registered("biased_attention", {});

Grid grid_of(const Attention& p) { return {p.blocks, kThreads, p.shared_bytes(p.in_shared)}; }

}  // namespace

void biased_attention(const BiasedAttentionParams& problem, const Execution& execution) {
  const int buffers = problem.heads.talk() ? 2 : 1;
  Attention p = attention_of(problem, buffers, false, execution);
  p.out = view_of(problem, problem.out);
  with_dtype(problem.dtype, [&](auto type) {
    using T = decltype(type);
    launch(p.spilled_buffers > 0 ? attend<T, true> : attend<T, false>, grid_of(p), execution, p);
  });
}

void biased_attention_backward(const BiasedAttentionParams& problem, const Execution& execution) {
  const int buffers = problem.heads.talk() ? 4 : 2;
  Attention p = attention_of(problem, buffers, true, execution);
  p.out = view_of(problem, problem.grad_out);
  const int64_t heads = p.heads, one = int64_t{p.heads} * p.queries * p.keys;
  p.weights = execution.workspace(problem.batch * one);
  p.grad_logits = execution.workspace(problem.batch * one);
  const Grid grid = grid_of(p);
  if (p.talk()) {
    p.grad_mix = {execution.workspace(p.count * heads * heads), execution.workspace(p.count * heads),
                  execution.workspace(p.count * heads * heads), execution.workspace(p.count * heads)};
  }
  with_dtype(problem.dtype, [&](auto type) {
    using T = decltype(type);
    launch(p.spilled_buffers > 0 ? softmax_gradients<T, true> : softmax_gradients<T, false>, grid, execution,
           p);
    const auto multiply = [&](const float* matrix, bool transposed, const HeadsView& x,
                              const HeadsOperand& out, int channels, float factor) {
      const int rows = transposed ? p.keys : p.queries;
      const int tiles = static_cast<int>(ceil_div(rows, kMultiplied));
      launch(transposed ? multiply_heads<T, true> : multiply_heads<T, false>,
             {problem.batch * heads * tiles, kThreads, kMultiplyBytes<T>}, execution,
             Multiply{matrix, x, view_of(problem, out), factor, p.heads, rows,
                      transposed ? p.queries : p.keys, channels, tiles});
    };
    multiply(p.grad_logits, false, p.k, problem.grad_q, p.head_dim, p.scale);
    multiply(p.grad_logits, true, p.q, problem.grad_k, p.head_dim, p.scale);
    multiply(p.weights, true, p.out, problem.grad_v, p.value_dim, 1);
  });
  add_up(p.grad_logits, problem.grad_bias, 1, problem.batch, one, execution);
  if (!p.talk()) return;
  const auto add = [&](const float* partial, float* sums, int64_t floats) {
    add_up(partial, sums, 1, p.count, floats, execution);
  };
  add(p.grad_mix.logits, problem.grad_mix.logits, heads * heads);
  add(p.grad_mix.logits_bias, problem.grad_mix.logits_bias, heads);
  add(p.grad_mix.weights, problem.grad_mix.weights, heads * heads);
  add(p.grad_mix.weights_bias, problem.grad_mix.weights_bias, heads);
}

}  // namespace effattn::cuda
