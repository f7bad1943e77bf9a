// What stays the same for a call of a multi-scale operator, and what one of its threads works with.
#pragma once

#include "../channels_last/ukernels.h"
#include "../core/arena.h"
#include "../core/image.h"
#include "../relu_linear_attention/plan.h"
#include "../relu_linear_attention/ukernels.h"
#include "plan.h"
#include "ukernels.h"

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

inline int64_t max_border(const MultiScaleParams& p) {
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

inline ScaleWeights<const float> of_group(const MultiScaleParams& p, int branch, int64_t group) {
  return of_group(p.weights[branch], p.kernels[branch], p.head_dim, group);
}

inline Image channels_from(const MultiScaleParams& p, const Image& image, int64_t batch, int64_t channel,
                           int64_t token = 0) {
  return channels_from(p.dtype, image, batch, channel, token);
}

// Whether an image can be read and written in place.
inline bool is_plane(const MultiScaleParams& p, const Image& image) {
  return p.dtype == DType::kFloat32 && image.token_stride == 1;
}
inline Plane<float> plane_of(const Image& image) {
  return {static_cast<float*>(image.data), image.channel_stride};
}

inline Operand operand(const Plane<float>& plane, int64_t token = 0) {
  return {plane.data + token, nullptr, 1, plane.stride};
}

inline int64_t aggregation_work(const MultiScaleParams& p, int64_t channels) {
  int64_t work = 0;
  for (int s = 0; s < p.scales; ++s) work += p.kernels[s] * p.kernels[s] + p.head_dim;
  return max(1, channels * p.tokens() * work);
}

struct LaunchPlan {
  const MultiScaleParams& p;
  const MultiScaleUkernels& ukernels = multi_scale_ukernels();
  const ChannelsLastUkernels& images = channels_last_ukernels();
  const LinearAttentionUkernels& attention = linear_attention_table().of(DType::kFloat32);  // of planes
  int64_t rows, strip, strip_stride, tile, ukernel_floats, attention_floats;

  explicit LaunchPlan(const MultiScaleParams& params)
      : p(params),
        rows(strip_rows(p)),
        strip(rows * p.width),
        strip_stride(row_stride(strip)),
        ukernel_floats(ukernels.scratch_floats(p, rows)) {
    const ReluLinearAttentionPlan of_heads = cpu::plan(heads_of(p.tokens()), active_isa());
    tile = of_heads.tile;
    attention_floats = of_heads.scratch_floats;
  }

  // The attention of one head to `tokens` tokens.
  LinearAttentionParams heads_of(int64_t tokens) const {
    LinearAttentionParams heads{};
    heads.dtype = DType::kFloat32;
    heads.groups = 1;
    heads.queries = heads.keys = tokens;
    heads.head_dim = heads.value_dim = p.head_dim;
    heads.eps = p.eps;
    return heads;
  }
  int64_t kv_state_size() const { return p.head_dim * (p.head_dim + 1); }

  // Planes of `channels` of a strip, and of a whole image.
  Plane<float> strip_plane(Arena& arena) const {
    return {arena.floats(p.head_dim * strip_stride), strip_stride};
  }
  Plane<float> image_plane(int64_t channels, Arena& arena) const {
    const int64_t stride = row_stride(p.tokens());
    return {arena.floats(channels * stride), stride};
  }

  void load(const Image& image, int64_t tokens, int64_t channels, const Plane<float>& to) const {
    images.load(p.dtype, transposed(image), channels, tokens, to);
  }
  void store(const Image& image, int64_t tokens, int64_t channels, const Plane<float>& from) const {
    images.store(p.dtype, transposed(image), channels, tokens, from);
  }

  // Calls f(first row, rows, first token, tokens) for the strips of tokens [begin, end), which are whole
  // rows.
  template <class F>
  void for_strips(int64_t begin, int64_t end, const F& f) const {
    for (int64_t at = begin; at < end; at += strip) {
      const int64_t tokens = min(end, at + strip) - at;
      f(at / p.width, tokens / p.width, at, tokens);
    }
  }
};

// A thread at work on strips of one group of channels.
struct ThreadContext {
  const LaunchPlan& plan;
  Arena ukernel_scratch, attention_scratch;
  Plane<float> source, mixed;

  ThreadContext(const LaunchPlan& of_call, Arena& arena)
      : plan(of_call),
        ukernel_scratch(arena.part(plan.ukernel_floats)),
        attention_scratch(arena.part(plan.attention_floats)),
        source{nullptr, row_stride((plan.rows + 2 * max_border(plan.p)) * plan.p.width)},
        mixed(plan.strip_plane(arena)) {
    source.data = arena.floats(plan.p.head_dim * source.stride);
  }

  // The channels of a group in float, as if from the image's first token on; those of the strip and of the
  // rows around it are there.
  Plane<const float> source_of(const Image& image, int64_t first, int64_t rows, int64_t border) const {
    const MultiScaleParams& p = plan.p;
    if (is_plane(p, image)) return plane_of(image);
    const int64_t from = max(0, first - border), to = min(p.height, first + rows + border);
    plan.load(channels_from(p.dtype, image, 0, 0, from * p.width), (to - from) * p.width, p.head_dim, source);
    return {source.data - from * p.width, source.stride};
  }
  void convolve(int branch, int64_t group, const Plane<const float>& in, int64_t first, int64_t rows,
                const Plane<float>& to) const {
    const MultiScaleParams& p = plan.p;
    plan.ukernels.depthwise(p, p.kernels[branch], of_group(p, branch, group), first, rows, in, to,
                            ukernel_scratch);
  }
  void mix(int branch, int64_t group, int64_t tokens, const Plane<float>& from,
           const Plane<float>& to) const {
    plan.ukernels.pointwise(plan.p, of_group(plan.p, branch, group), tokens, from, to, ukernel_scratch);
  }
  void aggregate(int branch, int64_t batch, int64_t group, int64_t first, int64_t rows,
                 const Plane<float>& to) const {
    const MultiScaleParams& p = plan.p;
    const Image image = channels_from(p, p.qkv, batch, group * p.head_dim);
    convolve(branch, group, source_of(image, first, rows, p.kernels[branch] / 2), first, rows, mixed);
    mix(branch, group, rows * p.width, mixed, to);
  }
};

}  // namespace effattn::cpu
