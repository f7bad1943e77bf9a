// EfficientFormer's attention, forward and backward.
//
// A block takes some queries of a head, or of all heads where they talk to each other, and has all their
// logits in shared memory: no running maximum, and mixing heads is a sum over what lies there. The backward
// writes weights and gradients of logits in float32, since the gradients of k, v and the bias are sums over
// other blocks' queries.
#include "biased_attention.h"

#include <string>

#include "launch.h"
#include "staged.h"
#include "sums.h"
#include "tensors.h"

namespace effattn::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;
constexpr int kMostQueries = 64;
// Heads whose mixing is in shared memory, at most.
constexpr int kMostSharedMix = 32;
// Of a tile of keys or values, about.
constexpr int kMostStagedFloats = 4608;

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
      staged_stride;  // keys of a staged tile; and of it, and of a tile of queries, floats from row to row
  float* spilled;
  // Backward, of all pairs (batch, heads, queries, keys); and of each block, sums for the mixing of heads.
  float *weights, *grad_logits;
  TalkingHeads<float> grad_mix;

  constexpr bool talk() const { return mix.logits != nullptr; }
  constexpr int64_t mix_floats() const { return mix_is_shared ? int64_t{2} * heads * heads : 0; }
  constexpr int64_t staged_floats() const { return int64_t{rows + staged_keys} * staged_stride; }
  constexpr int64_t buffer() const { return int64_t{together} * rows * stride; }
};

// Shared memory: the matrices of the mixing; a tile of queries, or of the output; a tile of keys or values;
// logits.
EFFATTN_DEVICE float* staged_queries(const Attention& p) {
  return reinterpret_cast<float*>(shared_memory()) + p.mix_floats();
}
EFFATTN_DEVICE float* staged_keys(const Attention& p) { return staged_queries(p) + p.rows * p.staged_stride; }
// Logits of all pairs of a block, or what becomes of them.
EFFATTN_DEVICE float* buffer(const Attention& p, int i) {
  if (i < p.in_shared) return staged_queries(p) + p.staged_floats() + i * p.buffer();
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

template <class T>
constexpr bool kExact = sizeof(T) == 2;  // in TF32

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

// to[row][key] of each head = f(head, row, key, sum of a b^T over the channels), 0 behind the last query.
template <class T, class F>
EFFATTN_DEVICE void pairs(const Attention& p, const Place& at, const HeadsView& of_queries,
                          const HeadsView& of_keys, int channels, float* to, F f) {
  float* const queries = staged_queries(p);
  float* const keys = staged_keys(p);
  for (int head = 0; head < p.together; ++head) {
    const auto a = head_of<const T>(of_queries, at.batch, at.head + head, p.queries, channels);
    const auto b = head_of<const T>(of_keys, at.batch, at.head + head, p.keys, channels);
    float* const of_head = to + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < most(channels, 1); first += kTileChannels) {
      const int cols = least(kTileChannels, channels - first);
      const bool is_last = first + kTileChannels >= channels;
      stage_tile<kThreads>(a, at.query, p.rows, first, cols, queries, p.staged_stride);
      for (int key0 = 0; key0 < p.keys; key0 += p.staged_keys) {
        const int count = least(p.staged_keys, p.keys - key0);
        stage_tile<kThreads>(b, key0, count, first, cols, keys, p.staged_stride);
        sync_block();
        products<kExact<T>, kExact<T>>(
            kWarps, 1, p.rows, count, cols,
            [&](int, int row, int c) { return queries[row * p.staged_stride + c]; },
            [&](int, int c, int key) { return keys[key * p.staged_stride + c]; },
            [&](int, int row, int key, float x) {
              float& pair = of_head[row * int64_t{p.stride} + key0 + key];
              const float sum = first == 0 ? x : pair + x;
              const bool inside = at.query + row < p.queries;
              pair = !is_last ? sum : inside ? f(head, row, key0 + key, sum) : 0.0f;
            });
        sync_block();
      }
    }
  }
}

template <class T>
EFFATTN_DEVICE void logits(const Attention& p, const Place& at, float* to) {
  pairs<T>(p, at, p.q, p.k, p.head_dim, to, [&](int i, int row, int key, float x) {
    const int64_t pair = (static_cast<int64_t>(at.head + i) * p.queries + at.query + row) * p.keys + key;
    return p.scale * x + p.bias[pair];
  });
}

// to_g = sum over h of matrix(g, h) from_h + bias_g, of all pairs of a block; the matrix may be transposed,
// the bias null. Some g at a time, so that what is read of from_h is used for all of them.
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
        if (first + e < p.heads) to[(first + e) * one + pair] = total[e];
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

// out = weights v, of all heads of a block.
template <class T>
EFFATTN_DEVICE void weighted_values(const Attention& p, const Place& at, const float* weights) {
  float* const sums = staged_queries(p);
  float* const values = staged_keys(p);
  for (int head = 0; head < p.together; ++head) {
    const auto v = head_of<const T>(p.v, at.batch, at.head + head, p.keys, p.value_dim);
    const auto out = head_of<T>(p.out, at.batch, at.head + head, p.queries, p.value_dim);
    const float* const of_head = weights + static_cast<int64_t>(head) * p.rows * p.stride;
    for (int first = 0; first < p.value_dim; first += kTileChannels) {
      const int cols = least(kTileChannels, p.value_dim - first);
      for (int key0 = 0; key0 < most(p.keys, 1); key0 += p.staged_keys) {
        const int count = least(p.staged_keys, p.keys - key0);
        stage_tile<kThreads>(v, key0, count, first, cols, values, p.staged_stride);
        sync_block();
        products<false, kExact<T>>(
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

template <class T>
EFFATTN_KERNEL(kThreads, 4)
attend(EFFATTN_PARAMETERS(Attention) p) {
  float* const first = buffer(p, 0);
  const TalkingHeads<const float> mix = shared_mix(p);
  for (int64_t index = block_index(); index < p.count; index += p.blocks) {
    const Place at(p, index);
    logits<T>(p, at, first);
    sync_block();
    if (p.talk()) {
      float* const second = buffer(p, 1);
      mix_heads(p, mix.logits, mix.logits_bias, false, first, second);
      sync_block();
      softmax_rows(kWarps, second, p.together * p.rows, p.keys, p.stride);
      sync_block();
      mix_heads(p, mix.weights, mix.weights_bias, false, second, first);
    } else {
      softmax_rows(kWarps, first, p.together * p.rows, p.keys, p.stride);
    }
    sync_block();
    weighted_values<T>(p, at, first);
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

template <class T>
EFFATTN_DEVICE void gradients_of_tile(const Attention& p, const TalkingHeads<const float>& mix,
                                      int64_t index) {
  const Place at(p, index);
  const int rows = p.together * p.rows;
  float* const softmax = buffer(p, 0);
  float* const grad = buffer(p, 1);
  if (!p.talk()) {
    logits<T>(p, at, softmax);
    pairs<T>(p, at, p.out, p.v, p.value_dim, grad, [](int, int, int, float x) { return x; });
    sync_block();
    softmax_rows(kWarps, softmax, rows, p.keys, p.stride);
    sync_block();
    keep(p, at, softmax, p.weights);
    softmax_rows_backward(kWarps, softmax, grad, rows, p.keys, p.stride);
    sync_block();
    keep(p, at, grad, p.grad_logits);
    return;
  }
  float* const mixed = buffer(p, 2);
  float* const unmixed = buffer(p, 3);
  logits<T>(p, at, unmixed);
  pairs<T>(p, at, p.out, p.v, p.value_dim, mixed, [](int, int, int, float x) { return x; });
  sync_block();
  mix_heads(p, mix.logits, mix.logits_bias, false, unmixed, softmax);
  mix_heads(p, mix.weights, nullptr, true, mixed, grad);
  sync_block();
  softmax_rows(kWarps, softmax, rows, p.keys, p.stride);
  sync_block();
  sum_pairs(p, index, mixed, softmax, p.grad_mix.weights, p.grad_mix.weights_bias);
  softmax_rows_backward(kWarps, softmax, grad, rows, p.keys, p.stride);
  sync_block();
  mix_heads(p, mix.weights, mix.weights_bias, false, softmax, mixed);
  sum_pairs(p, index, grad, unmixed, p.grad_mix.logits, p.grad_mix.logits_bias);
  sync_block();
  keep(p, at, mixed, p.weights);
  mix_heads(p, mix.logits, nullptr, true, grad, unmixed);
  sync_block();
  keep(p, at, unmixed, p.grad_logits);
}

template <class T>
EFFATTN_KERNEL(kThreads, 4)
softmax_gradients(EFFATTN_PARAMETERS(Attention) p) {
  const TalkingHeads<const float> mix = shared_mix(p);
  for (int64_t index = block_index(); index < p.count; index += p.blocks) {
    gradients_of_tile<T>(p, mix, index);
    sync_block();
  }
}

// out = factor matrix x, or of the transposed matrix: (rows, inners) of every head in float32, contiguous.
struct Multiply {
  const float* matrix;
  HeadsView x, out;
  float factor;
  int heads, rows, inners, channels, tiles;
  bool transposed;
};

constexpr int kMultiplied = 64, kInners = 32;  // rows of a block, and what is summed over at a time
constexpr int kMatrixStride = shared_stride(kInners), kChannelStride = shared_stride(kTileChannels);
constexpr int64_t kMultiplyBytes =
    4 * (kMultiplied * kMatrixStride + (kMultiplied + kInners) * kChannelStride);

template <class T>
EFFATTN_KERNEL(kThreads, 4)
multiply_heads(EFFATTN_PARAMETERS(Multiply) p) {
  float* const matrix = reinterpret_cast<float*>(shared_memory());
  float* const values = matrix + kMultiplied * kMatrixStride;
  float* const sums = values + kInners * kChannelStride;
  const int64_t group = block_index() / p.tiles, batch = group / p.heads, head = group % p.heads;
  const int row0 = static_cast<int>(block_index() % p.tiles) * kMultiplied;
  const float* const data = p.matrix + group * p.rows * p.inners;
  const Matrix<const float> from{
      data, p.transposed ? 1 : int64_t{p.inners}, p.transposed ? int64_t{p.rows} : 1, p.rows, p.inners, 0};
  const auto x = head_of<const T>(p.x, batch, head, p.inners, p.channels);
  const auto out = head_of<T>(p.out, batch, head, p.rows, p.channels);
  for (int first = 0; first < p.channels; first += kTileChannels) {
    const int cols = least(kTileChannels, p.channels - first);
    for (int inner = 0; inner < most(p.inners, 1); inner += kInners) {
      const int count = least(kInners, p.inners - inner);
      stage_tile<kThreads>(from, row0, kMultiplied, inner, count, matrix, kMatrixStride);
      stage_tile<kThreads>(x, inner, count, first, cols, values, kChannelStride);
      sync_block();
      products<false, kExact<T>>(
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

// --- launches ---------------------------------------------------------------------------------------

HeadsView view_of(const BiasedAttention& problem, const HeadsOperand& t) {
  const int64_t size = problem.dtype == DType::kFloat32 ? 4 : 2;
  uint64_t all = reinterpret_cast<uintptr_t>(t.data);
  const int64_t steps[] = {t.batch_stride, t.head_stride,
                           t.channel_stride == 1 ? t.token_stride : t.channel_stride};
  for (const int64_t step : steps) all |= static_cast<uint64_t>(step * size);
  return {t, all % 16 == 0 && (t.channel_stride == 1 || t.token_stride == 1) ? 16 : 0};
}

Attention attention_of(const BiasedAttention& problem, int buffers, const Execution& execution) {
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
  p.stride = shared_stride(p.keys);
  p.mix_is_shared = p.talk() && p.heads <= kMostSharedMix;
  p.rows = kMostQueries;
  while (p.rows > 1 && p.rows / 2 >= p.queries) p.rows /= 2;
  const int channels = most(1, least(kTileChannels, most(p.head_dim, p.value_dim)));
  p.staged_stride = shared_stride(channels);
  p.staged_keys = most(kTileRows, least(kMostStagedFloats / p.staged_stride, p.keys) / kTileRows * kTileRows);
  const auto fits = [&](int count) {
    return 4 * (p.mix_floats() + p.staged_floats() + count * p.buffer()) <= kMostSharedBytes;
  };
  // Fewer rows than a product has are no gain.
  while (p.rows > kTileRows && !fits(buffers)) p.rows /= 2;
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
    p.blocks = smaller(p.count, 2 * execution.card.multiprocessors);
    p.spilled = execution.workspace(p.blocks * p.spilled_buffers * p.buffer());
  }
  return p;
}

Grid grid_of(const Attention& p) {
  return {p.blocks, kThreads, 4 * (p.mix_floats() + p.staged_floats() + p.in_shared * p.buffer())};
}

}  // namespace

void biased_attention(const BiasedAttention& problem, const Execution& execution) {
  const int buffers = problem.heads.talk() ? 2 : 1;
  Attention p = attention_of(problem, buffers, execution);
  p.out = view_of(problem, problem.out);
  with_dtype(problem.dtype, [&](auto type) {
    using T = decltype(type);
    launch(attend<T>, grid_of(p), execution, p);
  });
}

void biased_attention_backward(const BiasedAttention& problem, const Execution& execution) {
  const int buffers = problem.heads.talk() ? 4 : 2;
  Attention p = attention_of(problem, buffers, execution);
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
    launch(softmax_gradients<T>, grid, execution, p);
    const auto multiply = [&](const float* matrix, bool transposed, const HeadsView& x,
                              const HeadsOperand& out, int channels, float factor) {
      const int rows = transposed ? p.keys : p.queries;
      const int tiles = static_cast<int>(ceil_div(rows, kMultiplied));
      launch(multiply_heads<T>, {problem.batch * heads * tiles, kThreads, kMultiplyBytes}, execution,
             Multiply{matrix, x, view_of(problem, out), factor, p.heads, rows,
                      transposed ? p.queries : p.keys, channels, tiles, transposed});
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
