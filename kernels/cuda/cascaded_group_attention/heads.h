// Cascaded group attention: a block goes through all heads of some windows.
//
// What goes from one head to the next is in shared memory where it fits, else in workspace of the block's
// own; windows are cut out and put back by their addresses.
#pragma once

#include "../core/launch.h"
#include "cascade.h"

namespace effattn::cuda::cascade {

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

// Hands out shared memory.
struct Arena {
  float* next = reinterpret_cast<float*>(shared_memory());

  // `instead`: the workspace of what does not fit.
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
  products(
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

// Some windows at a time; if kKept, everything stays where the backward finds it, and nothing is
// written to out.
template <bool kKept>
EFFATTN_KERNEL(kThreads, 2)
cga_forward(EFFATTN_PARAMETERS(Cascade) p) {
  const int tokens = p.tokens(), outputs = p.outputs();
  const int64_t window0 = block_index() * p.windows_per_block;
  const int windows = static_cast<int>(min(p.windows_per_block, p.windows - window0)), all = windows * tokens;
  const int64_t places = static_cast<int64_t>(p.windows_per_block) * tokens;
  const auto own = [&](float* of_blocks, int64_t floats) {
    return of_blocks == nullptr || kKept ? of_blocks : of_blocks + block_index() * floats;
  };
  Arena arena;
  float* const logits = arena.take(
      static_cast<int64_t>(p.windows_per_block) * p.rows * p.logit_stride(),
      p.logits == nullptr ? nullptr
                          : p.logits + block_index() * p.windows_per_block * p.rows * p.logit_stride());
  float* const feats = arena.take(places * p.feat_stride(), own(p.feats, places * p.feat_stride()));
  float* const qkvs = arena.take(places * p.qkv_stride(), own(p.qkvs, places * p.qkv_stride()));
  float* const qs = arena.take(places * p.q_stride(), own(p.qs, places * p.q_stride()));
  for (int head = 0; head < p.heads; ++head) {
    const int64_t slot = kKept ? (window0 * p.heads + head) * tokens : 0;
    float* const feat = feats + slot * p.feat_stride();
    float* const next_feat = feat + (kKept ? static_cast<int64_t>(tokens) * p.feat_stride() : 0);
    float* const qkv = qkvs + slot * p.qkv_stride();
    float* const q = qs + slot * p.q_stride();
    const HeadWeights<const float>& weights = p.weights[head];
    const int kernel = p.kernels[head];
    if (head == 0) {
      for_each<kThreads>(all * p.value_dim, [&](int i) {
        const int c = i / all, at = i % all;
        const Window window(p, window0 + at / tokens);
        feat[at * p.feat_stride() + c] = load(p, p.x, window, at % tokens, c);
      });
      sync_block();
    }
    products(
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
      const float x = convolved<1>(p, kernel, weights.depthwise + c * kernel * kernel,
                                   qkv + begin * p.qkv_stride() + c, p.qkv_stride(), at - begin);
      q[at * p.q_stride() + c] = x + (weights.depthwise_bias != nullptr ? weights.depthwise_bias[c] : 0.0f);
    });
    sync_block();
    if (kKept && head + 1 == p.heads) return;  // its output is no other head's input
    for (int first = 0; first < tokens; first += p.rows) {
      const int rows = min(p.rows, tokens - first);
      attention_weights(p, head, windows, first, rows, q, qkv, logits);
      products(
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
            // Tokens of a window beyond the image are not written, but the next head reads them.
            next_feat[(w * tokens + token) * p.feat_stride() + c] =
                x + load(p, p.x, window, token, channel + p.value_dim);
          });
      sync_block();
    }
  }
}

// --- launches ---------------------------------------------------------------------------------------

// Workspace for what of a block does not fit into shared memory. Returns the shared bytes.
inline int64_t plan_memory(Cascade& p, bool all_kept, const Execution& execution) {
  const auto logits = [&] { return int64_t{4} * p.windows_per_block * p.rows * p.logit_stride(); };
  if (logits() > kMaxSharedBytes / 2) p.rows = min(p.rows, kFewQueries);
  int64_t left = kMaxSharedBytes;
  const int64_t blocks = ceil_div(p.windows, p.windows_per_block),
                places = int64_t{p.windows_per_block} * p.tokens();
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
  return kMaxSharedBytes - left;
}

// Without what depends on the kernel.
inline Cascade cascade_of(const CascadeParams& params) {
  require(params.heads <= kMaxHeads, "the kernels take cascades of up to ", kMaxHeads, " heads, not ",
          params.heads);
  const int64_t row = max(params.window_tokens(), 2 * params.key_dim + params.value_dim) + 11;
  require(params.window_tokens() * row <= INT32_MAX && row * params.value_dim <= INT32_MAX,
          "the kernels take windows whose tokens times what is kept of each are below 2^31, got ",
          params.window_tokens(), " times ", row);
  Cascade p{};
  p.dtype = params.dtype;
  p.x = params.x;
  p.windows = params.batch * params.windows();
  p.heads = static_cast<int>(params.heads);
  p.key_dim = static_cast<int>(params.key_dim);
  p.value_dim = static_cast<int>(params.value_dim);
  p.height = static_cast<int>(params.height);
  p.width = static_cast<int>(params.width);
  p.window_height = static_cast<int>(params.window_height);
  p.window_width = static_cast<int>(params.window_width);
  p.down = static_cast<int>(params.windows_down());
  p.across = static_cast<int>(params.windows_across());
  p.scale = params.softmax_scale;
  p.bias = params.bias;
  for (int h = 0; h < p.heads; ++h) {
    p.weights[h] = params.weights[h];
    p.kernels[h] = static_cast<int>(params.kernels[h]);
  }
  p.windows_per_block = 1;
  p.rows = p.tokens();
  return p;
}

}  // namespace effattn::cuda::cascade
