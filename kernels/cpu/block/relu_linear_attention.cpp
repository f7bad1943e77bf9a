#include "../relu_linear_attention/plan.h"

#include "../relu_linear_attention/ukernels.h"
#include "linear_heads.h"

namespace effattn::cpu {
namespace {

Operand operand(const Rows<float>& rows) { return {rows.data, nullptr, rows.stride, 1}; }

}  // namespace

LinearAttention::LinearAttention(const BlockPlan& plan, int step)
    : table_(linear_attention_table()), ukernels_(table_.of(DType::kFloat32)) {
  const BlockStep& s = plan.steps[step];
  const ValuePlan& in = plan.values[s.inputs[0]];
  width_ = in.size.width;
  tokens_ = in.pixels();
  dim_ = s.head_dim;
  eps_ = s.eps;
  head_blocks_ = dim_ / kBlock;
  heads_ = in.blocks / blocks();
  tile_ = min(cpu::plan(params(tokens_), active_isa()).tile, kChunk);
}

LinearAttentionParams LinearAttention::params(int64_t tokens) const {
  LinearAttentionParams p{};
  p.groups = 1;
  p.queries = p.keys = tokens;
  p.head_dim = p.value_dim = dim_;
  p.eps = eps_;
  return p;
}

Schedule LinearAttention::schedule(int64_t groups) const {
  const int64_t part_floats = round_up(kChunk * dim_, Arena::kAlignment) + Arena::kMaxOverhead;
  Schedule s{};
  s.groups = groups;
  s.reduced_tokens = s.used_tokens = tokens_;
  s.chunk = kChunk;
  s.state_size = params(tokens_).kv_state_size();
  s.scratch_floats = table_.scratch_floats(dim_, dim_, tile_) + 2 * part_floats + Arena::kMaxOverhead;
  s.group_work = 2 * tokens_ * dim_ * (dim_ + 1);
  return s;
}

HeadBlocks LinearAttention::part(const View& in, int64_t head, Part which) const {
  return {in, head * blocks() + static_cast<int64_t>(which) * head_blocks_, head_blocks_, width_};
}

void LinearAttention::reduce(const View& in, int64_t head, int64_t begin, int64_t end, float* state,
                             Arena arena) const {
  LinearAttentionParams p = params(end - begin);
  p.k = operand(part(in, head, Part::kK).gathered(begin, end, arena));
  p.v = operand(part(in, head, Part::kV).gathered(begin, end, arena));
  ukernels_.reduce_keys(p, {0, 0, p.keys}, tile_, state, arena);
}

void LinearAttention::apply(const View& in, int64_t head, int64_t begin, int64_t end, const float* state,
                            const View& out, int64_t input, Arena arena) const {
  LinearAttentionParams p = params(end - begin);
  p.q = operand(part(in, head, Part::kQ).gathered(begin, end, arena));
  const HeadBlocks to{out, (input * heads_ + head) * head_blocks_, head_blocks_, width_};
  if (to.is_dense()) {
    p.out = {to.token(begin), nullptr, kBlock, 1};
    return ukernels_.apply_queries(p, {0, 0, p.queries}, tile_, state, arena);
  }
  const Rows<float> rows{arena.floats(p.queries * dim_), dim_};
  p.out = operand(rows);
  ukernels_.apply_queries(p, {0, 0, p.queries}, tile_, state, arena);
  to.scatter(begin, end, rows);
}

void LinearAttention::attend(const View& in, int64_t head, const View& out, int64_t input,
                             const Memory& memory) const {
  const int64_t state_size = params(tokens_).kv_state_size();
  for (int64_t begin = 0; begin < tokens_; begin += kChunk) {
    reduce(in, head, begin, min(begin + kChunk, tokens_), begin == 0 ? memory.total : memory.part,
           memory.scratch);
    if (begin > 0) add(memory.total, memory.part, state_size);
  }
  for (int64_t begin = 0; begin < tokens_; begin += kChunk) {
    apply(in, head, begin, min(begin + kChunk, tokens_), memory.total, out, input, memory.scratch);
  }
}

void run_linear_attention(const Call& call, int step, const Parallel& parallel) {
  const LinearAttention attention(call.plan, step);
  const std::vector<int>& inputs = call.plan.steps[step].inputs;
  const int64_t heads = attention.heads(), scales = static_cast<int64_t>(inputs.size());
  // A group is a head of an input of an image.
  const auto with_group = [&](int64_t group, const auto& f) {
    const int64_t head = group % heads, input = group / heads % scales, image = group / heads / scales;
    f(call.whole(inputs[input], image), head, input, image);
  };
  reduce_then_use(
      attention.schedule(call.params.batch * scales * heads), nullptr, parallel,
      [&](const Range& range, float* state, const Arena& arena) {
        with_group(range.group, [&](const View& in, int64_t head, int64_t, int64_t) {
          attention.reduce(in, head, range.begin, range.end, state, arena);
        });
      },
      [&](const Range& range, const float* state, const Arena& arena) {
        with_group(range.group, [&](const View& in, int64_t head, int64_t input, int64_t image) {
          const View out = call.whole(step, image);
          for (int64_t begin = range.begin; begin < range.end; begin += LinearAttention::kChunk) {
            const int64_t end = min(begin + LinearAttention::kChunk, range.end);
            attention.apply(in, head, begin, end, state, out, input, arena);
          }
        });
      });
}

}  // namespace effattn::cpu
