// The micro-kernels of ReLU linear attention.
#pragma once

#include "../../params/relu_linear_attention.h"
#include "../core/arena.h"
#include "../core/isa.h"
#include "../core/schedule.h"

namespace effattn::cpu {

// Of one storage type. Each works on one group and a range of tokens.
struct LinearAttentionUkernels {
  // Writes the state of a range of keys.
  void (*reduce_keys)(const LinearAttentionParams&, const Range&, int64_t tile, float* kv_state, Arena);
  // Writes out for a range of queries.
  void (*apply_queries)(const LinearAttentionParams&, const Range&, int64_t tile, const float* kv_state,
                        Arena);
  // Writes grad_q for a range of queries and their share of the gradient of the state.
  void (*grad_queries)(const LinearAttentionParams&, const Range&, int64_t tile, const float* kv_state,
                       float* grad_kv_state, Arena);
  // Writes grad_k and grad_v for a range of keys.
  void (*grad_keys)(const LinearAttentionParams&, const Range&, int64_t tile, const float* grad_kv_state,
                    Arena);
};

struct LinearAttentionTable {
  int64_t (*scratch_floats)(int64_t head_dim, int64_t value_dim, int64_t tile);
  LinearAttentionUkernels of_dtype[3];  // in the order of DType

  const LinearAttentionUkernels& of(DType dtype) const { return of_dtype[static_cast<int>(dtype)]; }
};

EFFATTN_DISPATCH_TABLE(LinearAttentionTable, linear_attention_table)

}  // namespace effattn::cpu
