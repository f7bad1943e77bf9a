// A thread at work on strips of one group of channels, and what stays the same for a call. Shared by the
// schedules of the multi-scale operators.
#pragma once

#include "plan.h"
#include "../core/schedule.h"

namespace effattn::cpu {

constexpr int64_t kStripTokens = 1024;  // of a group: 64 KiB at head_dim 16
constexpr int64_t kMinRows = 4;         // fewer would load the rows around them too often
constexpr int64_t kRowsOfABlock = 8;    // what the convolution takes at once
constexpr int64_t kPadding = 32;        // floats behind a row, for whole vectors and against equal cache sets

inline int64_t row_stride(int64_t tokens) { return round_up(tokens, 16) + kPadding; }

inline int64_t strip_rows(const MultiScaleParams& p) {
  int64_t rows = max(kMinRows, kStripTokens / max(1, p.width));
  if (rows > kRowsOfABlock) rows = rows / kRowsOfABlock * kRowsOfABlock;
  return min(rows, max(1, p.height));
}

inline int64_t largest_border(const MultiScaleParams& p) {
  int64_t border = 0;
  for (int s = 0; s < p.scales; ++s) border = max(border, p.kernels[s] / 2);
  return border;
}

// The weights of one group, of all groups' weights or gradients.
template <class Float>
inline ScaleWeights<Float> of_group(const ScaleWeights<Float>& w, int64_t kernel, int64_t head_dim,
                                    int64_t group) {
  const int64_t c = group * head_dim;
  return {w.depthwise + c * kernel * kernel, w.pointwise + c * head_dim,
          w.depthwise_bias == nullptr ? nullptr : w.depthwise_bias + c,
          w.pointwise_bias == nullptr ? nullptr : w.pointwise_bias + c};
}

inline Image channels_from(const MultiScaleParams& p, const Image& image, int64_t batch, int64_t channel) {
  return channels_from(p.dtype, image, batch, channel);
}

inline bool is_plane(const MultiScaleParams& p, const Image& image) {
  return p.dtype == DType::kFloat32 && image.token_stride == 1;
}

inline Operand operand(const Plane<float>& plane, int64_t token) {
  return {plane.data + token, nullptr, 1, plane.stride};
}

// What stays the same for a call, whichever the thread.
struct Call {
  const MultiScaleParams& p;
  const MultiScalePasses& passes;
  const ReluLinearAttentionPasses& attention;  // of planes, in float
  int64_t rows, strip, strip_stride, tile;

  explicit Call(const MultiScaleParams& problem)
      : p(problem),
        passes(multi_scale_passes(active_isa())),
        attention(relu_linear_attention_passes(active_isa(), DType::kFloat32)),
        rows(strip_rows(problem)),
        strip(rows * problem.width),
        strip_stride(row_stride(strip)),
        tile(cpu::plan(heads_of(problem.tokens()), active_isa()).tile) {}

  // One head, or several of them, of `tokens` tokens.
  LinearAttentionParams heads_of(int64_t tokens) const {
    LinearAttentionParams heads{};
    heads.dtype = DType::kFloat32;
    heads.groups = 1;
    heads.queries = heads.keys = tokens;
    heads.head_dim = heads.value_dim = p.head_dim;
    heads.eps = p.eps;
    return heads;
  }
  int64_t sums_size() const { return p.head_dim * (p.head_dim + 1); }
  int64_t pass_floats() const { return round_up(passes.scratch_floats(p, rows), 16); }
  int64_t attention_floats() const {
    return round_up(attention.scratch_floats(p.head_dim, p.head_dim, tile), 16);
  }
  int64_t tile_floats() const { return p.head_dim * strip_stride; }
  int64_t source_stride() const { return row_stride((rows + 2 * largest_border(p)) * p.width); }
  int64_t plane_stride() const { return row_stride(p.tokens()); }
  int64_t plane_floats() const { return p.head_dim * plane_stride(); }

  // What a thread works in, the pieces of its Worker and those that the schedules below add.
  int64_t worker_floats() const {
    return pass_floats() + attention_floats() + p.head_dim * source_stride() + tile_floats() + 64;
  }
  int64_t aggregate_floats() const { return worker_floats() + tile_floats() + 16; }
  int64_t aggregate_backward_floats() const {
    return worker_floats() + tile_floats() + 3 * plane_floats() + 64;
  }
  int64_t attend_floats() const { return worker_floats() + 2 * tile_floats() + 32; }
  int64_t attend_backward_floats() const {
    return worker_floats() + 5 * tile_floats() + 10 * plane_floats() + 2 * sums_size() + 256;
  }
};

// Pieces of a thread's memory, in order.
struct Carver {
  float* next;
  float* floats(int64_t count) {
    float* const piece = next;
    next += round_up(count, 16);
    return piece;
  }
};

// A thread at work on strips of one group of channels.
struct Worker {
  const Call& call;
  float *pass_memory, *attention_memory, *source_memory;
  Plane<float> mixed;

  Worker(const Call& c, Carver& memory)
      : call(c),
        pass_memory(memory.floats(c.pass_floats())),
        attention_memory(memory.floats(c.attention_floats())),
        source_memory(memory.floats(c.p.head_dim * c.source_stride())),
        mixed{memory.floats(c.tile_floats()), c.strip_stride} {}

  // The channels of a group in float, as if from the image's first token on; those of the strip and of the
  // rows around it are there.
  Plane<const float> source(const Image& image, int64_t first, int64_t strip_rows, int64_t border) const {
    const MultiScaleParams& p = call.p;
    if (is_plane(p, image)) return {static_cast<const float*>(image.data), image.channel_stride};
    const int64_t from = max(0, first - border), to = min(p.height, first + strip_rows + border);
    const Plane<float> plane{source_memory, call.source_stride()};
    call.passes.load(p.dtype, image, from * p.width, (to - from) * p.width, p.head_dim, plane);
    return {plane.data - from * p.width, plane.stride};
  }
  void convolve(int scale, int64_t group, const Plane<const float>& in, int64_t first, int64_t strip_rows,
                const Plane<float>& to) const {
    const MultiScaleParams& p = call.p;
    call.passes.depthwise(p, p.kernels[scale],
                          of_group(p.weights[scale], p.kernels[scale], p.head_dim, group), first, strip_rows,
                          in, to, pass_memory);
  }
  void mix(int scale, int64_t group, int64_t tokens, const Plane<float>& from, const Plane<float>& to) const {
    const MultiScaleParams& p = call.p;
    call.passes.pointwise(p, of_group(p.weights[scale], p.kernels[scale], p.head_dim, group), tokens,
                          {from.data, from.stride}, to, pass_memory);
  }
  void aggregate(int scale, int64_t batch, int64_t group, int64_t first, int64_t strip_rows,
                 const Plane<float>& to) const {
    const MultiScaleParams& p = call.p;
    const Image image = channels_from(p, p.qkv, batch, group * p.head_dim);
    convolve(scale, group, source(image, first, strip_rows, p.kernels[scale] / 2), first, strip_rows, mixed);
    mix(scale, group, strip_rows * p.width, mixed, to);
  }
};

// Calls f(first row, rows) for the strips of tokens [begin, end), which are whole rows.
template <class F>
inline void for_strips(const Call& call, int64_t begin, int64_t end, const F& f) {
  const int64_t width = call.p.width;
  for (int64_t at = begin; at < end; at += call.strip) {
    f(at / width, (min(end, at + call.strip) - at) / width);
  }
}

inline int64_t aggregation_work(const MultiScaleParams& p, int64_t channels) {
  int64_t work = 0;
  for (int s = 0; s < p.scales; ++s) work += p.kernels[s] * p.kernels[s] + p.head_dim;
  return max(1, channels * p.tokens() * work);
}

}  // namespace effattn::cpu
