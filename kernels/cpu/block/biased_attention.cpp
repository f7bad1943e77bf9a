// Softmax attention with a bias: heads in parallel, or with talking heads parts of the queries.
#include "../softmax_attention/ukernels.h"
#include "heads.h"

namespace effattn::cpu {
namespace {

constexpr int64_t kMinQueries = 24;  // so many are worth gathering the keys for

// What one thread attends to at a time.
struct Part {
  int64_t head, heads, query, queries;

  Part(const BlockStep& step, int64_t parts, int64_t part)
      : head(part), heads(1), query(0), queries(step.queries) {
    if (!step.talking_heads) return;
    head = 0;
    heads = step.heads;
    query = part * step.queries / parts;
    queries = (part + 1) * step.queries / parts - query;
  }
};

// Rows of the heads of a part, one head behind the other.
struct AttentionMemory {
  HeadRows<float> q, k, v, out;
  Arena scratch;

  AttentionMemory(const SoftmaxHeads& heads, int64_t scratch_floats, Arena& arena)
      : q(rows(heads.heads, heads.queries, heads.head_dim, arena)),
        k(rows(heads.heads, heads.keys, heads.head_dim, arena)),
        v(rows(heads.heads, heads.keys, heads.value_dim, arena)),
        out(rows(heads.heads, heads.queries, heads.value_dim, arena)),
        scratch(arena.part(scratch_floats)) {}

 private:
  static HeadRows<float> rows(int64_t heads, int64_t tokens, int64_t dim, Arena& arena) {
    const int64_t stride = round_up(dim, kWholeVectors);
    return {arena.floats(heads * tokens * stride), tokens * stride, stride};
  }
};

struct Attention {
  const Call& call;
  const BlockStep& step;
  const int result;
  const SoftmaxUkernels& softmax = softmax_ukernels();
  const int64_t key_blocks = step.key_stride() / kBlock, value_blocks = step.value_stride() / kBlock;

  // The blocks of a value from `first` on that are those of a head.
  HeadBlocks head_of(int value, int64_t image, int64_t first, int64_t head, int64_t blocks) const {
    return {call.whole(value, image), first + head * blocks, blocks, call.plan.values[value].size.width};
  }
  // All heads' q come first, then their k, then their v, in one value or in several.
  HeadBlocks q(int64_t image, int64_t head) const {
    return head_of(step.inputs[0], image, 0, head, key_blocks);
  }
  HeadBlocks k(int64_t image, int64_t head) const {
    const bool apart = step.inputs.size() == 3;
    return head_of(step.inputs[apart ? 1 : 0], image, apart ? 0 : step.heads * key_blocks, head, key_blocks);
  }
  HeadBlocks v(int64_t image, int64_t head) const {
    const int64_t first = step.inputs.size() == 1 ? 2 * step.heads * key_blocks : 0;
    return head_of(step.inputs.back(), image, first, head, value_blocks);
  }

  void attend(int64_t image, const Part& part) const {
    const std::vector<const float*> weights = call.weights_of(step);
    SoftmaxHeads heads{part.heads,
                       part.queries,
                       step.keys,
                       step.head_dim,
                       step.value_stride(),
                       step.scale,
                       weights[0],
                       step.queries * step.keys,
                       {}};
    heads.bias += part.head * heads.bias_stride + part.query * step.keys;
    if (step.talking_heads) heads.mix = {weights[1], weights[2], weights[3], weights[4]};
    const auto memory = in_thread_arena<AttentionMemory>(heads, softmax.scratch_floats(heads));
    for (int64_t h = 0; h < part.heads; ++h) {
      q(image, part.head + h).gather(part.query, part.query + part.queries, memory.q.of(h));
      k(image, part.head + h).gather(0, step.keys, memory.k.of(h));
      v(image, part.head + h).gather(0, step.keys, memory.v.of(h));
    }
    softmax.forward(heads, memory.q, memory.k, memory.v, memory.out, memory.scratch);
    for (int64_t h = 0; h < part.heads; ++h) {
      const HeadBlocks out = head_of(result, image, 0, part.head + h, value_blocks);
      out.scatter(part.query, part.query + part.queries, memory.out.of(h));
      if (step.addend == BlockStep::kNone && step.activation == Activation::kNone) continue;
      const View addend = step.addend == BlockStep::kNone ? View{} : call.whole(step.addend, image);
      out.for_rows(part.query, part.query + part.queries,
                   [&](float* pixels, int64_t count, int64_t token, int64_t b) {
                     const int64_t at = part.query + token;
                     if (addend.data != nullptr) {
                       const float* const row = addend.row(out.first + b, at / out.width);
                       add(pixels, row + at % out.width * kBlock, count * kBlock);
                     }
                     call.ukernels.activate(step.activation, count, pixels, pixels);
                   });
    }
  }
};

}  // namespace

void run_attention(const Call& call, int step, const Parallel& parallel) {
  const BlockStep& s = call.plan.steps[step];
  const Attention attention{call, s, step};
  const int64_t parts = s.talking_heads ? max(1, s.queries / kMinQueries) : s.heads;
  const int64_t channels = s.head_dim + s.value_dim + 20 + (s.talking_heads ? 2 * s.heads : 0);
  const int64_t work = s.heads * s.queries * s.keys * channels / parts;
  parallel(call.params.batch * parts, work, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      attention.attend(unit / parts, Part(s, parts, unit % parts));
    }
  });
}

}  // namespace effattn::cpu
