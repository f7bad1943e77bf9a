// The schedule: heads in parallel, from x to the output of the attention; then channels of the last
// projection.
#include "plan.h"

#include "../channels_last/ukernels.h"
#include "../channels_last/features.h"
#include "../multi_scale/launch.h"
#include "../channels_last/projection.h"

namespace effattn::cpu {
namespace {

constexpr int kParts = 3;  // q, k and v

// A thread at work on one head after the other.
struct Head {
  const LiteMLA& problem;
  const MultiScaleParams& p;
  const ChannelsLastPasses& passes;
  const Call& call;
  const int64_t d, tokens, stride;  // of a part, and of a row of parts
  Rows<float> qkv_weight;
  float *qkv_bias, *sums, *attention_memory;
  float *taps[MultiScaleParams::kMaxScales][kParts], *mix[MultiScaleParams::kMaxScales][kParts];
  float *tap_bias[MultiScaleParams::kMaxScales][kParts], *mix_bias[MultiScaleParams::kMaxScales][kParts];
  Rows<float>
      slots[1 + MultiScaleParams::kMaxScales];  // tokens of q, k and v: of qkv itself and of every scale
  Rows<float> mixed;
  PaddedImage padded;

  Head(const LiteMLA& whole, const Call& of_call, Carver& memory)
      : problem(whole),
        p(whole.attention),
        passes(channels_last_passes(active_isa())),
        call(of_call),
        d(round_up(p.head_dim, kWholeVectors)),
        tokens(p.tokens()),
        stride(kParts * d) {
    qkv_weight = {memory.floats(whole.in_channels * stride), stride};
    qkv_bias = memory.floats(stride);
    sums = memory.floats(call.sums_size());
    attention_memory = memory.floats(call.attention_floats());
    for (int s = 0; s <= p.scales; ++s) slots[s] = {memory.floats(tokens * stride), stride};
    for (int s = 0; s < p.scales; ++s) {
      for (int part = 0; part < kParts; ++part) {
        taps[s][part] = memory.floats(p.kernels[s] * p.kernels[s] * d);
        mix[s][part] = memory.floats(p.head_dim * d);
        tap_bias[s][part] = memory.floats(d);
        mix_bias[s][part] = memory.floats(d);
      }
    }
    mixed = {memory.floats(tokens * d), d};
    padded = {nullptr, p.height, p.width, d, largest_border(p)};
    padded.data = memory.floats(padded.floats());
  }

  // What the constructor takes.
  static int64_t floats(const LiteMLA& whole, const Call& call) {
    const MultiScaleParams& p = whole.attention;
    const int64_t d = round_up(p.head_dim, kWholeVectors), border = largest_border(p);
    int64_t floats = (whole.in_channels + 1 + (1 + p.scales) * p.tokens()) * kParts * d + p.tokens() * d +
                     round_up(call.sums_size(), kWholeVectors) + call.attention_floats() +
                     PaddedImage{nullptr, p.height, p.width, d, border}.floats();
    for (int s = 0; s < p.scales; ++s) floats += kParts * (p.kernels[s] * p.kernels[s] + p.head_dim + 2) * d;
    return floats;
  }

  // Before the first head.
  void clear_border() const { clear(padded.data, padded.floats()); }

  void take_weights(int64_t head) const {
    for (int part = 0; part < kParts; ++part) {
      const int64_t group = kParts * head + part, channel = group * p.head_dim;
      passes.transpose(problem.qkv_weight + channel * problem.in_channels, p.head_dim, problem.in_channels,
                       {qkv_weight.data + part * d, stride});
      copy_bias(problem.qkv_bias == nullptr ? nullptr : problem.qkv_bias + channel, p.head_dim, d,
                qkv_bias + part * d);
      for (int s = 0; s < p.scales; ++s) {
        const auto scale = of_group(p.weights[s], p.kernels[s], p.head_dim, group);
        const int64_t size = p.kernels[s] * p.kernels[s];
        passes.transpose(scale.depthwise, p.head_dim, size, {taps[s][part], d});
        passes.transpose(scale.pointwise, p.head_dim, p.head_dim, {mix[s][part], d});
        copy_bias(scale.depthwise_bias, p.head_dim, d, tap_bias[s][part]);
        copy_bias(scale.pointwise_bias, p.head_dim, d, mix_bias[s][part]);
      }
    }
  }

  // What take_weights reads first.
  Coming weights_of(int64_t head) const {
    const int64_t floats = kParts * p.head_dim * problem.in_channels;
    return {problem.qkv_weight + head * floats, head < p.heads ? floats : 0};
  }

  void project(const Features& x, const Coming& next) const {
    passes.project(tokens, problem.in_channels, stride, x, {qkv_weight.data, stride}, qkv_bias, slots[0],
                   next);
  }

  void aggregate() const {
    for (int part = 0; part < kParts && p.scales > 0; ++part) {
      passes.fill({slots[0].data + part * d, stride}, padded);
      for (int s = 0; s < p.scales; ++s) {
        passes.depthwise(p.kernels[s], padded, taps[s][part], tap_bias[s][part], mixed);
        passes.project(tokens, p.head_dim, d, {mixed.data, d, 1}, {mix[s][part], d}, mix_bias[s][part],
                       {slots[1 + s].data + part * d, stride}, {});
      }
    }
  }

  // out: the tokens of all heads.
  void attend(int64_t head, const Rows<float>& out) const {
    for (int s = 0; s <= p.scales; ++s) {
      LinearAttentionParams group = call.heads_of(tokens);
      float* const of_part = slots[s].data;
      group.q = {of_part, nullptr, stride, 1};
      group.k = {of_part + d, nullptr, stride, 1};
      group.v = {of_part + 2 * d, nullptr, stride, 1};
      group.out = {out.data + (s * p.heads + head) * p.head_dim, nullptr, out.stride, 1};
      call.attention.sum_keys(group, {0, 0, tokens}, call.tile, sums, attention_memory);
      call.attention.apply_queries(group, {0, 0, tokens}, call.tile, sums, attention_memory);
    }
  }
};

}  // namespace

void lite_mla(const LiteMLA& problem, const Parallel& parallel) {
  const MultiScaleParams& p = problem.attention;
  const int64_t tokens = p.tokens(), attended = p.all_heads() * p.head_dim;
  if (p.batch * tokens * problem.out_channels == 0) return;
  const Call call(p);
  const auto work = [&](int64_t outputs, int64_t inputs) { return max(1, outputs * inputs * tokens); };

  const FeaturesOf x(p.dtype, problem.x, p.batch, problem.in_channels, tokens);
  const int64_t stride = round_up(attended, kWholeVectors) + kWholeVectors;  // rows in different cache sets
  const int64_t floats = x.floats() + p.batch * tokens * stride;
  const Floats large = floats > kKeptFloats ? aligned_floats(floats) : nullptr;  // kept by no thread
  float* const memory = large ? large.get() : thread_scratch<Purpose::kBetweenThreads>(floats);
  const auto attended_of = [&](int64_t batch) {
    return Rows<float>{memory + x.floats() + batch * tokens * stride, stride};
  };
  x.load(memory, parallel);

  const int64_t head_work =
      work(kParts * p.head_dim, problem.in_channels) + aggregation_work(p, kParts * p.head_dim);
  const int64_t head_floats = Head::floats(problem, call);
  parallel(p.heads * p.batch, head_work, [&](int64_t begin, int64_t end) {
    Carver carver{thread_scratch(head_floats)};
    const Head worker(problem, call, carver);
    worker.clear_border();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / p.batch, batch = unit % p.batch;
      if (unit == begin || batch == 0) worker.take_weights(head);
      worker.project(x.of(memory, batch), unit + 1 < end ? worker.weights_of(head + 1) : Coming{});
      worker.aggregate();
      worker.attend(head, attended_of(batch));
    }
  });

  const ProjectionWeights last{attended, problem.out_channels, problem.proj_weight, problem.proj_bias, false};
  project_tokens(p.dtype, p.batch, tokens, last, attended_of, problem.out, parallel);
}

}  // namespace effattn::cpu
