// EfficientFormer's attention, forward and backward.
//
// A block takes some queries of a head, or of all heads where they talk to each other, and has all their
// logits in shared memory: no running maximum, and mixing heads is a sum over what lies there. The backward
// writes weights and gradients of logits in float32, since the gradients of k, v and the bias are sums over
// other blocks' queries.
#include "biased_attention.h"

#include <string>

#include "block.h"
#include "launch.h"
#include "sums.h"
#include "tensors.h"

namespace effattn::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kLanes;
// The least that a card since 8.0 lets a block have, less what it keeps.
constexpr int64_t kSharedBytes = 98 * 1024;
constexpr int kMostQueries = 64;

struct Attention {
  DType dtype;
  HeadsOperand q, k, v, out;  // out: of the backward grad_out
  const float* bias;
  TalkingHeads<const float> mix;
  float scale;
  int heads, queries, keys, head_dim, value_dim;
  int together;  // heads of a block
  int rows;      // queries of a block
  int stride;    // of logits in shared memory
  int tiles;
  // Backward, of all pairs (batch, heads, queries, keys); and of each block, sums for the mixing of heads.
  float *weights, *grad_logits;
  TalkingHeads<float> grad_mix;

  constexpr bool talk() const { return mix.logits != nullptr; }
  constexpr int buffer() const { return together * rows * stride; }
};

EFFATTN_DEVICE float load(const HeadsOperand& t, DType dtype, int64_t batch, int64_t head, int64_t token,
                          int64_t channel) {
  return element(
      t.data, dtype,
      batch * t.batch_stride + head * t.head_stride + token * t.token_stride + channel * t.channel_stride);
}
EFFATTN_DEVICE void store(const HeadsOperand& t, DType dtype, int64_t batch, int64_t head, int64_t token,
                          int64_t channel, float x) {
  set_element(
      t.data, dtype,
      batch * t.batch_stride + head * t.head_stride + token * t.token_stride + channel * t.channel_stride, x);
}

// What a block works on.
struct Place {
  int64_t batch;
  int head, query;

  EFFATTN_DEVICE explicit Place(const Attention& p) {
    const int groups = p.heads / p.together;
    const int64_t group = block_index() / p.tiles;
    query = static_cast<int>(block_index() % p.tiles) * p.rows;
    head = static_cast<int>(group % groups) * p.together;
    batch = group / groups;
  }
};

// to[row][key] of each head = a b^T over the channels of both, 0 behind the last query; then f(head, row,
// key, sum).
template <bool kNarrow, class F>
EFFATTN_DEVICE void pairs(const Attention& p, const Place& at, const HeadsOperand& a, const HeadsOperand& b,
                          int channels, float* to, F f) {
  products<kNarrow, kNarrow>(
      kWarps, p.together, p.rows, p.keys, channels,
      [&](int i, int row, int c) {
        const int query = at.query + row;
        return query < p.queries ? load(a, p.dtype, at.batch, at.head + i, query, c) : 0.0f;
      },
      [&](int i, int c, int key) { return load(b, p.dtype, at.batch, at.head + i, key, c); },
      [&](int i, int row, int key, float x) {
        to[(i * p.rows + row) * p.stride + key] = at.query + row < p.queries ? f(i, row, key, x) : 0.0f;
      });
}

template <bool kNarrow>
EFFATTN_DEVICE void logits(const Attention& p, const Place& at, float* to) {
  pairs<kNarrow>(p, at, p.q, p.k, p.head_dim, to, [&](int i, int row, int key, float x) {
    const int64_t pair = (static_cast<int64_t>(at.head + i) * p.queries + at.query + row) * p.keys + key;
    return p.scale * x + p.bias[pair];
  });
}

// to_g = sum over h of matrix(g, h) from_h + bias_g, of all pairs of a block; the matrix may be transposed,
// the bias null.
EFFATTN_DEVICE void mix_heads(const Attention& p, const float* matrix, const float* bias, bool transposed,
                              const float* from, float* to) {
  const int one = p.rows * p.stride;
  for_each<kThreads>(p.rows * p.keys, [&](int i) {
    const int pair = i / p.keys * p.stride + i % p.keys;
    for (int g = 0; g < p.heads; ++g) {
      float total = bias != nullptr ? bias[g] : 0.0f;
      for (int h = 0; h < p.heads; ++h) {
        total += matrix[transposed ? h * p.heads + g : g * p.heads + h] * from[h * one + pair];
      }
      to[g * one + pair] = total;
    }
  });
}

template <bool kNarrow>
EFFATTN_KERNEL(kThreads, 4)
attend(EFFATTN_PARAMETERS(Attention) p) {
  float* first = reinterpret_cast<float*>(shared_memory());
  float* second = first + p.buffer();
  const Place at(p);
  logits<kNarrow>(p, at, first);
  sync_block();
  if (p.talk()) {
    mix_heads(p, p.mix.logits, p.mix.logits_bias, false, first, second);
    sync_block();
    softmax_rows(kWarps, second, p.together * p.rows, p.keys, p.stride);
    sync_block();
    mix_heads(p, p.mix.weights, p.mix.weights_bias, false, second, first);
  } else {
    softmax_rows(kWarps, first, p.together * p.rows, p.keys, p.stride);
  }
  sync_block();
  products<false, kNarrow>(
      kWarps, p.together, least(p.rows, p.queries - at.query), p.value_dim, p.keys,
      [&](int i, int row, int key) { return first[(i * p.rows + row) * p.stride + key]; },
      [&](int i, int key, int c) { return load(p.v, p.dtype, at.batch, at.head + i, key, c); },
      [&](int i, int row, int c, float x) {
        store(p.out, p.dtype, at.batch, at.head + i, at.query + row, c, x);
      });
}

// sums[g][h] of this block = sum over all pairs of a_g b_h, and vector[g] that of a_g.
EFFATTN_DEVICE void sum_pairs(const Attention& p, const float* a, const float* b, float* sums,
                              float* vector) {
  const int one = p.rows * p.stride;
  const auto pair = [&](int k) { return k / p.keys * p.stride + k % p.keys; };
  products<false, false>(
      kWarps, 1, p.heads, p.heads, p.rows * p.keys, [&](int, int g, int k) { return a[g * one + pair(k)]; },
      [&](int, int k, int h) { return b[h * one + pair(k)]; },
      [&](int, int g, int h, float x) { sums[block_index() * p.heads * p.heads + g * p.heads + h] = x; });
  for (int g = warp_index(); g < p.heads; g += kWarps) {
    float total = 0;
    for (int k = lane_index(); k < p.rows * p.keys; k += kLanes) total += a[g * one + pair(k)];
    total = sum_of_warp(total);
    if (lane_index() == 0) vector[block_index() * p.heads + g] = total;
  }
}

// Of all pairs of a block to memory.
EFFATTN_DEVICE void keep(const Attention& p, const Place& at, const float* from, float* to) {
  for_each<kThreads>(p.together * p.rows * p.keys, [&](int i) {
    const int head = i / (p.rows * p.keys), row = i / p.keys % p.rows, key = i % p.keys;
    if (at.query + row >= p.queries) return;
    const int64_t of = (at.batch * p.heads + at.head + head) * p.queries + at.query + row;
    to[of * p.keys + key] = from[(head * p.rows + row) * p.stride + key];
  });
}

template <bool kNarrow>
EFFATTN_KERNEL(kThreads, 4)
softmax_gradients(EFFATTN_PARAMETERS(Attention) p) {
  float* softmax = reinterpret_cast<float*>(shared_memory());
  float* grad = softmax + p.buffer();
  const Place at(p);
  const int rows = p.together * p.rows;
  if (!p.talk()) {
    logits<kNarrow>(p, at, softmax);
    pairs<kNarrow>(p, at, p.out, p.v, p.value_dim, grad, [](int, int, int, float x) { return x; });
    sync_block();
    softmax_rows(kWarps, softmax, rows, p.keys, p.stride);
    sync_block();
    keep(p, at, softmax, p.weights);
    softmax_rows_backward(kWarps, softmax, grad, rows, p.keys, p.stride);
    sync_block();
    keep(p, at, grad, p.grad_logits);
    return;
  }
  float* mixed = grad + p.buffer();
  float* unmixed = mixed + p.buffer();
  logits<kNarrow>(p, at, unmixed);
  pairs<kNarrow>(p, at, p.out, p.v, p.value_dim, mixed, [](int, int, int, float x) { return x; });
  sync_block();
  mix_heads(p, p.mix.logits, p.mix.logits_bias, false, unmixed, softmax);
  mix_heads(p, p.mix.weights, nullptr, true, mixed, grad);
  sync_block();
  softmax_rows(kWarps, softmax, rows, p.keys, p.stride);
  sync_block();
  sum_pairs(p, mixed, softmax, p.grad_mix.weights, p.grad_mix.weights_bias);
  softmax_rows_backward(kWarps, softmax, grad, rows, p.keys, p.stride);
  sync_block();
  mix_heads(p, p.mix.weights, p.mix.weights_bias, false, softmax, mixed);
  sum_pairs(p, grad, unmixed, p.grad_mix.logits, p.grad_mix.logits_bias);
  sync_block();
  keep(p, at, mixed, p.weights);
  mix_heads(p, p.mix.logits, nullptr, true, grad, unmixed);
  sync_block();
  keep(p, at, unmixed, p.grad_logits);
}

// out = factor matrix x, or of the transposed matrix: (rows, inners) of every head in float32, contiguous.
struct Multiply {
  const float* matrix;
  HeadsOperand x, out;
  DType dtype;
  float factor;
  int heads, rows, inners, channels, tiles;
  bool transposed;
};

constexpr int kMultiplied = 64;  // rows of a block

template <bool kNarrow>
EFFATTN_KERNEL(kThreads, 4)
multiply_heads(EFFATTN_PARAMETERS(Multiply) p) {
  const int64_t group = block_index() / p.tiles, batch = group / p.heads, head = group % p.heads;
  const int first = static_cast<int>(block_index() % p.tiles) * kMultiplied;
  const float* const matrix = p.matrix + group * p.rows * p.inners;
  const int64_t row_stride = p.transposed ? 1 : p.inners, inner_stride = p.transposed ? p.rows : 1;
  products<false, kNarrow>(
      kWarps, 1, least(kMultiplied, p.rows - first), p.channels, p.inners,
      [&](int, int row, int k) { return matrix[(first + row) * row_stride + k * inner_stride]; },
      [&](int, int k, int c) { return load(p.x, p.dtype, batch, head, k, c); },
      [&](int, int row, int c, float x) {
        store(p.out, p.dtype, batch, head, first + row, c, p.factor * x);
      });
}

// --- launches ---------------------------------------------------------------------------------------

Attention attention_of(const BiasedAttention& problem, int buffers) {
  const SoftmaxHeads& heads = problem.heads;
  Attention p{};
  for (const int64_t size : {heads.heads, heads.queries, heads.keys, heads.head_dim, heads.value_dim}) {
    if (size > INT32_MAX / 64)
      throw std::runtime_error("effattn: sizes must be below 2^25, got " + std::to_string(size));
  }
  p.dtype = problem.dtype;
  p.q = problem.q;
  p.k = problem.k;
  p.v = problem.v;
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
  p.rows = kMostQueries;
  const auto bytes = [&] { return int64_t{4} * buffers * p.together * p.rows * p.stride; };
  while (p.rows > 1 && (bytes() > kSharedBytes || p.rows / 2 >= p.queries)) p.rows /= 2;
  if (bytes() > kSharedBytes) {
    throw std::runtime_error("effattn: the logits of a query must fit into shared memory, got " +
                             std::to_string(p.together) + " heads that talk to each other times " +
                             std::to_string(p.keys) + " keys");
  }
  p.tiles = static_cast<int>(ceil_div(p.queries, p.rows));
  return p;
}

Grid grid_of(const BiasedAttention& problem, const Attention& p, int buffers) {
  return {problem.batch * (p.heads / most(p.together, 1)) * p.tiles, kThreads,
          int64_t{4} * buffers * p.buffer()};
}

template <class F>
void with_narrow(DType dtype, F f) {
  if (dtype == DType::kFloat32) {
    f(std::false_type{});
  } else {
    f(std::true_type{});
  }
}

}  // namespace

void biased_attention(const BiasedAttention& problem, const Execution& execution) {
  const int buffers = problem.heads.talk() ? 2 : 1;
  Attention p = attention_of(problem, buffers);
  p.out = problem.out;
  with_narrow(problem.dtype,
              [&](auto narrow) { launch(attend<narrow()>, grid_of(problem, p, buffers), execution, p); });
}

void biased_attention_backward(const BiasedAttention& problem, const Execution& execution) {
  const int buffers = problem.heads.talk() ? 4 : 2;
  Attention p = attention_of(problem, buffers);
  p.out = problem.grad_out;
  const int64_t heads = p.heads, one = int64_t{p.heads} * p.queries * p.keys;
  p.weights = execution.workspace(problem.batch * one);
  p.grad_logits = execution.workspace(problem.batch * one);
  const Grid grid = grid_of(problem, p, buffers);
  if (p.talk()) {
    p.grad_mix = {execution.workspace(grid.blocks * heads * heads), execution.workspace(grid.blocks * heads),
                  execution.workspace(grid.blocks * heads * heads), execution.workspace(grid.blocks * heads)};
  }
  with_narrow(problem.dtype, [&](auto narrow) {
    launch(softmax_gradients<narrow()>, grid, execution, p);
    const auto multiply = [&](const float* matrix, bool transposed, const HeadsOperand& x,
                              const HeadsOperand& out, int channels, float factor) {
      const int rows = transposed ? p.keys : p.queries;
      const int tiles = static_cast<int>(ceil_div(rows, kMultiplied));
      launch(multiply_heads<narrow()>, {problem.batch * heads * tiles, kThreads}, execution,
             Multiply{matrix, x, out, p.dtype, factor, p.heads, rows, transposed ? p.queries : p.keys,
                      channels, tiles, transposed});
    };
    multiply(p.grad_logits, false, p.k, problem.grad_q, p.head_dim, p.scale);
    multiply(p.grad_logits, true, p.q, problem.grad_k, p.head_dim, p.scale);
    multiply(p.weights, true, problem.grad_out, problem.grad_v, p.value_dim, 1);
  });
  add_up(p.grad_logits, problem.grad_bias, 1, problem.batch, one, execution);
  if (!p.talk()) return;
  const auto add = [&](const float* partial, float* sums, int64_t floats) {
    add_up(partial, sums, 1, grid.blocks, floats, execution);
  };
  add(p.grad_mix.logits, problem.grad_mix.logits, heads * heads);
  add(p.grad_mix.logits_bias, problem.grad_mix.logits_bias, heads);
  add(p.grad_mix.weights, problem.grad_mix.weights, heads * heads);
  add(p.grad_mix.weights_bias, problem.grad_mix.weights_bias, heads);
}

}  // namespace effattn::cuda
