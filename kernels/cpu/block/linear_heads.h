// ReLU linear attention of heads whose q, k and v lie in blocks of channels, in turn.
#pragma once

#include "../core/schedule.h"
#include "heads.h"

namespace effattn {

struct LinearAttentionParams;

namespace cpu {

struct LinearAttentionTable;
struct LinearAttentionUkernels;

class LinearAttention {
 public:
  static constexpr int64_t kChunk = 512;  // tokens, whose state is summed alone

  LinearAttention(const BlockPlan& plan, int step);

  int64_t heads() const { return heads_; }  // of one input
  // Blocks of an input that are those of a head.
  int64_t blocks() const { return 3 * head_blocks_; }
  Schedule schedule(int64_t groups) const;

  // Of a head of the input with this number: the state of tokens [begin, end), and what queries make of it.
  void reduce(const View& in, int64_t head, int64_t begin, int64_t end, float* state, Arena arena) const;
  void apply(const View& in, int64_t head, int64_t begin, int64_t end, const float* state, const View& out,
             int64_t input, Arena arena) const;
  // Both, of all tokens.
  struct Memory {
    float *part, *total;
    Arena scratch;
    Memory(const Schedule& s, Arena& arena)
        : part(arena.floats(s.state_size)),
          total(arena.floats(s.state_size)),
          scratch(arena.part(s.scratch_floats)) {}
  };
  void attend(const View& in, int64_t head, const View& out, int64_t input, const Memory& memory) const;

 private:
  enum class Part { kQ, kK, kV };
  LinearAttentionParams params(int64_t tokens) const;
  HeadBlocks part(const View& in, int64_t head, Part which) const;

  int64_t width_, tokens_, dim_, head_blocks_, heads_, tile_;
  float eps_;
  const LinearAttentionTable& table_;
  const LinearAttentionUkernels& ukernels_;
};

}  // namespace cpu
}  // namespace effattn
