// Cascaded group attention, forward and backward: a block walks all heads of some windows.
//
// What goes from one step to the next is in shared memory where it fits, else in memory of the block's own;
// windows are cut out and put back by their addresses. The backward walks forward once more and keeps
// everything, walks back, and then sums the gradients of the weights over all windows.
#include "api.h"

#include <string>

#include "../core/block.h"
#include "../core/launch.h"
#include "../core/limits.h"
#include "../core/reduction.h"
#include "cascade.h"

namespace effattn::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kLanes;
// Small windows go together until a block has so many tokens.
constexpr int kTokens = 64;
// Queries whose logits are there at once, where those of all do not fit.
constexpr int kFewQueries = 16;

EFFATTN_DEVICE float load(const Cascade& p, const Image& image, const Window& window, int token,
                          int channel) {
  const int64_t pixel = window.pixel(p, token);
  if (pixel < 0) return 0;
  return element(
      image.data, p.dtype,
      window.batch * image.batch_stride + channel * image.channel_stride + pixel * image.token_stride);
}
EFFATTN_DEVICE void store(const Cascade& p, const Image& image, const Window& window, int token, int channel,
                          float x) {
  const int64_t pixel = window.pixel(p, token);
  if (pixel < 0) return;
  set_element(image.data, p.dtype,
              window.batch * image.batch_stride + channel * image.channel_stride + pixel * image.token_stride,
              x);
}

// Of the channels of rows of a window's tokens, the convolution with a head's taps; its transpose if kSign is
// -1.
template <int kSign>
EFFATTN_DEVICE float convolved(const Cascade& p, int head, const float* rows, int stride, int token,
                               int channel) {
  const int kernel = p.kernels[head], row = token / p.window_width, col = token % p.window_width;
  const float* const taps = p.weights[head].depthwise + channel * kernel * kernel;
  float total = 0;
  for (int i = 0; i < kernel; ++i) {
    const int at_row = row + kSign * (i - kernel / 2);
    if (at_row < 0 || at_row >= p.window_height) continue;
    for (int j = 0; j < kernel; ++j) {
      const int at_col = col + kSign * (j - kernel / 2);
      if (at_col < 0 || at_col >= p.window_width) continue;
      total += taps[i * kernel + j] * rows[(at_row * p.window_width + at_col) * stride + channel];
    }
  }
  return total;
}

// Takes what fits from shared memory, one piece after the other.
struct Pieces {
  float* next = reinterpret_cast<float*>(shared_memory());

  // `instead`: where it is if it does not fit.
  EFFATTN_DEVICE float* take(int64_t floats, float* instead) {
    if (instead != nullptr) return instead;
    float* const piece = next;
    next += floats;
    return piece;
  }
};

// Logits of some queries of each window, scale q k^T + bias, and their softmax.
EFFATTN_DEVICE void attention_weights(const Cascade& p, int head, int windows, int first, int rows,
                                      const float* q, const float* qkv, float* logits) {
  const int tokens = p.tokens();
  products<false, false>(
      kWarps, windows, rows, tokens, p.key_dim,
      [&](int w, int row, int c) { return q[(w * tokens + first + row) * p.q_stride() + c]; },
      [&](int w, int c, int key) { return qkv[(w * tokens + key) * p.qkv_stride() + p.key_dim + c]; },
      [&](int w, int row, int key, float x) {
        const float bias = p.bias[(static_cast<int64_t>(head) * tokens + first + row) * tokens + key];
        logits[static_cast<int64_t>(w * rows + row) * p.logit_stride() + key] = p.scale * x + bias;
      });
  sync_block();
  softmax_rows(kWarps, logits, windows * rows, tokens, p.logit_stride());
  sync_block();
}

// Windows `together` at a time; if kKept, everything stays where the backward finds it, and nothing is
// written to out.
template <bool kKept>
EFFATTN_KERNEL(kThreads, 2)
walk(EFFATTN_PARAMETERS(Cascade) p) {
  const int tokens = p.tokens(), outputs = p.outputs();
  const int64_t window0 = block_index() * p.together;
  const int windows = static_cast<int>(min(p.together, p.windows - window0)), all = windows * tokens;
  const int64_t places = static_cast<int64_t>(p.together) * tokens;
  const auto own = [&](float* of_blocks, int64_t floats) {
    return of_blocks == nullptr || kKept ? of_blocks : of_blocks + block_index() * floats;
  };
  Pieces pieces;
  float* const logits = pieces.take(
      static_cast<int64_t>(p.together) * p.rows * p.logit_stride(),
      p.logits == nullptr ? nullptr : p.logits + block_index() * p.together * p.rows * p.logit_stride());
  float* const feats = pieces.take(places * p.feat_stride(), own(p.feats, places * p.feat_stride()));
  float* const qkvs = pieces.take(places * p.qkv_stride(), own(p.qkvs, places * p.qkv_stride()));
  float* const qs = pieces.take(places * p.q_stride(), own(p.qs, places * p.q_stride()));
  for (int head = 0; head < p.heads; ++head) {
    const int64_t slot = kKept ? (window0 * p.heads + head) * tokens : 0;
    float* const feat = feats + slot * p.feat_stride();
    float* const next_feat = feat + (kKept ? static_cast<int64_t>(tokens) * p.feat_stride() : 0);
    float* const qkv = qkvs + slot * p.qkv_stride();
    float* const q = qs + slot * p.q_stride();
    const HeadWeights<const float>& weights = p.weights[head];
    if (head == 0) {
      for_each<kThreads>(all * p.value_dim, [&](int i) {
        const int c = i / all, at = i % all;
        const Window window(p, window0 + at / tokens);
        feat[at * p.feat_stride() + c] = load(p, p.x, window, at % tokens, c);
      });
      sync_block();
    }
    products<false, false>(
        kWarps, 1, all, outputs, p.value_dim,
        [&](int, int row, int c) { return feat[row * p.feat_stride() + c]; },
        [&](int, int c, int output) { return weights.qkv[output * p.value_dim + c]; },
        [&](int, int row, int output, float x) {
          qkv[row * p.qkv_stride() + output] =
              x + (weights.qkv_bias != nullptr ? weights.qkv_bias[output] : 0.0f);
        });
    sync_block();
    for_each<kThreads>(all * p.key_dim, [&](int i) {
      const int c = i % p.key_dim, at = i / p.key_dim, begin = at / tokens * tokens;
      const float x = convolved<1>(p, head, qkv + begin * p.qkv_stride(), p.qkv_stride(), at - begin, c);
      q[at * p.q_stride() + c] = x + (weights.depthwise_bias != nullptr ? weights.depthwise_bias[c] : 0.0f);
    });
    sync_block();
    if (kKept && head + 1 == p.heads) return;  // its output is no other head's input
    for (int first = 0; first < tokens; first += p.rows) {
      const int rows = least(p.rows, tokens - first);
      attention_weights(p, head, windows, first, rows, q, qkv, logits);
      products<false, false>(
          kWarps, windows, rows, p.value_dim, tokens,
          [&](int w, int row, int key) {
            return logits[static_cast<int64_t>(w * rows + row) * p.logit_stride() + key];
          },
          [&](int w, int key, int c) { return qkv[(w * tokens + key) * p.qkv_stride() + 2 * p.key_dim + c]; },
          [&](int w, int row, int c, float x) {
            const Window window(p, window0 + w);
            const int token = first + row, channel = head * p.value_dim + c;
            if (!kKept) store(p, p.out, window, token, channel, x);
            if (head + 1 == p.heads) return;
            // What a window has too much is no part of the image, but the next head reads it.
            next_feat[(w * tokens + token) * p.feat_stride() + c] =
                x + load(p, p.x, window, token, channel + p.value_dim);
          });
      sync_block();
    }
  }
}

// All heads of a window, from the last.
EFFATTN_KERNEL(kThreads, 2)
walk_back(EFFATTN_PARAMETERS(Cascade) p) {
  const int tokens = p.tokens();
  const Window window(p, block_index());
  float* const grad = p.grads + block_index() * tokens * p.feat_stride();
  float* const softmax = p.softmaxes + block_index() * tokens * p.logit_stride();
  for (int head = p.heads - 1; head >= 0; --head) {
    const int64_t slot = (block_index() * p.heads + head) * tokens;
    const float* const qkv = p.qkvs + slot * p.qkv_stride();
    const float* const q = p.qs + slot * p.q_stride();
    float* const grad_q = p.grad_qs + slot * p.q_stride();
    float* const grad_qkv = p.grad_qkvs + slot * p.qkv_stride();
    float* const grad_logits = p.grad_logits + slot * p.logit_stride();
    if (head + 1 == p.heads) {
      for_each<kThreads>(tokens * p.value_dim, [&](int i) {
        const int c = i / tokens, token = i % tokens;
        grad[token * p.feat_stride() + c] = load(p, p.grad_out, window, token, head * p.value_dim + c);
      });
    }
    attention_weights(p, head, 1, 0, tokens, q, qkv, softmax);
    products<false, false>(
        kWarps, 1, tokens, tokens, p.value_dim,
        [&](int, int row, int c) { return grad[row * p.feat_stride() + c]; },
        [&](int, int c, int key) { return qkv[key * p.qkv_stride() + 2 * p.key_dim + c]; },
        [&](int, int row, int key, float x) { grad_logits[row * p.logit_stride() + key] = x; });
    sync_block();
    softmax_rows_backward(kWarps, softmax, grad_logits, tokens, tokens, p.logit_stride());
    sync_block();
    products<false, false>(
        kWarps, 1, tokens, p.key_dim, tokens,
        [&](int, int row, int key) { return grad_logits[row * p.logit_stride() + key]; },
        [&](int, int key, int c) { return qkv[key * p.qkv_stride() + p.key_dim + c]; },
        [&](int, int row, int c, float x) { grad_q[row * p.q_stride() + c] = p.scale * x; });
    products<false, false>(
        kWarps, 1, tokens, p.key_dim, tokens,
        [&](int, int key, int row) { return grad_logits[row * p.logit_stride() + key]; },
        [&](int, int row, int c) { return q[row * p.q_stride() + c]; },
        [&](int, int key, int c, float x) { grad_qkv[key * p.qkv_stride() + p.key_dim + c] = p.scale * x; });
    products<false, false>(
        kWarps, 1, tokens, p.value_dim, tokens,
        [&](int, int key, int row) { return softmax[row * p.logit_stride() + key]; },
        [&](int, int row, int c) { return grad[row * p.feat_stride() + c]; },
        [&](int, int key, int c, float x) { grad_qkv[key * p.qkv_stride() + 2 * p.key_dim + c] = x; });
    sync_block();
    for_each<kThreads>(tokens * p.key_dim, [&](int i) {
      const int c = i % p.key_dim, token = i / p.key_dim;
      grad_qkv[token * p.qkv_stride() + c] = convolved<-1>(p, head, grad_q, p.q_stride(), token, c);
    });
    sync_block();
    products<false, false>(
        kWarps, 1, tokens, p.value_dim, p.outputs(),
        [&](int, int row, int output) { return grad_qkv[row * p.qkv_stride() + output]; },
        [&](int, int output, int c) { return p.weights[head].qkv[output * p.value_dim + c]; },
        [&](int, int token, int c, float x) {
          store(p, p.grad_x, window, token, head * p.value_dim + c, x);
          if (head == 0) return;
          // What this head took is the output of the one before.
          grad[token * p.feat_stride() + c] =
              x + load(p, p.grad_out, window, token, (head - 1) * p.value_dim + c);
        });
    sync_block();
  }
}

// Of a head's weights over a part of all windows. The bias is one more input, which is 1.
struct WeightGradients {
  Cascade of;
  int head, part_windows;
  int64_t parts;
  HeadWeights<float> sums;  // (parts, ...)
};

EFFATTN_KERNEL(kThreads, 2)
projection_gradients(EFFATTN_PARAMETERS(WeightGradients) p) {
  const Cascade& c = p.of;
  const int tokens = c.tokens(), outputs = c.outputs();
  const int tiles = (outputs + kTileRows - 1) / kTileRows;
  const int64_t part = block_index() / tiles, first = part * p.part_windows;
  const int row0 = static_cast<int>(block_index() % tiles) * kTileRows;
  const int windows = static_cast<int>(min(p.part_windows, c.windows - first));
  const auto slot = [&](int k) { return ((first + k / tokens) * c.heads + p.head) * tokens + k % tokens; };
  products<false, false>(
      kWarps, 1, least(kTileRows, outputs - row0), c.value_dim + 1, windows * tokens,
      [&](int, int row, int k) { return c.grad_qkvs[slot(k) * c.qkv_stride() + row0 + row]; },
      [&](int, int k, int col) {
        return col < c.value_dim ? c.feats[slot(k) * c.feat_stride() + col] : 1.0f;
      },
      [&](int, int row, int col, float x) {
        if (col < c.value_dim) {
          p.sums.qkv[(part * outputs + row0 + row) * c.value_dim + col] = x;
        } else if (p.sums.qkv_bias != nullptr) {
          p.sums.qkv_bias[part * outputs + row0 + row] = x;
        }
      });
}

// A warp a tap; behind the last one the bias.
EFFATTN_KERNEL(kThreads, 2)
tap_gradients(EFFATTN_PARAMETERS(WeightGradients) p) {
  const Cascade& c = p.of;
  const int tokens = c.tokens(), kernel = c.kernels[p.head], taps = kernel * kernel;
  const int64_t part = block_index() / c.key_dim, first = part * p.part_windows;
  const int channel = static_cast<int>(block_index() % c.key_dim);
  const int windows = static_cast<int>(min(p.part_windows, c.windows - first));
  for (int tap = warp_index(); tap < taps + 1; tap += kWarps) {
    const bool is_bias = tap == taps;
    const int down = is_bias ? 0 : tap / kernel - kernel / 2, right = is_bias ? 0 : tap % kernel - kernel / 2;
    float total = 0;
    for (int k = lane_index(); k < windows * tokens; k += kLanes) {
      const int token = k % tokens, row = token / c.window_width + down, col = token % c.window_width + right;
      if (row < 0 || row >= c.window_height || col < 0 || col >= c.window_width) continue;
      const int64_t slot = ((first + k / tokens) * c.heads + p.head) * tokens;
      const float grad = c.grad_qs[(slot + token) * c.q_stride() + channel];
      const int64_t at = slot + row * c.window_width + col;
      total += is_bias ? grad : grad * c.qkvs[at * c.qkv_stride() + channel];
    }
    total = sum_of_warp(total);
    if (lane_index() != 0) continue;
    if (!is_bias) {
      p.sums.depthwise[(part * c.key_dim + channel) * taps + tap] = total;
    } else if (p.sums.depthwise_bias != nullptr) {
      p.sums.depthwise_bias[part * c.key_dim + channel] = total;
    }
  }
}

// Rows of logits without what lies between them.
struct Compact {
  const float* from;
  float* to;
  int64_t rows;
  int cols, stride;
};

EFFATTN_KERNEL(kThreads, 2)
compact(EFFATTN_PARAMETERS(Compact) p) {
  const int64_t i = block_index() * kThreads + thread_index();
  if (i < p.rows * p.cols) p.to[i] = p.from[i / p.cols * p.stride + i % p.cols];
}

// --- launches ---------------------------------------------------------------------------------------

const RegisteredOperator registered("cascaded_group_attention", {{"heads", kMostHeads}});

// Where each piece of a block's memory goes: what does not fit is the workspace's. Returns the shared bytes.
int64_t place(Cascade& p, bool all_kept, const Execution& execution) {
  const auto logits = [&] { return int64_t{4} * p.together * p.rows * p.logit_stride(); };
  if (logits() > kMostSharedBytes / 2) p.rows = least(p.rows, kFewQueries);
  int64_t left = kMostSharedBytes;
  const int64_t blocks = ceil_div(p.windows, p.together), places = int64_t{p.together} * p.tokens();
  const auto fit = [&](float*& piece, int64_t floats) {
    if (4 * floats <= left) {
      left -= 4 * floats;
    } else {
      piece = execution.workspace(blocks * floats);
    }
  };
  fit(p.logits, logits() / 4);
  if (!all_kept) {
    fit(p.feats, places * p.feat_stride());
    fit(p.qkvs, places * p.qkv_stride());
    fit(p.qs, places * p.q_stride());
  }
  return kMostSharedBytes - left;
}

}  // namespace

Cascade cascade_of(const CascadeParams& problem) {
  if (problem.heads > kMostHeads) {
    throw std::runtime_error("effattn: the kernels take cascades of up to " + std::to_string(kMostHeads) +
                             " heads, not " + std::to_string(problem.heads));
  }
  const int64_t row = max(problem.window_tokens(), 2 * problem.key_dim + problem.value_dim) + 11;
  if (problem.window_tokens() * row > INT32_MAX || row * problem.value_dim > INT32_MAX) {
    throw std::runtime_error(
        "effattn: the kernels take windows whose tokens times what is kept of each are below 2^31, "
        "got " +
        std::to_string(problem.window_tokens()) + " times " + std::to_string(row));
  }
  Cascade p{};
  p.dtype = problem.dtype;
  p.x = problem.x;
  p.windows = problem.batch * problem.windows();
  p.heads = static_cast<int>(problem.heads);
  p.key_dim = static_cast<int>(problem.key_dim);
  p.value_dim = static_cast<int>(problem.value_dim);
  p.height = static_cast<int>(problem.height);
  p.width = static_cast<int>(problem.width);
  p.window_height = static_cast<int>(problem.window_height);
  p.window_width = static_cast<int>(problem.window_width);
  p.down = static_cast<int>(problem.windows_down());
  p.across = static_cast<int>(problem.windows_across());
  p.scale = problem.scale;
  p.bias = problem.bias;
  for (int h = 0; h < p.heads; ++h) {
    p.weights[h] = problem.weights[h];
    p.kernels[h] = static_cast<int>(problem.kernels[h]);
  }
  p.together = 1;
  p.rows = p.tokens();
  return p;
}

void cascaded_group_attention(const CascadeParams& problem, const Execution& execution) {
  Cascade p = cascade_of(problem);
  if (p.windows == 0 || p.value_dim == 0) return;
  p.out = problem.out;
  if (cascade_of_small_windows(p, execution)) return;
  const int64_t enough = ceil_div(p.windows, execution.card.multiprocessors);
  p.together = static_cast<int>(max(1, min(enough, kTokens / p.tokens())));
  const int64_t shared = place(p, false, execution);
  launch(walk<false>, {ceil_div(p.windows, p.together), kThreads, shared}, execution, p);
}

void cascaded_group_attention_backward(const CascadeParams& problem, const Execution& execution) {
  Cascade p = cascade_of(problem);
  const int64_t tokens = p.windows * p.tokens(), of_heads = tokens * p.heads;
  p.grad_out = problem.grad_out;
  p.grad_x = problem.grad_x;
  p.feats = execution.workspace(of_heads * p.feat_stride());
  p.qkvs = execution.workspace(of_heads * p.qkv_stride());
  p.qs = execution.workspace(of_heads * p.q_stride());
  p.grads = execution.workspace(tokens * p.feat_stride());
  p.softmaxes = execution.workspace(tokens * p.logit_stride());
  p.grad_logits = execution.workspace(of_heads * p.logit_stride());
  p.grad_qs = execution.workspace(of_heads * p.q_stride());
  p.grad_qkvs = execution.workspace(of_heads * p.qkv_stride());
  Cascade forward = p;
  const int64_t shared = place(forward, true, execution);
  launch(walk<true>, {p.windows, kThreads, shared}, execution, forward);
  launch(walk_back, {p.windows, kThreads}, execution, p);

  const int64_t rows = int64_t{p.heads} * p.tokens();
  float* const grad_bias = execution.workspace(rows * p.logit_stride());
  add_up(p.grad_logits, grad_bias, 1, p.windows, rows * p.logit_stride(), execution);
  launch(compact, {ceil_div(rows * p.tokens(), kThreads), kThreads}, execution,
         Compact{grad_bias, problem.grad_bias, rows, p.tokens(), p.logit_stride()});
  const Split parts = split(p.heads, tokens, p.tokens(), Card{});
  for (int head = 0; head < p.heads; ++head) {
    const HeadWeights<float>& into = problem.gradients[head];
    WeightGradients g{p, head, parts.part_tokens / p.tokens(), parts.parts, into};
    const int64_t taps = int64_t{p.kernels[head]} * p.kernels[head];
    const int64_t floats[] = {int64_t{p.outputs()} * p.value_dim, p.outputs(), p.key_dim * taps, p.key_dim};
    float* HeadWeights<float>::* const members[] = {&HeadWeights<float>::qkv, &HeadWeights<float>::qkv_bias,
                                                    &HeadWeights<float>::depthwise,
                                                    &HeadWeights<float>::depthwise_bias};
    for (int i = 0; i < 4 && g.parts > 1; ++i) {
      if (into.*members[i] != nullptr) g.sums.*members[i] = execution.workspace(g.parts * floats[i]);
    }
    const int64_t tiles = ceil_div(p.outputs(), kTileRows);
    launch(projection_gradients, {g.parts * tiles, kThreads}, execution, g);
    launch(tap_gradients, {g.parts * p.key_dim, kThreads}, execution, g);
    for (int i = 0; i < 4 && g.parts > 1; ++i) {
      if (into.*members[i] != nullptr)
        add_up(g.sums.*members[i], into.*members[i], 1, g.parts, floats[i], execution);
    }
  }
}

}  // namespace effattn::cuda
