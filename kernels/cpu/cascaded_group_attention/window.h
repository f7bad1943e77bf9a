// What inference and training of a cascade share: where a window's channels stand, the weights as the passes
// read them, and a thread at work on a window.
#pragma once

#include <vector>

#include "plan.h"

namespace effattn::cpu::cascade {

using Problem = CascadeParams;

constexpr int kParts = 3;                    // q, k and v
constexpr int64_t kMostSums = 16;            // into which the gradients of the weights are split
constexpr int64_t kMostSumFloats = 1 << 22;  // of all of them

// Where the channels of q, k and v stand in a row, and the floats of pieces that every head has.
struct Layout {
  const Problem& p;
  int64_t d, dk, stride, tokens, border, largest_kernel;

  explicit Layout(const Problem& problem)
      : p(problem),
        d(round_up(p.value_dim, kWholeVectors)),
        dk(round_up(p.key_dim, kWholeVectors)),
        stride(2 * dk + d),
        tokens(p.window_tokens()),
        border(0),
        largest_kernel(1) {
    for (int64_t h = 0; h < p.heads; ++h) largest_kernel = max(largest_kernel, p.kernels[h]);
    border = largest_kernel / 2;
  }

  int64_t outputs() const { return 2 * p.key_dim + p.value_dim; }
  int64_t first(int part) const { return part * dk; }
  int64_t first_output(int part) const { return part * p.key_dim; }
  int64_t size(int part) const { return part < 2 ? p.key_dim : p.value_dim; }
  bool is_padded() const { return d != p.value_dim || dk != p.key_dim; }
  int64_t taps(int64_t head) const { return p.kernels[head] * p.kernels[head]; }
  PaddedImage padded(float* memory) const { return {memory, p.window_height, p.window_width, dk, border}; }

  SoftmaxHeads softmax(int64_t head) const {
    return {
        1, tokens, tokens, p.key_dim, p.value_dim, p.scale, p.bias + head * tokens * tokens, tokens * tokens,
        {}};
  }
};

// Memory in pieces of whole vectors, in order; without memory it counts.
class Pieces {
 public:
  enum class Holds { kResults, kNothing };  // what stands in the memory so far
  explicit Pieces(float* memory, Holds holds = Holds::kResults) : memory_(memory), holds_(holds) {}

  float* floats(int64_t count) {
    float* const piece = memory_ == nullptr ? nullptr : memory_ + taken_;
    const int64_t whole = round_up(count, kWholeVectors);
    taken_ += whole + kGapFloats;
    if (piece != nullptr && holds_ == Holds::kNothing) {
      spoil(piece, whole);
      poison(piece + whole, kGapFloats);
    }
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  float* memory_;
  Holds holds_;
  int64_t taken_ = 0;
};

// The weights of a head as the passes read them.
struct Weights {
  const float *qkv, *bias, *taps, *tap_bias;
};

inline std::vector<Weights> packed_weights(const Layout& of) {
  std::vector<Weights> all;
  const PackedHeads& from = of.p.packed;
  int64_t tap = 0;
  for (int64_t h = 0; h < of.p.heads; tap += of.taps(h++)) {
    all.push_back({from.qkv + h * of.p.value_dim * of.stride, from.qkv_bias + h * of.stride,
                   from.taps + tap * of.dk, from.tap_bias + h * of.dk});
  }
  return all;
}

// The same, laid out once a call for all threads.
struct LaidOut {
  float *qkv, *bias, *taps, *tap_bias;

  LaidOut(const Layout& of, int64_t head, Pieces& memory)
      : qkv(memory.floats(of.p.value_dim * of.stride)),
        bias(memory.floats(of.stride)),
        taps(memory.floats(of.taps(head) * of.dk)),
        tap_bias(memory.floats(of.dk)) {}

  void take(const Layout& of, int64_t head, const ChannelsLastPasses& passes) const {
    const HeadWeights<const float>& from = of.p.weights[head];
    if (of.is_padded()) clear(qkv, of.p.value_dim * of.stride);
    for (int part = 0; part < kParts; ++part) {
      const int64_t row = of.first_output(part), width = part < 2 ? of.dk : of.d;
      passes.transpose(from.qkv + row * of.p.value_dim, of.size(part), of.p.value_dim,
                       {qkv + of.first(part), of.stride});
      copy_bias(from.qkv_bias == nullptr ? nullptr : from.qkv_bias + row, of.size(part), width,
                bias + of.first(part));
    }
    if (of.is_padded()) clear(taps, of.taps(head) * of.dk);
    passes.transpose(from.depthwise, of.p.key_dim, of.taps(head), {taps, of.dk});
    copy_bias(from.depthwise_bias, of.p.key_dim, of.dk, tap_bias);
  }
};

// Of all heads; without memory it counts.
inline std::vector<LaidOut> lay_out(const Layout& of, Pieces& memory) {
  std::vector<LaidOut> all;
  for (int64_t h = 0; h < of.p.heads; ++h) all.emplace_back(of, h, memory);
  return all;
}

// What a layout takes of memory.
template <class Make>
int64_t floats_of(const Make& lay_out) {
  Pieces counted(nullptr);
  lay_out(counted);
  return counted.taken();
}

// What a head makes of a window's tokens.
struct Tokens {
  float *feat, *qkv, *q;

  Tokens(const Layout& of, Pieces& memory)
      : feat(memory.floats(of.tokens * of.d)),
        qkv(memory.floats(of.tokens * of.stride)),
        q(memory.floats(of.tokens * of.dk)) {}
};

// A thread at work on one window after the other.
struct Worker {
  const Layout& of;
  const Problem& p;
  const ChannelsLastPasses& passes;
  const SoftmaxPasses& softmax;

  explicit Worker(const Layout& layout)
      : of(layout),
        p(layout.p),
        passes(channels_last_passes(active_isa())),
        softmax(softmax_passes(active_isa())) {}

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

  void load(const Image& image, int64_t batch, int64_t head, int64_t window, float* to) const {
    const Inside in = inside(window);
    if (in.rows * in.cols < of.tokens) clear(to, of.tokens * of.d);
    for_runs(window, [&](int64_t token, int64_t of_image, int64_t count) {
      passes.load(p.dtype, channels_from(p.dtype, image, batch, head * p.value_dim, of_image), count,
                  p.value_dim, {to + token * of.d, of.d});
    });
  }
  void store(const float* from, const Image& image, int64_t batch, int64_t head, int64_t window) const {
    for_runs(window, [&](int64_t token, int64_t of_image, int64_t count) {
      passes.store(p.dtype, channels_from(p.dtype, image, batch, head * p.value_dim, of_image), count,
                   p.value_dim, {const_cast<float*>(from) + token * of.d, of.d});
    });
  }

  // From feat, which holds x's channels, to the head's output; `before`: the output of the head before, or
  // null.
  void forward(int64_t head, const Weights& weights, const Tokens& t, const float* before,
               const PaddedImage& padded, float* out, float* scratch) const {
    if (before != nullptr) passes.add(of.tokens, of.d, {before, of.d}, {t.feat, of.d});
    passes.project(of.tokens, p.value_dim, of.stride, {t.feat, of.d, 1}, {weights.qkv, of.stride},
                   weights.bias, {t.qkv, of.stride}, {});
    passes.fill({t.qkv, of.stride}, padded);
    passes.depthwise(p.kernels[head], padded, weights.taps, weights.tap_bias, {t.q, of.dk});
    softmax.forward(of.softmax(head), {t.q, 0, of.dk}, {t.qkv + of.first(1), 0, of.stride},
                    {t.qkv + of.first(2), 0, of.stride}, {out, 0, of.d}, scratch);
  }
};

// Fills what was laid out, in parallel. A head's weights are few; what is gained must be worth waking threads
// for.
inline std::vector<Weights> taken(const Layout& of, const std::vector<LaidOut>& laid_out,
                                  const Parallel& parallel) {
  const ChannelsLastPasses& passes = channels_last_passes(active_isa());
  const int64_t work = 4 * of.p.value_dim * of.outputs();  // a shuffle a float or so
  parallel(of.p.heads, work, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) laid_out[h].take(of, h, passes);
  });
  std::vector<Weights> all;
  for (const LaidOut& head : laid_out) all.push_back({head.qkv, head.bias, head.taps, head.tap_bias});
  return all;
}

// The weights of a head as only the backward pass reads them.
struct BackwardWeights {
  float *flipped, *rows;

  BackwardWeights(const Layout& of, int64_t head, Pieces& memory)
      : flipped(memory.floats(of.taps(head) * of.dk)), rows(memory.floats(of.outputs() * of.d)) {}

  void take(const Layout& of, int64_t head, const Weights& weights) const {
    const int64_t taps = of.taps(head), inputs = of.p.value_dim;
    for (int64_t tap = 0; tap < taps; ++tap) {
      copy(flipped + tap * of.dk, weights.taps + (taps - 1 - tap) * of.dk, of.dk);
    }
    if (of.is_padded()) clear(rows, of.outputs() * of.d);
    for (int64_t o = 0; o < of.outputs(); ++o) {
      copy(rows + o * of.d, of.p.weights[head].qkv + o * inputs, inputs);
    }
  }
};

}  // namespace effattn::cpu::cascade
