// Which group goes through which micro-kernels, where.
//
// Forward, each head of each branch is a group of linear attention: its keys and values are aggregated strip
// by strip for kv_state, its queries for the output, so each channel is aggregated once and nothing is kept
// or computed again. Backward, a thread takes a head with all its branches, since their gradients meet in the
// same channels of qkv; it aggregates again what the forward pass did not keep.
#include <vector>

#include "../core/schedule.h"
#include "launch.h"

namespace effattn::cpu {
namespace {

// --- what threads work with -------------------------------------------------------------------------------

struct ForwardContext : ThreadContext {
  Plane<float> a, b;
  ForwardContext(const LaunchPlan& plan, Arena& arena)
      : ThreadContext(plan, arena), a(plan.strip_plane(arena)), b(plan.strip_plane(arena)) {}
};

// The gradients of all weights, of one image.
struct ImageGradients : PartialSums {
  ScaleWeights<float> branches[MultiScaleParams::kMaxScales] = {};

  ImageGradients(const MultiScaleParams& p, Arena& arena) {
    for_members(p, [&](int s, auto member, int64_t count) { branches[s].*member = take(count, arena); });
  }
  void write(const MultiScaleParams& p) const {
    for_members(p, [&](int s, auto member, int64_t count) {
      copy(p.gradients[s].*member, branches[s].*member, count);
    });
  }

 private:
  // Calls f(branch, member, floats) for the gradients that are asked for.
  template <class F>
  static void for_members(const MultiScaleParams& p, const F& f) {
    const int64_t channels = 3 * p.heads * p.head_dim;
    for (int s = 0; s < p.scales; ++s) {
      const ScaleWeights<float>& to = p.gradients[s];
      f(s, &ScaleWeights<float>::depthwise, channels * p.kernels[s] * p.kernels[s]);
      f(s, &ScaleWeights<float>::pointwise, channels * p.head_dim);
      if (to.depthwise_bias != nullptr) f(s, &ScaleWeights<float>::depthwise_bias, channels);
      if (to.pointwise_bias != nullptr) f(s, &ScaleWeights<float>::pointwise_bias, channels);
    }
  }
};

struct WeightGradients {
  std::vector<ImageGradients> images;
  WeightGradients(const MultiScaleParams& p, Arena& arena) {
    for (int64_t b = 0; b < max(1, p.batch); ++b) images.emplace_back(p, arena);
  }
};

struct BackwardContext : ThreadContext {
  using ThreadContext::ThreadContext;

  // Back through the pointwise convolution of a strip, where grad_mixed begins.
  void unmix(int branch, int64_t group, const ImageGradients& to, int64_t tokens,
             const Plane<float>& mixed_strip, const Plane<float>& grad,
             const Plane<float>& grad_mixed) const {
    plan.ukernels.pointwise_backward(plan.p, of_group(plan.p, branch, group), gradients_of(to, branch, group),
                                     tokens, mixed_strip, grad, grad_mixed);
  }
  // Back through the depthwise convolution of a whole image.
  void unconvolve(int branch, int64_t group, const ImageGradients& to, const Plane<const float>& in,
                  const Plane<float>& grad_mixed, const Plane<float>& grad_in) const {
    plan.ukernels.depthwise_backward(plan.p, plan.p.kernels[branch], plan.rows,
                                     of_group(plan.p, branch, group), gradients_of(to, branch, group), in,
                                     grad_mixed, grad_in, ukernel_scratch);
  }

 private:
  ScaleWeights<float> gradients_of(const ImageGradients& to, int branch, int64_t group) const {
    return of_group(to.branches[branch], plan.p.kernels[branch], plan.p.head_dim, group);
  }
};

struct AggregateBackwardContext : BackwardContext {
  Plane<float> grad, own_input, grad_in, grad_mixed;
  AggregateBackwardContext(const LaunchPlan& plan, Arena& arena)
      : BackwardContext(plan, arena),
        grad(plan.strip_plane(arena)),
        own_input(plan.image_plane(plan.p.head_dim, arena)),
        grad_in(plan.image_plane(plan.p.head_dim, arena)),
        grad_mixed(plan.image_plane(plan.p.head_dim, arena)) {}
};

struct AttendBackwardContext : BackwardContext {
  Plane<float> mixed_v, a, b, grad_a, grad_b;
  Plane<float> own_input, own_grad_in, grad_mixed, own_grad_out;
  float *grad_kv_state, *part;

  AttendBackwardContext(const LaunchPlan& plan, Arena& arena) : BackwardContext(plan, arena) {
    for (Plane<float>* const strip : {&mixed_v, &a, &b, &grad_a, &grad_b}) *strip = plan.strip_plane(arena);
    for (Plane<float>* const qkv : {&own_input, &own_grad_in, &grad_mixed}) {
      *qkv = plan.image_plane(3 * plan.p.head_dim, arena);
    }
    own_grad_out = plan.image_plane(plan.p.head_dim, arena);
    grad_kv_state = arena.floats(plan.kv_state_size());
    part = arena.floats(plan.kv_state_size());
  }
};

}  // namespace

MultiScalePlan plan(const MultiScaleParams& p) {
  const LaunchPlan launch(p);
  return {launch.rows, floats_of<ForwardContext>(launch), floats_of<AttendBackwardContext>(launch)};
}

// --- aggregation alone ---------------------------------------------------------------------------

void aggregate(const MultiScaleParams& p, const Parallel& parallel) {
  const int64_t groups = 3 * p.heads, slots = (1 + p.scales) * groups, d = p.head_dim;
  if (p.batch * slots * p.tokens() * d == 0) return;
  const LaunchPlan plan(p);
  parallel(p.batch * slots, aggregation_work(p, groups * d) / slots, [&](int64_t begin, int64_t end) {
    const auto context = in_thread_arena<ForwardContext>(plan);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t batch = unit / slots, slot = unit % slots, group = slot % groups;
      const int branch = static_cast<int>(slot / groups) - 1;
      plan.for_strips(0, p.tokens(), [&](int64_t first, int64_t rows, int64_t token, int64_t tokens) {
        if (branch < 0) {
          plan.load(channels_from(p, p.qkv, batch, group * d, token), tokens, d, context.a);
        } else {
          context.aggregate(branch, batch, group, first, rows, context.a);
        }
        plan.store(channels_from(p, p.out, batch, slot * d, token), tokens, d, context.a);
      });
    }
  });
}

void aggregate_backward(const MultiScaleParams& p, const Parallel& parallel) {
  const int64_t groups = 3 * p.heads, d = p.head_dim;
  const InSharedArena<WeightGradients> weights(p);
  clear_all(weights->images);
  if (p.batch * groups * p.tokens() * d > 0) {
    const LaunchPlan plan(p);
    parallel(
        p.batch * groups, max(kMinWorkPerThread, aggregation_work(p, d)), [&](int64_t begin, int64_t end) {
          const auto context = in_thread_arena<AggregateBackwardContext>(plan);
          for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t batch = unit / groups, group = unit % groups;
            const Image image = channels_from(p, p.qkv, batch, group * d);
            if (!is_plane(p, image)) plan.load(image, p.tokens(), d, context.own_input);
            const Plane<const float> input = is_plane(p, image) ? plane_of(image) : context.own_input;
            plan.load(channels_from(p, p.grad_out, batch, group * d), p.tokens(), d, context.grad_in);
            for (int s = 0; s < p.scales; ++s) {
              plan.for_strips(0, p.tokens(), [&](int64_t first, int64_t rows, int64_t token, int64_t tokens) {
                context.convolve(s, group, input, first, rows, context.mixed);
                plan.load(channels_from(p, p.grad_out, batch, ((1 + s) * groups + group) * d, token), tokens,
                          d, context.grad);
                context.unmix(s, group, weights->images[batch], tokens, context.mixed, context.grad,
                              context.grad_mixed.from(0, token));
              });
              context.unconvolve(s, group, weights->images[batch], input, context.grad_mixed,
                                 context.grad_in);
            }
            plan.store(channels_from(p, p.grad_qkv, batch, group * d), p.tokens(), d, context.grad_in);
          }
        });
  }
  total(weights->images).write(p);
}

// --- with the attention --------------------------------------------------------------------------

namespace {

// The heads of qkv itself, in their dtype and in place.
struct OwnHeads {
  int64_t sizes[2], qkv_strides[2], out_strides[2];
  LinearAttentionParams params;

  explicit OwnHeads(const LaunchPlan& plan)
      : sizes{plan.p.batch, plan.p.heads},
        qkv_strides{plan.p.qkv.batch_stride, 3 * plan.p.head_dim * plan.p.qkv.channel_stride},
        out_strides{plan.p.out.batch_stride, plan.p.head_dim * plan.p.out.channel_stride},
        params(plan.heads_of(plan.p.tokens())) {
    const MultiScaleParams& p = plan.p;
    params.dtype = p.dtype;
    params.lead_rank = 2;
    params.lead_sizes = sizes;
    params.groups = p.batch * p.heads;
    Operand* const operands[] = {&params.q, &params.k, &params.v};
    for (int64_t i = 0; i < 3; ++i) {
      *operands[i] = {channels_from(p, p.qkv, 0, i * p.head_dim).data, qkv_strides, p.qkv.token_stride,
                      p.qkv.channel_stride};
    }
    params.out = {p.out.data, out_strides, p.out.token_stride, p.out.channel_stride};
  }
};

// A group of the attention to all branches.
struct Slot {
  int64_t batch, head;
  int branch;  // -1: qkv itself
  Slot(const MultiScaleParams& p, int64_t group)
      : batch(group / p.all_heads()),
        head(group % p.all_heads() % p.heads),
        branch(static_cast<int>(group % p.all_heads() / p.heads) - 1) {}
};

// The same range of the heads of qkv itself.
Range own_range(const MultiScaleParams& p, Range range) {
  const Slot own(p, range.group), next(p, range.next_group);
  range.group = own.batch * p.heads + own.head;
  range.next_group = next.batch * p.heads + next.head;
  if (next.branch >= 0) range.next = Range::Next::kNothing;
  return range;
}

}  // namespace

void attend(const MultiScaleParams& p, float* kv_state, const Parallel& parallel) {
  const int64_t groups = p.batch * p.all_heads(), d = p.head_dim;
  if (groups * p.tokens() * d == 0) {
    if (kv_state != nullptr) clear(kv_state, groups * d * (d + 1));
    return;
  }
  const LaunchPlan plan(p);
  const OwnHeads own(plan);
  const LinearAttentionUkernels& own_ukernels = linear_attention_table().of(p.dtype);
  const int64_t work = aggregation_work(p, 3 * d) / max(1, p.scales) + 2 * p.tokens() * d * (d + 1);
  const Schedule schedule{groups,     p.tokens(),           p.tokens(),
                          plan.strip, plan.kv_state_size(), floats_of<ForwardContext>(plan),
                          work};
  reduce_then_use(
      schedule, kv_state, parallel,
      [&](const Range& r, float* part, Arena scratch) {
        const ForwardContext context(plan, scratch);
        const Slot slot(p, r.group);
        if (slot.branch < 0) {
          return own_ukernels.reduce_keys(own.params, own_range(p, r), plan.tile, part,
                                          context.attention_scratch);
        }
        const int64_t first = r.begin / p.width, tokens = r.end - r.begin, rows = tokens / p.width;
        context.aggregate(slot.branch, slot.batch, 3 * slot.head + 1, first, rows, context.a);
        context.aggregate(slot.branch, slot.batch, 3 * slot.head + 2, first, rows, context.b);
        LinearAttentionParams head = plan.heads_of(tokens);
        head.k = operand(context.a);
        head.v = operand(context.b);
        plan.attention.reduce_keys(head, {0, 0, tokens}, plan.tile, part, context.attention_scratch);
      },
      [&](const Range& r, const float* total, Arena scratch) {
        const ForwardContext context(plan, scratch);
        const Slot slot(p, r.group);
        if (slot.branch < 0) {
          return own_ukernels.apply_queries(own.params, own_range(p, r), plan.tile, total,
                                            context.attention_scratch);
        }
        const int64_t channel = ((1 + slot.branch) * p.heads + slot.head) * d;
        plan.for_strips(r.begin, r.end, [&](int64_t first, int64_t rows, int64_t token, int64_t tokens) {
          context.aggregate(slot.branch, slot.batch, 3 * slot.head, first, rows, context.a);
          const Image to = channels_from(p, p.out, slot.batch, channel, token);
          const bool in_place = p.dtype == DType::kFloat32;
          LinearAttentionParams head = plan.heads_of(tokens);
          head.q = operand(context.a);
          head.out =
              in_place ? Operand{to.data, nullptr, to.token_stride, to.channel_stride} : operand(context.b);
          plan.attention.apply_queries(head, {0, 0, tokens}, plan.tile, total, context.attention_scratch);
          if (!in_place) plan.store(to, tokens, d, context.b);
        });
      });
}

void attend_backward(const MultiScaleParams& p, const float* kv_state, const Parallel& parallel) {
  const InSharedArena<WeightGradients> weights(p);
  clear_all(weights->images);
  const int64_t units = p.batch * p.heads, d = p.head_dim;
  if (units * p.tokens() * d > 0) {
    const LaunchPlan plan(p);
    const int64_t size = plan.kv_state_size();
    parallel(units, max(kMinWorkPerThread, aggregation_work(p, 3 * d)), [&](int64_t begin, int64_t end) {
      const auto context = in_thread_arena<AttendBackwardContext>(plan);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t batch = unit / p.heads, head = unit % p.heads;
        const ImageGradients& gradients = weights->images[batch];
        const auto in_float = [&](const Image& image, int64_t channels, const Plane<float>& converted) {
          if (is_plane(p, image)) return plane_of(image);
          plan.load(image, p.tokens(), channels, converted);
          return converted;
        };
        const Plane<float> in =
            in_float(channels_from(p, p.qkv, batch, 3 * head * d), 3 * d, context.own_input);
        const Image to = channels_from(p, p.grad_qkv, batch, 3 * head * d);
        const Plane<float> grad_in = is_plane(p, to) ? plane_of(to) : context.own_grad_in;

        for (int branch = -1; branch < p.scales; ++branch) {
          const int64_t out_head = (1 + branch) * p.heads + head;
          const float* const own_state = kv_state + (batch * p.all_heads() + out_head) * size;
          const Plane<float> grad_out =
              in_float(channels_from(p, p.grad_out, batch, out_head * d), d, context.own_grad_out);
          const auto unmix = [&](int64_t i, int64_t token, int64_t tokens, const Plane<float>& mixed,
                                 const Plane<float>& grad) {
            context.unmix(branch, 3 * head + i, gradients, tokens, mixed, grad,
                          context.grad_mixed.from(i * d, token));
          };
          const auto again = [&](int64_t i, int64_t first, int64_t rows, const Plane<float>& mixed,
                                 const Plane<float>& result) {
            context.convolve(branch, 3 * head + i, in.from(i * d), first, rows, mixed);
            context.mix(branch, 3 * head + i, rows * p.width, mixed, result);
          };

          clear(context.grad_kv_state, size);
          plan.for_strips(0, p.tokens(), [&](int64_t first, int64_t rows, int64_t token, int64_t tokens) {
            if (branch >= 0) again(0, first, rows, context.mixed, context.a);
            LinearAttentionParams strip = plan.heads_of(tokens);
            strip.grad_out = operand(grad_out, token);
            strip.q = branch < 0 ? operand(in, token) : operand(context.a);
            strip.grad_q = branch < 0 ? operand(grad_in, token) : operand(context.grad_a);
            plan.attention.grad_queries(strip, {0, 0, tokens}, plan.tile, own_state, context.part,
                                        context.attention_scratch);
            add(context.grad_kv_state, context.part, size);
            if (branch >= 0) unmix(0, token, tokens, context.mixed, context.grad_a);
          });
          plan.for_strips(0, p.tokens(), [&](int64_t first, int64_t rows, int64_t token, int64_t tokens) {
            if (branch >= 0) {
              again(1, first, rows, context.mixed, context.a);
              again(2, first, rows, context.mixed_v, context.b);
            }
            LinearAttentionParams strip = plan.heads_of(tokens);
            strip.k = branch < 0 ? operand(in.from(d), token) : operand(context.a);
            strip.v = branch < 0 ? operand(in.from(2 * d), token) : operand(context.b);
            strip.grad_k = branch < 0 ? operand(grad_in.from(d), token) : operand(context.grad_a);
            strip.grad_v = branch < 0 ? operand(grad_in.from(2 * d), token) : operand(context.grad_b);
            plan.attention.grad_keys(strip, {0, 0, tokens}, plan.tile, context.grad_kv_state,
                                     context.attention_scratch);
            if (branch >= 0) {
              unmix(1, token, tokens, context.mixed, context.grad_a);
              unmix(2, token, tokens, context.mixed_v, context.grad_b);
            }
          });
          for (int64_t i = 0; i < 3 && branch >= 0; ++i) {
            context.unconvolve(branch, 3 * head + i, gradients, in.from(i * d),
                               context.grad_mixed.from(i * d), grad_in.from(i * d));
          }
        }
        if (!is_plane(p, to)) plan.store(to, p.tokens(), 3 * d, grad_in);
      }
    });
  }
  total(weights->images).write(p);
}

}  // namespace effattn::cpu
