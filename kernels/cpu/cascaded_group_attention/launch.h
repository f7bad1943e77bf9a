// What stays the same for a call of a cascade, in inference and in training: where a window's channels stand,
// and the weights as micro-kernels read them.
#pragma once

#include <vector>

#include "../channels_last/ukernels.h"
#include "../core/arena.h"
#include "../softmax_attention/ukernels.h"
#include "plan.h"

namespace effattn::cpu::cascade {

constexpr int kParts = 3;                   // q, k and v
constexpr int64_t kMaxSums = 16;            // into which the gradients of the weights are split
constexpr int64_t kMaxSumFloats = 1 << 22;  // of all of them

// The weights of a head as micro-kernels read them.
struct Weights {
  const float *qkv, *bias, *taps, *tap_bias;
};

struct LaunchPlan {
  const CascadeParams& p;
  const ChannelsLastUkernels& ukernels = channels_last_ukernels();
  const SoftmaxUkernels& softmax = softmax_ukernels();
  int64_t d, dk, stride, tokens, max_kernel;  // q, k and v stand side by side in rows of `stride` floats

  explicit LaunchPlan(const CascadeParams& params)
      : p(params),
        d(round_up(p.value_dim, kWholeVectors)),
        dk(round_up(p.key_dim, kWholeVectors)),
        stride(2 * dk + d),
        tokens(p.window_tokens()),
        max_kernel(1) {
    for (int64_t h = 0; h < p.heads; ++h) max_kernel = max(max_kernel, p.kernels[h]);
  }

  int64_t outputs() const { return 2 * p.key_dim + p.value_dim; }
  int64_t first(int part) const { return part * dk; }
  int64_t first_output(int part) const { return part * p.key_dim; }
  int64_t size(int part) const { return part < 2 ? p.key_dim : p.value_dim; }
  bool is_padded() const { return d != p.value_dim || dk != p.key_dim; }
  int64_t taps(int64_t head) const { return p.kernels[head] * p.kernels[head]; }
  int64_t max_taps() const { return max_kernel * max_kernel; }

  // Rows of a window's tokens, and q as an image.
  Rows<float> rows(int64_t width, Arena& arena) const { return {arena.floats(tokens * width), width}; }
  PaddedImage padded(Arena& arena) const {
    PaddedImage image{nullptr, p.window_height, p.window_width, dk, max_kernel / 2};
    image.data = arena.floats(image.floats());
    return image;
  }

  SoftmaxHeads heads(int64_t head) const {
    const float* const bias = p.bias + head * tokens * tokens;
    return {1, tokens, tokens, p.key_dim, p.value_dim, p.softmax_scale, bias, tokens * tokens, {}};
  }
  // One head.
  template <class Float>
  HeadRows<Float> head(const Rows<Float>& rows) const {
    return {rows.data, 0, rows.stride};
  }
  void attend(int64_t h, const Rows<float>& q, const Rows<float>& qkv, const Rows<float>& out,
              const Arena& scratch) const {
    softmax.forward(heads(h), head(q), head(qkv.from(0, first(1))), head(qkv.from(0, first(2))), head(out),
                    scratch);
  }
  // grad_qkv: of k and v, written.
  void attend_backward(int64_t h, const Rows<float>& q, const Rows<float>& qkv, const Rows<float>& grad_out,
                       const Rows<float>& grad_q, const Rows<float>& grad_qkv, float* grad_bias,
                       const Arena& scratch) const {
    softmax.backward(
        heads(h), head(q), head(qkv.from(0, first(1))), head(qkv.from(0, first(2))), head(grad_out),
        {head(grad_q), head(grad_qkv.from(0, first(1))), head(grad_qkv.from(0, first(2))), grad_bias, {}},
        scratch);
  }

  // The part of a window that lies in the image.
  struct Inside {
    int64_t y, x, rows, cols;
  };
  Inside inside(int64_t window) const {
    const int64_t y = window / p.windows_across() * p.window_height;
    const int64_t x = window % p.windows_across() * p.window_width;
    return {y, x, min(p.window_height, p.height - y), min(p.window_width, p.width - x)};
  }

  // Calls f(token of the window, token of the image, tokens) for the runs of tokens inside.
  template <class F>
  void for_runs(int64_t window, const F& f) const {
    const Inside in = inside(window);
    if (p.window_width == p.width) return f(0, in.y * p.width, in.rows * in.cols);
    for (int64_t y = 0; y < in.rows; ++y) f(y * p.window_width, (in.y + y) * p.width + in.x, in.cols);
  }

  // The same in an image in blocks of channels; in place of a token of the image its pixels.
  template <class F>
  void for_rows(const BlockedImage& image, int64_t head, int64_t unit, const F& f) const {
    const int64_t batch = unit / p.windows();
    const Inside in = inside(unit % p.windows());
    for (int64_t y = 0; y < in.rows; ++y) {
      for (int64_t c = 0; c < p.value_dim; c += kWholeVectors) {
        float* const block = image.data + batch * image.batch_stride +
                             (head * p.value_dim + c) / kWholeVectors * image.block_stride;
        f(y * p.window_width, c, block + (in.y + y) * image.row_stride + in.x * kWholeVectors, in.cols);
      }
    }
  }
  void load(const BlockedImage& image, int64_t head, int64_t unit, const Rows<float>& to) const {
    const Inside in = inside(unit % p.windows());
    if (in.rows * in.cols < tokens) clear(to.data, tokens * to.stride);
    for_rows(image, head, unit, [&](int64_t token, int64_t channel, const float* pixels, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        copy(to.row(token + i) + channel, pixels + i * kWholeVectors, kWholeVectors);
      }
    });
  }
  void store(const Rows<float>& from, const BlockedImage& image, int64_t head, int64_t unit) const {
    for_rows(image, head, unit, [&](int64_t token, int64_t channel, float* pixels, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        copy(pixels + i * kWholeVectors, from.row(token + i) + channel, kWholeVectors);
      }
    });
  }

  // A head's channels of a window; unit: of the windows of the whole batch.
  void load(const Image& image, int64_t head, int64_t unit, const Rows<float>& to) const {
    const int64_t batch = unit / p.windows(), window = unit % p.windows();
    const Inside in = inside(window);
    if (in.rows * in.cols < tokens) clear(to.data, tokens * to.stride);
    for_runs(window, [&](int64_t token, int64_t of_image, int64_t count) {
      ukernels.load(p.dtype, channels_from(p.dtype, image, batch, head * p.value_dim, of_image), count,
                    p.value_dim, to.from(token));
    });
  }
  void store(const Rows<float>& from, const Image& image, int64_t head, int64_t unit) const {
    const int64_t batch = unit / p.windows(), window = unit % p.windows();
    for_runs(window, [&](int64_t token, int64_t of_image, int64_t count) {
      ukernels.store(p.dtype, channels_from(p.dtype, image, batch, head * p.value_dim, of_image), count,
                     p.value_dim, from.from(token));
    });
  }

  std::vector<Weights> packed_weights() const {
    std::vector<Weights> all;
    int64_t tap = 0;
    for (int64_t h = 0; h < p.heads; tap += taps(h++)) {
      all.push_back({p.packed.qkv + h * p.value_dim * stride, p.packed.qkv_bias + h * stride,
                     p.packed.taps + tap * dk, p.packed.tap_bias + h * dk});
    }
    return all;
  }
};

// A head's weights where they are laid out.
struct LaidOutHead {
  float *qkv, *bias, *taps, *tap_bias;
};

inline void lay_out(const LaunchPlan& plan, int64_t h, const LaidOutHead& to) {
  const CascadeParams& p = plan.p;
  const HeadWeights<const float>& from = p.weights[h];
  if (plan.is_padded()) clear(to.qkv, p.value_dim * plan.stride);
  for (int part = 0; part < kParts; ++part) {
    const int64_t row = plan.first_output(part), width = part < 2 ? plan.dk : plan.d;
    plan.ukernels.transpose(from.qkv + row * p.value_dim, plan.size(part), p.value_dim,
                            {to.qkv + plan.first(part), plan.stride});
    copy_bias(from.qkv_bias == nullptr ? nullptr : from.qkv_bias + row, plan.size(part), width,
              to.bias + plan.first(part));
  }
  if (plan.is_padded()) clear(to.taps, plan.taps(h) * plan.dk);
  plan.ukernels.transpose(from.depthwise, p.key_dim, plan.taps(h), {to.taps, plan.dk});
  copy_bias(from.depthwise_bias, p.key_dim, plan.dk, to.tap_bias);
}

// Weights that are not packed, laid out once a call for all threads.
struct LaidOutWeights {
  std::vector<LaidOutHead> heads;

  LaidOutWeights(const LaunchPlan& plan, Arena& arena) {
    for (int64_t h = 0; h < plan.p.heads && plan.p.weights != nullptr; ++h) {
      LaidOutHead& head = heads.emplace_back();
      head.qkv = arena.floats(plan.p.value_dim * plan.stride);
      head.bias = arena.floats(plan.stride);
      head.taps = arena.floats(plan.taps(h) * plan.dk);
      head.tap_bias = arena.floats(plan.dk);
    }
  }

  // Fills them, in parallel: a head's weights are few, and what is gained must be worth waking threads for.
  std::vector<Weights> take(const LaunchPlan& plan, const Parallel& parallel) const {
    if (plan.p.weights == nullptr) return plan.packed_weights();
    const int64_t work = 4 * plan.p.value_dim * plan.outputs();  // a shuffle a float or so
    parallel(plan.p.heads, work, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) lay_out(plan, h, heads[h]);
    });
    std::vector<Weights> all;
    for (const LaidOutHead& head : heads) all.push_back({head.qkv, head.bias, head.taps, head.tap_bias});
    return all;
  }
};

// Where `pack` puts the weights of all heads.
struct PackedMemory {
  float *qkv, *bias, *taps, *tap_bias;

  PackedMemory(const LaunchPlan& plan, Arena& arena) {
    int64_t all_taps = 0;
    for (int64_t h = 0; h < plan.p.heads; ++h) all_taps += plan.taps(h);
    qkv = arena.floats(plan.p.heads * plan.p.value_dim * plan.stride);
    bias = arena.floats(plan.p.heads * plan.stride);
    taps = arena.floats(all_taps * plan.dk);
    tap_bias = arena.floats(plan.p.heads * plan.dk);
  }
};

// The weights of all heads as only the backward pass reads them.
struct BackwardWeights {
  struct Head {
    float* flipped;    // taps
    Rows<float> rows;  // of the projection, an output each
  };
  std::vector<Head> heads;

  BackwardWeights(const LaunchPlan& plan, Arena& arena) {
    for (int64_t h = 0; h < plan.p.heads; ++h) {
      float* const flipped = arena.floats(plan.taps(h) * plan.dk);
      heads.push_back({flipped, {arena.floats(plan.outputs() * plan.d), plan.d}});
    }
  }

  void take(const LaunchPlan& plan, const std::vector<Weights>& weights) const {
    const int64_t inputs = plan.p.value_dim;
    for (int64_t h = 0; h < plan.p.heads; ++h) {
      const auto& [flipped, rows] = heads[h];
      const int64_t taps = plan.taps(h);
      for (int64_t tap = 0; tap < taps; ++tap) {
        copy(flipped + tap * plan.dk, weights[h].taps + (taps - 1 - tap) * plan.dk, plan.dk);
      }
      if (plan.is_padded()) clear(rows.data, plan.outputs() * plan.d);
      for (int64_t o = 0; o < plan.outputs(); ++o) {
        copy(rows.row(o), plan.p.weights[h].qkv + o * inputs, inputs);
      }
    }
  }
};

// The gradients of a head's weights, laid out as micro-kernels add to them; its pieces are those of `sums`.
struct WeightSums {
  const LaunchPlan& plan;
  float *qkv, *bias, *taps, *tap_bias;

  WeightSums(const LaunchPlan& of_call, int64_t taps_count, PartialSums& sums, Arena& arena)
      : plan(of_call),
        qkv(sums.take(plan.outputs() * plan.d, arena)),
        bias(sums.take(plan.stride, arena)),
        taps(sums.take(taps_count * plan.dk, arena)),
        tap_bias(sums.take(plan.dk, arena)) {}

  // grad_feat is cleared first.
  void project_backward(const BackwardWeights::Head& weights, const Rows<float>& feat,
                        const Rows<float>& grad_qkv, const Rows<float>& grad_feat) const {
    clear(grad_feat.data, plan.tokens * plan.d);
    for (int part = 0; part < kParts; ++part) {
      const int64_t row = plan.first_output(part);
      plan.ukernels.project_backward(plan.tokens, plan.p.value_dim, plan.size(part), feat,
                                     grad_qkv.from(0, plan.first(part)), weights.rows.from(row), grad_feat,
                                     Rows<float>{qkv, plan.d}.from(row), bias + plan.first(part));
    }
  }

  void finish(int64_t head, const HeadWeights<float>& to) const {
    const CascadeParams& p = plan.p;
    for (int64_t o = 0; o < plan.outputs(); ++o)
      copy(to.qkv + o * p.value_dim, qkv + o * plan.d, p.value_dim);
    for (int part = 0; part < kParts && to.qkv_bias != nullptr; ++part) {
      copy(to.qkv_bias + plan.first_output(part), bias + plan.first(part), plan.size(part));
    }
    for (int64_t c = 0; c < p.key_dim; ++c) {
      for (int64_t tap = 0; tap < plan.taps(head); ++tap) {
        to.depthwise[c * plan.taps(head) + tap] = taps[tap * plan.dk + c];
      }
    }
    if (to.depthwise_bias != nullptr) copy(to.depthwise_bias, tap_bias, p.key_dim);
  }
};

}  // namespace effattn::cpu::cascade
