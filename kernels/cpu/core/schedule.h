// Which thread reduces which tokens to sums, and which uses them.
//
// Sums are always taken chunk by chunk and added up in the order of the chunks, and chunks depend on
// the sizes alone; threads only decide who computes a chunk. So the results are the same bits for every
// thread count.
#pragma once

#include "../relu_linear_attention/plan.h"
#include "arena.h"

namespace effattn::cpu {

struct Schedule {
  int64_t groups, reduced_tokens, used_tokens;
  int64_t chunk;           // tokens whose sums are added up alone
  int64_t sums_size;       // floats of a group
  int64_t scratch_floats;  // that reduce and use work in
  int64_t group_work;      // multiply-adds of a group
};

inline void add(float* total, const float* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += part[i];
}

inline void copy(float* total, const float* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] = part[i];
}

inline void clear(float* total, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] = 0.0f;
}

// Runs `reduce` (tokens -> sums of one group) chunk by chunk, then `use` (sums -> tokens), for all
// groups. `kept` (groups x sums) receives the totals if not null.
template <class Reduce, class Use>
void reduce_then_use(const Schedule& s, float* kept, const Parallel& parallel, const Reduce& reduce,
                     const Use& use) {
  using Next = Range::Next;
  const int64_t size = s.sums_size, groups = s.groups, scratch_floats = s.scratch_floats;
  const int64_t chunks = ceil_div(s.reduced_tokens, s.chunk), used_chunks = ceil_div(s.used_tokens, s.chunk);
  const bool balanced = groups >= 4 * parallel.threads || groups % parallel.threads == 0;
  if (balanced || max(chunks, used_chunks) <= 1 || groups * s.group_work < 2 * kMinWorkPerThread) {
    parallel(groups, s.group_work, [&](int64_t begin, int64_t end) {
      float* const scratch = thread_scratch(scratch_floats + 2 * size + 32);
      float* const part = scratch + scratch_floats;
      float* const own_total = part + size;
      for (int64_t g = begin; g < end; ++g) {
        float* const total = kept != nullptr ? kept + g * size : own_total;
        if (chunks == 0) clear(total, size);
        for (int64_t c = 0; c < chunks; ++c) {
          const int64_t from = c * s.chunk, to = min(from + s.chunk, s.reduced_tokens);
          const bool last = to == s.reduced_tokens;
          reduce({g, from, to, last ? Next::kUse : Next::kReduce, g, last ? 0 : to}, c == 0 ? total : part,
                 scratch);
          if (c > 0) add(total, part, size);
        }
        use({g, 0, s.used_tokens, g + 1 < end ? Next::kReduce : Next::kNothing, g + 1, 0}, total, scratch);
      }
    });
    return;
  }

  const Floats parts = aligned_floats(groups * chunks * size);
  Floats own_totals;
  if (kept == nullptr) {
    own_totals = aligned_floats(groups * size);
    kept = own_totals.get();
  }
  // Chunk i of all groups' chunks, followed by chunk i + 1 unless the thread ends there.
  const auto range = [&](int64_t i, int64_t end, int64_t chunks_of_group, int64_t tokens,
                         Next next) -> Range {
    const int64_t from = i % chunks_of_group * s.chunk, following = i + 1;
    return {i / chunks_of_group,         from,
            min(from + s.chunk, tokens), i + 1 < end ? next : Next::kNothing,
            following / chunks_of_group, following % chunks_of_group * s.chunk};
  };
  // A chunk is worth a thread: there are so many that sums take two passes.
  const int64_t chunk_work = max(kMinWorkPerThread, s.group_work / max(1, chunks + used_chunks));
  parallel(groups * chunks, chunk_work, [&](int64_t begin, int64_t end) {
    float* const scratch = thread_scratch(scratch_floats);
    for (int64_t i = begin; i < end; ++i) {
      reduce(range(i, end, chunks, s.reduced_tokens, Next::kReduce), parts.get() + i * size, scratch);
    }
  });
  for (int64_t g = 0; g < groups; ++g) {
    float* const total = kept + g * size;
    const float* const own = parts.get() + g * chunks * size;
    if (chunks == 0) clear(total, size);
    // The first chunk is copied, as above: added to zero, a negative zero would change its sign.
    for (int64_t c = 0; c < chunks; ++c) c == 0 ? copy(total, own, size) : add(total, own + c * size, size);
  }
  parallel(groups * used_chunks, chunk_work, [&](int64_t begin, int64_t end) {
    float* const scratch = thread_scratch(scratch_floats);
    for (int64_t i = begin; i < end; ++i) {
      const Range r = range(i, end, used_chunks, s.used_tokens, Next::kUse);
      use(r, kept + r.group * size, scratch);
    }
  });
}

}  // namespace effattn::cpu
