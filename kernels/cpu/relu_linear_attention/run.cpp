#include "plan.h"

#include "ukernels.h"

namespace effattn::cpu {
namespace {

constexpr int64_t kTileFloats =
    16384;                         // 64 KiB of q or k and v; the backward holds up to twice that, see NOTES
constexpr int64_t kMaxTile = 256;  // no gain was seen from longer rows
constexpr int64_t kChunk = 2048;   // long enough to hide the cost of adding partial sums

// One leading dimension where the strides of all operands allow it, as they do for a tensor cut into heads:
// finding a group is a multiplication then.
LinearAttentionParams with_leads_merged(LinearAttentionParams p) {
  constexpr int kCount = 8;
  Operand* const operands[kCount] = {&p.q, &p.k, &p.v, &p.out, &p.grad_out, &p.grad_q, &p.grad_k, &p.grad_v};
  int dimensions = 0, last = 0;
  merge_leads(p.lead_sizes, p.lead_rank, operands, kCount, [&](int64_t, int dim) {
    ++dimensions;
    last = dim;
  });
  if (dimensions != 1) return p;
  for (Operand* operand : operands) operand->lead_strides += operand->data == nullptr ? 0 : last;
  p.lead_rank = 1;
  return p;
}

struct LaunchPlan {
  const LinearAttentionParams p;
  const LinearAttentionUkernels& ukernels;
  const ReluLinearAttentionPlan plan;

  explicit LaunchPlan(const LinearAttentionParams& params)
      : p(with_leads_merged(params)),
        ukernels(linear_attention_table().of(p.dtype)),
        plan(cpu::plan(p, active_isa())) {}

  Schedule schedule(int64_t reduced_tokens, int64_t used_tokens) const {
    const int64_t work = (reduced_tokens + used_tokens + 1) * (p.head_dim + 1) * (p.value_dim + 1);
    return {p.groups, reduced_tokens, used_tokens, plan.chunk, p.kv_state_size(), plan.scratch_floats, work};
  }
};

}  // namespace

ReluLinearAttentionPlan plan(const LinearAttentionParams& p, Isa isa) {
  ReluLinearAttentionPlan plan;
  const int64_t lanes = info(isa).lanes;
  plan.tile = min(kMaxTile, kTileFloats / max(1, p.head_dim + p.value_dim)) / lanes * lanes;
  plan.tile = max(plan.tile, lanes);
  plan.tile = min(plan.tile, max(1, ceil_div(max(p.queries, p.keys), lanes)) * lanes);
  plan.chunk = kChunk;
  plan.scratch_floats = linear_attention_table(isa).scratch_floats(p.head_dim, p.value_dim, plan.tile);
  return plan;
}

void forward(const LinearAttentionParams& params, float* kv_state, const Parallel& parallel) {
  if (kv_state == nullptr && (params.queries == 0 || params.value_dim == 0)) return;
  const LaunchPlan launch(params);
  const LinearAttentionParams& p = launch.p;
  reduce_then_use(
      launch.schedule(p.keys, p.queries), kv_state, parallel,
      [&](const Range& range, float* part, const Arena& scratch) {
        launch.ukernels.reduce_keys(p, range, launch.plan.tile, part, scratch);
      },
      [&](const Range& range, const float* total, const Arena& scratch) {
        launch.ukernels.apply_queries(p, range, launch.plan.tile, total, scratch);
      });
}

void backward(const LinearAttentionParams& params, const float* kv_state, const Parallel& parallel) {
  const LaunchPlan launch(params);
  const LinearAttentionParams& p = launch.p;
  reduce_then_use(
      launch.schedule(p.queries, p.keys), nullptr, parallel,
      [&](const Range& range, float* part, const Arena& scratch) {
        const float* const own = kv_state + range.group * p.kv_state_size();
        launch.ukernels.grad_queries(p, range, launch.plan.tile, own, part, scratch);
      },
      [&](const Range& range, const float* total, const Arena& scratch) {
        launch.ukernels.grad_keys(p, range, launch.plan.tile, total, scratch);
      });
}

}  // namespace effattn::cpu
