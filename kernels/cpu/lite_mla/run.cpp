// Heads in parallel, from x to the output of the attention; then channels of the last projection.
#include "plan.h"

#include <vector>

#include "../channels_last/features.h"
#include "../channels_last/projection.h"
#include "../multi_scale/launch.h"

namespace effattn::cpu {
namespace {

constexpr int kParts = 3;  // q, k and v

// The weights of a branch and of a part.
struct PartWeights {
  Rows<float> taps, mix;
  float *tap_bias, *mix_bias;
  PartWeights(int64_t taps_count, int64_t head_dim, int64_t d, Arena& arena)
      : taps{arena.floats(taps_count * d), d},
        mix{arena.floats(head_dim * d), d},
        tap_bias(arena.floats(d)),
        mix_bias(arena.floats(d)) {}
};

// A thread at work on one head after the other.
struct HeadContext {
  const LiteMLAParams& params;
  const MultiScaleParams& p;
  const LaunchPlan& plan;
  const ChannelsLastUkernels& ukernels;
  const int64_t d, tokens, stride;  // of a part, and of a row of parts
  Rows<float> qkv_weight;
  float *qkv_bias, *kv_state;
  Arena attention_scratch;
  Rows<float> mixed;
  PaddedImage padded;
  std::vector<Rows<float>> slots;     // tokens of q, k and v: of qkv itself and of every branch
  std::vector<PartWeights> branches;  // of every branch and part

  HeadContext(const LiteMLAParams& of_call, const LaunchPlan& launch, Arena& arena)
      : params(of_call),
        p(params.attention),
        plan(launch),
        ukernels(launch.images),
        d(round_up(p.head_dim, kWholeVectors)),
        tokens(p.tokens()),
        stride(kParts * d),
        qkv_weight{arena.floats(params.in_channels * stride), stride},
        qkv_bias(arena.floats(stride)),
        kv_state(arena.floats(plan.kv_state_size())),
        attention_scratch(arena.part(plan.attention_floats)),
        mixed{arena.floats(tokens * d), d},
        padded{nullptr, p.height, p.width, d, max_border(p)} {
    padded.data = arena.floats(padded.floats());
    for (int s = 0; s <= p.scales; ++s) slots.push_back({arena.floats(tokens * stride), stride});
    for (int i = 0; i < p.scales * kParts; ++i) {
      const int64_t kernel = p.kernels[i / kParts];
      branches.emplace_back(kernel * kernel, p.head_dim, d, arena);
    }
  }

  // Before the first head.
  void clear_border() const { clear(padded.data, padded.floats()); }

  void take_weights(int64_t head) const {
    for (int part = 0; part < kParts; ++part) {
      const int64_t group = kParts * head + part, channel = group * p.head_dim;
      ukernels.transpose(params.qkv_weight + channel * params.in_channels, p.head_dim, params.in_channels,
                         {qkv_weight.data + part * d, stride});
      copy_bias(params.qkv_bias == nullptr ? nullptr : params.qkv_bias + channel, p.head_dim, d,
                qkv_bias + part * d);
      for (int s = 0; s < p.scales; ++s) {
        const ScaleWeights<const float> branch = of_group(p, s, group);
        const PartWeights& own = branches[s * kParts + part];
        ukernels.transpose(branch.depthwise, p.head_dim, p.kernels[s] * p.kernels[s], own.taps);
        ukernels.transpose(branch.pointwise, p.head_dim, p.head_dim, own.mix);
        copy_bias(branch.depthwise_bias, p.head_dim, d, own.tap_bias);
        copy_bias(branch.pointwise_bias, p.head_dim, d, own.mix_bias);
      }
    }
  }

  // What take_weights reads first.
  PrefetchRange weights_of(int64_t head) const {
    const int64_t floats = kParts * p.head_dim * params.in_channels;
    return {params.qkv_weight + head * floats, head < p.heads ? floats : 0};
  }

  void project(const Features& x, const PrefetchRange& prefetch) const {
    ukernels.project(tokens, params.in_channels, stride, x, qkv_weight, qkv_bias, slots[0], prefetch);
  }

  void aggregate() const {
    for (int part = 0; part < kParts && p.scales > 0; ++part) {
      ukernels.fill(slots[0].from(0, part * d), padded);
      for (int s = 0; s < p.scales; ++s) {
        const PartWeights& own = branches[s * kParts + part];
        ukernels.depthwise(p.kernels[s], padded, own.taps.data, own.tap_bias, mixed);
        ukernels.project(tokens, p.head_dim, d, features_of(mixed), own.mix, own.mix_bias,
                         slots[1 + s].from(0, part * d), {});
      }
    }
  }

  // out: the tokens of all heads.
  void attend(int64_t head, const Rows<float>& out) const {
    for (int s = 0; s <= p.scales; ++s) {
      LinearAttentionParams group = plan.heads_of(tokens);
      float* const own = slots[s].data;
      group.q = {own, nullptr, stride, 1};
      group.k = {own + d, nullptr, stride, 1};
      group.v = {own + 2 * d, nullptr, stride, 1};
      group.out = {out.data + (s * p.heads + head) * p.head_dim, nullptr, out.stride, 1};
      plan.attention.reduce_keys(group, {0, 0, tokens}, plan.tile, kv_state, attention_scratch);
      plan.attention.apply_queries(group, {0, 0, tokens}, plan.tile, kv_state, attention_scratch);
    }
  }
};

// x as products read it, and what the heads attended to.
struct SharedMemory {
  FeaturesOf x;
  Batch attended;

  SharedMemory(const LiteMLAParams& params, const MultiScaleParams& p, Arena& arena)
      : x(p.dtype, params.x, p.batch, params.in_channels, p.tokens(), arena),
        attended(p.batch, p.tokens(), spread_stride(p.all_heads() * p.head_dim), arena) {}
};

}  // namespace

void lite_mla(const LiteMLAParams& params, const Parallel& parallel) {
  const MultiScaleParams& p = params.attention;
  if (p.batch * p.tokens() * params.out_channels == 0) return;
  const LaunchPlan plan(p);
  const InSharedArena<SharedMemory> shared(params, p);
  shared->x.load(parallel);

  const int64_t head_work = max(1, kParts * p.head_dim * params.in_channels * p.tokens()) +
                            aggregation_work(p, kParts * p.head_dim);
  parallel(p.heads * p.batch, head_work, [&](int64_t begin, int64_t end) {
    const auto context = in_thread_arena<HeadContext>(params, plan);
    context.clear_border();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / p.batch, batch = unit % p.batch;
      if (unit == begin || batch == 0) context.take_weights(head);
      context.project(shared->x.of(batch), unit + 1 < end ? context.weights_of(head + 1) : PrefetchRange{});
      context.aggregate();
      context.attend(head, shared->attended.of(batch));
    }
  });

  const ProjectionWeights last{p.all_heads() * p.head_dim, params.out_channels, params.proj_weight,
                               params.proj_bias, false};
  project_tokens(p.dtype, p.batch, shared->attended, last, params.out, parallel);
}

}  // namespace effattn::cpu
