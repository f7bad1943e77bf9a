// Cascaded group attention, backward: goes forward once more and keeps everything, then back from the last
// head, and then sums the gradients of the weights over all windows.
#include "api.h"

#include "../core/reduction.h"
#include "heads.h"

namespace effattn::cuda {
namespace cascade {
namespace {

// All heads of a window, from the last.
EFFATTN_KERNEL(kThreads, 2)
cga_backward(EFFATTN_PARAMETERS(Cascade) p) {
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
    products(
        kWarps, 1, tokens, tokens, p.value_dim,
        [&](int, int row, int c) { return grad[row * p.feat_stride() + c]; },
        [&](int, int c, int key) { return qkv[key * p.qkv_stride() + 2 * p.key_dim + c]; },
        [&](int, int row, int key, float x) { grad_logits[row * p.logit_stride() + key] = x; });
    sync_block();
    softmax_rows_backward(kWarps, softmax, grad_logits, tokens, tokens, p.logit_stride());
    sync_block();
    products(
        kWarps, 1, tokens, p.key_dim, tokens,
        [&](int, int row, int key) { return grad_logits[row * p.logit_stride() + key]; },
        [&](int, int key, int c) { return qkv[key * p.qkv_stride() + p.key_dim + c]; },
        [&](int, int row, int c, float x) { grad_q[row * p.q_stride() + c] = p.scale * x; });
    products(
        kWarps, 1, tokens, p.key_dim, tokens,
        [&](int, int key, int row) { return grad_logits[row * p.logit_stride() + key]; },
        [&](int, int row, int c) { return q[row * p.q_stride() + c]; },
        [&](int, int key, int c, float x) { grad_qkv[key * p.qkv_stride() + p.key_dim + c] = p.scale * x; });
    products(
        kWarps, 1, tokens, p.value_dim, tokens,
        [&](int, int key, int row) { return softmax[row * p.logit_stride() + key]; },
        [&](int, int row, int c) { return grad[row * p.feat_stride() + c]; },
        [&](int, int key, int c, float x) { grad_qkv[key * p.qkv_stride() + 2 * p.key_dim + c] = x; });
    sync_block();
    const int kernel = p.kernels[head];
    for_each<kThreads>(tokens * p.key_dim, [&](int i) {
      const int c = i % p.key_dim, token = i / p.key_dim;
      grad_qkv[token * p.qkv_stride() + c] = convolved<-1>(
          p, kernel, p.weights[head].depthwise + c * kernel * kernel, grad_q + c, p.q_stride(), token);
    });
    sync_block();
    products(
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
  products(
      kWarps, 1, min(kTileRows, outputs - row0), c.value_dim + 1, windows * tokens,
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
    total = warp_sum(total);
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

}  // namespace
}  // namespace cascade

void cascaded_group_attention_backward(const CascadeParams& params, const Execution& execution) {
  using namespace cascade;
  Cascade p = cascade_of(params);
  const int64_t tokens = p.windows * p.tokens(), of_heads = tokens * p.heads;
  p.grad_out = params.grad_out;
  p.grad_x = params.grad_x;
  p.feats = execution.workspace(of_heads * p.feat_stride());
  p.qkvs = execution.workspace(of_heads * p.qkv_stride());
  p.qs = execution.workspace(of_heads * p.q_stride());
  p.grads = execution.workspace(tokens * p.feat_stride());
  p.softmaxes = execution.workspace(tokens * p.logit_stride());
  p.grad_logits = execution.workspace(of_heads * p.logit_stride());
  p.grad_qs = execution.workspace(of_heads * p.q_stride());
  p.grad_qkvs = execution.workspace(of_heads * p.qkv_stride());
  Cascade forward = p;
  const int64_t shared = plan_memory(forward, true, execution);
  launch(cga_forward<true>, {p.windows, kThreads, shared}, execution, forward);
  launch(cga_backward, {p.windows, kThreads}, execution, p);

  const int64_t rows = int64_t{p.heads} * p.tokens();
  float* const grad_bias = execution.workspace(rows * p.logit_stride());
  add_up(p.grad_logits, grad_bias, 1, p.windows, rows * p.logit_stride(), execution);
  launch(compact, {ceil_div(rows * p.tokens(), kThreads), kThreads}, execution,
         Compact{grad_bias, params.grad_bias, rows, p.tokens(), p.logit_stride()});
  const Split parts = split_tokens(p.heads, tokens, p.tokens(), Gpu{});
  for (int head = 0; head < p.heads; ++head) {
    const int64_t taps = int64_t{p.kernels[head]} * p.kernels[head];
    using W = HeadWeights<float>;
    const PartialSums<W> sums(params.gradients[head],
                              {{&W::qkv, int64_t{p.outputs()} * p.value_dim},
                               {&W::qkv_bias, p.outputs()},
                               {&W::depthwise, p.key_dim * taps},
                               {&W::depthwise_bias, p.key_dim}},
                              parts.parts, execution);
    const WeightGradients g{p, head, parts.part_tokens / p.tokens(), parts.parts, sums.of_parts};
    launch(projection_gradients, {g.parts * ceil_div(p.outputs(), kTileRows), kThreads}, execution, g);
    launch(tap_gradients, {g.parts * p.key_dim, kThreads}, execution, g);
    sums.add_up();
  }
}

}  // namespace effattn::cuda
