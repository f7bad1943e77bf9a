// ReLU linear attention of heads whose q, k and v lie in blocks of channels.
#include "../core/schedule.h"
#include "../relu_linear_attention/plan.h"
#include "../relu_linear_attention/ukernels.h"
#include "heads.h"

namespace effattn::cpu {
namespace {

constexpr int64_t kChunk = 512;  // tokens, whose state is summed alone

enum class Part { kQ, kK, kV };

Operand operand(const Rows<float>& rows) { return {rows.data, nullptr, rows.stride, 1}; }

struct LinearAttention {
  const Call& call;
  const BlockStep& step;
  const int result;
  const ValuePlan& in = call.plan.values[step.inputs[0]];
  const int64_t tokens = in.pixels(), dim = step.head_dim, blocks = dim / kBlock;
  const int64_t heads = in.blocks / (3 * blocks), scales = static_cast<int64_t>(step.inputs.size());
  const LinearAttentionTable& table = linear_attention_table();
  const LinearAttentionUkernels& ukernels = table.of(DType::kFloat32);
  const int64_t tile = min(plan(params(tokens), active_isa()).tile, kChunk);

  // Of a head with so many tokens.
  LinearAttentionParams params(int64_t count) const {
    LinearAttentionParams p{};
    p.groups = 1;
    p.queries = p.keys = count;
    p.head_dim = p.value_dim = dim;
    p.eps = step.eps;
    return p;
  }

  // A group is a head of a scale of an image.
  HeadBlocks part(int64_t group, Part which) const {
    const int64_t head = group % heads, scale = group / heads % scales, image = group / heads / scales;
    const int64_t first = (3 * head + static_cast<int64_t>(which)) * blocks;
    return {call.whole(step.inputs[scale], image), first, blocks, in.size.width};
  }
  HeadBlocks out(int64_t group) const {
    const int64_t of_image = group % (heads * scales), image = group / (heads * scales);
    return {call.whole(result, image), of_image * blocks, blocks, in.size.width};
  }

  Schedule schedule() const {
    const int64_t part_floats = round_up(kChunk * dim, Arena::kAlignment) + Arena::kMaxOverhead;
    Schedule s{};
    s.groups = call.params.batch * scales * heads;
    s.reduced_tokens = s.used_tokens = tokens;
    s.chunk = kChunk;
    s.state_size = params(tokens).kv_state_size();
    s.scratch_floats = table.scratch_floats(dim, dim, tile) + 2 * part_floats + Arena::kMaxOverhead;
    s.group_work = 2 * tokens * dim * (dim + 1);
    return s;
  }

  void reduce(const Range& range, float* state, Arena arena) const {
    LinearAttentionParams p = params(range.end - range.begin);
    p.k = operand(part(range.group, Part::kK).gathered(range.begin, range.end, arena));
    p.v = operand(part(range.group, Part::kV).gathered(range.begin, range.end, arena));
    ukernels.reduce_keys(p, {0, 0, p.keys}, tile, state, arena);
  }

  void apply(int64_t group, int64_t begin, int64_t end, const float* state, Arena arena) const {
    LinearAttentionParams p = params(end - begin);
    p.q = operand(part(group, Part::kQ).gathered(begin, end, arena));
    const HeadBlocks to = out(group);
    if (to.is_dense()) {
      p.out = {to.token(begin), nullptr, kBlock, 1};
      return ukernels.apply_queries(p, {0, 0, p.queries}, tile, state, arena);
    }
    const Rows<float> rows{arena.floats(p.queries * dim), dim};
    p.out = operand(rows);
    ukernels.apply_queries(p, {0, 0, p.queries}, tile, state, arena);
    to.scatter(begin, end, rows);
  }
};

}  // namespace

void run_linear_attention(const Call& call, int step, const Parallel& parallel) {
  const LinearAttention attention{call, call.plan.steps[step], step};
  reduce_then_use(
      attention.schedule(), nullptr, parallel,
      [&](const Range& range, float* state, const Arena& arena) { attention.reduce(range, state, arena); },
      [&](const Range& range, const float* state, const Arena& arena) {
        for (int64_t begin = range.begin; begin < range.end; begin += kChunk) {
          attention.apply(range.group, begin, min(begin + kChunk, range.end), state, arena);
        }
      });
}

}  // namespace effattn::cpu
