// Which thread reduces which tokens to a state, and which uses it.
//
// States are always accumulated chunk by chunk and added up in the order of the chunks, and chunks depend on
// the sizes alone; threads only decide who computes a chunk. So the results are the same bits for every
// thread count.
#pragma once

#include "arena.h"
#include "parallel.h"
#include "rows.h"

namespace effattn::cpu {

// The tokens of one call of a micro-kernel, and what the same thread does after it, so that memory can be
// prefetched. One micro-kernel reduces tokens to the state, another uses the state.
struct Range {
  enum class Next { kNothing, kReduce, kUse };
  int64_t group, begin, end;
  Next next = Next::kNothing;
  int64_t next_group = 0, next_begin = 0;
};

struct Schedule {
  int64_t groups, reduced_tokens, used_tokens;
  int64_t chunk;           // tokens whose state is accumulated alone
  int64_t state_size;      // floats of a group
  int64_t scratch_floats;  // that reduce and use work in
  int64_t group_work;      // multiply-adds of a group

  int64_t chunks() const { return ceil_div(reduced_tokens, chunk); }
};

// A thread's memory where it takes whole groups.
struct GroupMemory {
  Arena scratch;
  float *part, *total;
  GroupMemory(const Schedule& s, Arena& arena)
      : scratch(arena.part(s.scratch_floats)),
        part(arena.floats(s.state_size)),
        total(arena.floats(s.state_size)) {}
};

// The states of all chunks, and of all groups unless somebody keeps them.
struct ChunkMemory {
  float *parts, *totals;
  ChunkMemory(const Schedule& s, float* kept, Arena& arena)
      : parts(arena.floats(s.groups * s.chunks() * s.state_size)),
        totals(kept != nullptr ? kept : arena.floats(s.groups * s.state_size)) {}
};

// Runs `reduce` (tokens -> state of one group) chunk by chunk, then `use` (state -> tokens), for all groups.
// `kept` (groups x state) receives the totals if not null.
template <class Reduce, class Use>
void reduce_then_use(const Schedule& s, float* kept, const Parallel& parallel, const Reduce& reduce,
                     const Use& use) {
  using Next = Range::Next;
  const int64_t size = s.state_size, groups = s.groups;
  const int64_t chunks = s.chunks(), used_chunks = ceil_div(s.used_tokens, s.chunk);
  const bool balanced = groups >= 4 * parallel.threads || groups % parallel.threads == 0;
  if (balanced || max(chunks, used_chunks) <= 1 || groups * s.group_work < 2 * kMinWorkPerThread) {
    parallel(groups, s.group_work, [&](int64_t begin, int64_t end) {
      const GroupMemory own = in_thread_arena<GroupMemory>(s);
      for (int64_t g = begin; g < end; ++g) {
        float* const total = kept != nullptr ? kept + g * size : own.total;
        if (chunks == 0) clear(total, size);
        for (int64_t c = 0; c < chunks; ++c) {
          const int64_t from = c * s.chunk, to = min(from + s.chunk, s.reduced_tokens);
          const bool last = to == s.reduced_tokens;
          reduce({g, from, to, last ? Next::kUse : Next::kReduce, g, last ? 0 : to},
                 c == 0 ? total : own.part, own.scratch);
          if (c > 0) add(total, own.part, size);
        }
        use({g, 0, s.used_tokens, g + 1 < end ? Next::kReduce : Next::kNothing, g + 1, 0}, total,
            own.scratch);
      }
    });
    return;
  }

  const InSharedArena<ChunkMemory> shared(s, kept);
  float *const parts = shared->parts, *const totals = shared->totals;
  // Chunk i of all groups' chunks, followed by chunk i + 1 unless the thread ends there.
  const auto range = [&](int64_t i, int64_t end, int64_t chunks_of_group, int64_t tokens,
                         Next next) -> Range {
    const int64_t from = i % chunks_of_group * s.chunk, following = i + 1;
    return {i / chunks_of_group,         from,
            min(from + s.chunk, tokens), i + 1 < end ? next : Next::kNothing,
            following / chunks_of_group, following % chunks_of_group * s.chunk};
  };
  // Not below kMinWorkPerThread, so that each chunk may get a thread of its own.
  const int64_t chunk_work = max(kMinWorkPerThread, s.group_work / max(1, chunks + used_chunks));
  parallel(groups * chunks, chunk_work, [&](int64_t begin, int64_t end) {
    const Arena scratch = thread_arena(s.scratch_floats);
    for (int64_t i = begin; i < end; ++i) {
      reduce(range(i, end, chunks, s.reduced_tokens, Next::kReduce), parts + i * size, scratch);
    }
  });
  for (int64_t g = 0; g < groups; ++g) {
    float* const total = totals + g * size;
    const float* const own = parts + g * chunks * size;
    if (chunks == 0) clear(total, size);
    // The first chunk is copied, as above: added to zero, a negative zero would change its sign.
    for (int64_t c = 0; c < chunks; ++c) c == 0 ? copy(total, own, size) : add(total, own + c * size, size);
  }
  parallel(groups * used_chunks, chunk_work, [&](int64_t begin, int64_t end) {
    const Arena scratch = thread_arena(s.scratch_floats);
    for (int64_t i = begin; i < end; ++i) {
      const Range r = range(i, end, used_chunks, s.used_tokens, Next::kUse);
      use(r, totals + r.group * size, scratch);
    }
  });
}

}  // namespace effattn::cpu
