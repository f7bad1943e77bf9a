// The schedule: which pass runs over which tokens in which thread.
//
// Sums are always taken chunk by chunk and added up in the order of the chunks, and chunks depend on
// the sizes alone; threads only decide who computes a chunk. So the results are the same bits for every
// thread count.
#include "relu_linear_attention.h"

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "sizes.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace effattn::cpu {
namespace {

constexpr int64_t kTileFloats =
    16384;                         // 64 KiB of q or k and v; the backward holds up to twice that, see NOTES
constexpr int64_t kMaxTile = 256;  // no gain was seen from longer rows
constexpr int64_t kChunk = 2048;   // long enough to hide the cost of adding partial sums
constexpr int64_t kKeptFloats = 1 << 20;
constexpr int64_t kMinWorkPerThread = 200000;  // multiply-adds, about 4 us: below, waking a thread costs more

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

Floats aligned_floats(int64_t count) {
  Floats floats(static_cast<float*>(std::aligned_alloc(64, round_up(larger(1, count) * 4, 64))));
  if (floats == nullptr) {
    throw std::runtime_error("effattn: cannot allocate " + std::to_string(4 * count) + " bytes to work in");
  }
  return floats;
}

// Memory that a thread keeps between calls: at most four times what the last one needed, or kKeptFloats.
// Calls of two sizes in turn find it as they left it.
float* thread_scratch(int64_t floats) {
  thread_local Floats memory;
  thread_local int64_t capacity = 0;
  if (capacity < floats || capacity > larger(4 * floats, kKeptFloats)) {
    capacity = 0;
    memory.reset();
    memory = aligned_floats(floats);
    capacity = floats;
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(memory.get(), capacity * sizeof(float));  // passes leave their gaps behind
#endif
  return memory.get();
}

void add(float* total, const float* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += part[i];
}

void copy(float* total, const float* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] = part[i];
}

void clear(float* total, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] = 0.0f;
}

// One leading dimension where the strides of all operands allow it, as they do for a tensor cut into heads:
// finding a group is a multiplication then.
ReluLinearAttention with_leads_merged(ReluLinearAttention p) {
  Operand* const operands[] = {&p.q, &p.k, &p.v, &p.out, &p.grad_out, &p.grad_q, &p.grad_k, &p.grad_v};
  int last = p.lead_rank - 1;
  while (last > 0 && p.lead_sizes[last] == 1) --last;
  if (last <= 0) return p;
  for (const Operand* operand : operands) {
    if (operand->data == nullptr) continue;
    int64_t expected = operand->lead_strides[last] * p.lead_sizes[last];
    for (int i = last - 1; i >= 0; --i) {
      if (p.lead_sizes[i] == 1) continue;
      if (operand->lead_strides[i] != expected) return p;
      expected *= p.lead_sizes[i];
    }
  }
  for (Operand* operand : operands) operand->lead_strides += operand->data == nullptr ? 0 : last;
  p.lead_rank = 1;
  return p;
}

// Runs `reduce` (tokens -> sums of one group) chunk by chunk, then `use` (sums -> tokens), for all
// groups. `kept` (groups x sums) receives the totals if not null.
template <class Reduce, class Use>
void reduce_then_use(const ReluLinearAttention& p, const ReluLinearAttentionPlan& plan,
                     int64_t reduced_tokens, int64_t used_tokens, float* kept, const Parallel& parallel,
                     const Reduce& reduce, const Use& use) {
  using Next = Range::Next;
  const int64_t size = p.sums_size();
  const int64_t chunks = ceil_div(reduced_tokens, plan.chunk);
  const int64_t used_chunks = ceil_div(used_tokens, plan.chunk);
  const int64_t group_work = (reduced_tokens + used_tokens + 1) * (p.head_dim + 1) * (p.value_dim + 1);
  const int64_t grain = larger(1, kMinWorkPerThread / group_work);
  const int64_t scratch_floats = plan.scratch_floats;

  const bool balanced = p.groups >= 4 * parallel.threads || p.groups % parallel.threads == 0;
  if (balanced || larger(chunks, used_chunks) <= 1 || p.groups * group_work < 2 * kMinWorkPerThread) {
    parallel(p.groups, grain, [&](int64_t begin, int64_t end) {
      float* const scratch = thread_scratch(scratch_floats + 2 * size + 32);
      float* const part = scratch + scratch_floats;
      float* const own_total = part + size;
      for (int64_t g = begin; g < end; ++g) {
        float* const total = kept != nullptr ? kept + g * size : own_total;
        if (chunks == 0) clear(total, size);
        for (int64_t c = 0; c < chunks; ++c) {
          const int64_t from = c * plan.chunk, to = smaller(from + plan.chunk, reduced_tokens);
          const bool last = to == reduced_tokens;
          reduce({g, from, to, last ? Next::kUse : Next::kReduce, g, last ? 0 : to}, c == 0 ? total : part,
                 scratch);
          if (c > 0) add(total, part, size);
        }
        use({g, 0, used_tokens, g + 1 < end ? Next::kReduce : Next::kNothing, g + 1, 0}, total, scratch);
      }
    });
    return;
  }

  const Floats parts = aligned_floats(p.groups * chunks * size);
  Floats own_totals;
  if (kept == nullptr) {
    own_totals = aligned_floats(p.groups * size);
    kept = own_totals.get();
  }
  // Chunk i of all groups' chunks, followed by chunk i + 1 unless the thread ends there.
  const auto range = [&](int64_t i, int64_t end, int64_t chunks_of_group, int64_t tokens,
                         Next next) -> Range {
    const int64_t from = i % chunks_of_group * plan.chunk, following = i + 1;
    return {i / chunks_of_group,
            from,
            smaller(from + plan.chunk, tokens),
            i + 1 < end ? next : Next::kNothing,
            following / chunks_of_group,
            following % chunks_of_group * plan.chunk};
  };
  parallel(p.groups * chunks, 1, [&](int64_t begin, int64_t end) {
    float* const scratch = thread_scratch(scratch_floats);
    for (int64_t i = begin; i < end; ++i) {
      reduce(range(i, end, chunks, reduced_tokens, Next::kReduce), parts.get() + i * size, scratch);
    }
  });
  for (int64_t g = 0; g < p.groups; ++g) {
    float* const total = kept + g * size;
    const float* const own = parts.get() + g * chunks * size;
    if (chunks == 0) clear(total, size);
    // The first chunk is copied, as above: added to zero, a negative zero would change its sign.
    for (int64_t c = 0; c < chunks; ++c) c == 0 ? copy(total, own, size) : add(total, own + c * size, size);
  }
  parallel(p.groups * used_chunks, 1, [&](int64_t begin, int64_t end) {
    float* const scratch = thread_scratch(scratch_floats);
    for (int64_t i = begin; i < end; ++i) {
      const Range r = range(i, end, used_chunks, used_tokens, Next::kUse);
      use(r, kept + r.group * size, scratch);
    }
  });
}

}  // namespace

ReluLinearAttentionPlan plan(const ReluLinearAttention& p, Isa isa) {
  ReluLinearAttentionPlan plan;
  const int64_t lanes = info(isa).lanes;
  plan.tile = smaller(kMaxTile, kTileFloats / larger(1, p.head_dim + p.value_dim)) / lanes * lanes;
  plan.tile = larger(plan.tile, lanes);
  plan.tile = smaller(plan.tile, larger(1, ceil_div(larger(p.queries, p.keys), lanes)) * lanes);
  plan.chunk = kChunk;
  plan.scratch_floats =
      relu_linear_attention_passes(isa, p.dtype).scratch_floats(p.head_dim, p.value_dim, plan.tile);
  plan.partial_floats = p.groups * ceil_div(larger(p.queries, p.keys), plan.chunk) * p.sums_size();
  const int64_t matrix = p.head_dim * (p.value_dim + 1);
  plan.flops_forward = 2 * p.groups * (p.queries + p.keys) * matrix;
  plan.flops_backward = 2 * plan.flops_forward;
  const int64_t width = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t queries = p.groups * p.queries, keys = p.groups * p.keys;
  plan.minimum_bytes_forward = width * (queries + keys) * (p.head_dim + p.value_dim);
  plan.minimum_bytes_backward =
      width * (queries * (2 * p.head_dim + p.value_dim) + keys * 2 * (p.head_dim + p.value_dim));
  return plan;
}

void forward(const ReluLinearAttention& problem, float* sums, const Parallel& parallel) {
  if (sums == nullptr && (problem.queries == 0 || problem.value_dim == 0)) return;
  const ReluLinearAttention p = with_leads_merged(problem);
  const Isa isa = active_isa();
  const ReluLinearAttentionPasses& passes = relu_linear_attention_passes(isa, p.dtype);
  const ReluLinearAttentionPlan plan = cpu::plan(p, isa);
  reduce_then_use(
      p, plan, p.keys, p.queries, sums, parallel,
      [&](const Range& range, float* part, float* scratch) {
        passes.sum_keys(p, range, plan.tile, part, scratch);
      },
      [&](const Range& range, const float* total, float* scratch) {
        passes.apply_queries(p, range, plan.tile, total, scratch);
      });
}

void backward(const ReluLinearAttention& problem, const float* sums, const Parallel& parallel) {
  const ReluLinearAttention p = with_leads_merged(problem);
  const Isa isa = active_isa();
  const ReluLinearAttentionPasses& passes = relu_linear_attention_passes(isa, p.dtype);
  const ReluLinearAttentionPlan plan = cpu::plan(p, isa);
  reduce_then_use(
      p, plan, p.queries, p.keys, nullptr, parallel,
      [&](const Range& range, float* part, float* scratch) {
        passes.grad_queries(p, range, plan.tile, sums + range.group * p.sums_size(), part, scratch);
      },
      [&](const Range& range, const float* total, float* scratch) {
        passes.grad_keys(p, range, plan.tile, total, scratch);
      });
}

const ReluLinearAttentionPasses& relu_linear_attention_passes(Isa isa, DType dtype) {
  switch (isa) {
#define EFFATTN_ROW(name, lanes) \
  case Isa::name:                \
    return name::relu_linear_attention_passes(dtype);
    EFFATTN_ISA_LIST(EFFATTN_ROW)
#undef EFFATTN_ROW
  }
  __builtin_unreachable();
}

}  // namespace effattn::cpu
