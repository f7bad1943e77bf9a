// ReLU linear attention on the CPU: the plan and the entry points.
#pragma once

#include <cstdint>

#include "../../params/relu_linear_attention.h"
#include "../core/isa.h"
#include "../core/parallel.h"

namespace effattn::cpu {

// What a call will do, for given sizes; kernels, glue, tests and benchmarks all read it from here.
struct ReluLinearAttentionPlan {
  int64_t chunk;           // tokens whose sums are added up alone, a function of the sizes only
  int64_t tile;            // tokens held in cache at once
  int64_t scratch_floats;  // cache-resident floats a pass needs
  int64_t partial_floats;  // floats of partial sums when a group is split over threads
  int64_t flops_forward;   // floating-point operations of the two products and the normaliser
  int64_t flops_backward;
  int64_t minimum_bytes_forward;  // each input read once, each output written once
  int64_t minimum_bytes_backward;
};

EFFATTN_EXPORT ReluLinearAttentionPlan plan(const LinearAttentionParams& problem, Isa isa);

// `sums`: groups x (value_dim + 1, head_dim) floats to keep for the backward pass, or null.
void forward(const LinearAttentionParams& problem, float* sums, const Parallel& parallel);

// `sums`: those of the forward pass.
void backward(const LinearAttentionParams& problem, const float* sums, const Parallel& parallel);

// --- what each instruction set provides -------------------------------------------------------------

// The tokens of one call of a pass, and what the same thread does after it, so that memory can be asked for
// before it is needed. One pass reduces tokens to sums, the other uses the sums.
struct Range {
  enum class Next { kNothing, kReduce, kUse };
  int64_t group, begin, end;
  Next next = Next::kNothing;
  int64_t next_group = 0, next_begin = 0;
};

// Every pass works on one group and a range of tokens, in one thread, in `scratch`.
struct ReluLinearAttentionPasses {
  int64_t (*scratch_floats)(int64_t head_dim, int64_t value_dim, int64_t tile);
  // Writes the sums of a range of keys.
  void (*sum_keys)(const LinearAttentionParams&, const Range&, int64_t tile, float* sums, float* scratch);
  // Writes out for a range of queries.
  void (*apply_queries)(const LinearAttentionParams&, const Range&, int64_t tile, const float* sums,
                        float* scratch);
  // Writes grad_q for a range of queries and their share of the gradient of the sums.
  void (*grad_queries)(const LinearAttentionParams&, const Range&, int64_t tile, const float* sums,
                       float* grad_sums, float* scratch);
  // Writes grad_k and grad_v for a range of keys.
  void (*grad_keys)(const LinearAttentionParams&, const Range&, int64_t tile, const float* grad_sums,
                    float* scratch);
};

const ReluLinearAttentionPasses& relu_linear_attention_passes(Isa isa, DType dtype);

#define EFFATTN_ROW(name, lanes)                                        \
  namespace name {                                                      \
  const ReluLinearAttentionPasses& relu_linear_attention_passes(DType); \
  }
EFFATTN_ISA_LIST(EFFATTN_ROW)
#undef EFFATTN_ROW

}  // namespace effattn::cpu
