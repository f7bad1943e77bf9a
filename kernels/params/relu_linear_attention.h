// ReLU linear attention.
//
//   S = sum_m relu(k_m)^T v_m    z = sum_m relu(k_m)    out_n = relu(q_n) S / (relu(q_n) . z + eps)
//
// Sizes may be zero; strides may be anything that addresses valid memory.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "operand.h"
#include "sizes.h"

namespace effattn {

struct LinearAttentionParams {
  DType dtype;
  int lead_rank;
  const int64_t* lead_sizes;
  int64_t groups;                              // the product of lead_sizes
  int64_t queries, keys, head_dim, value_dim;  // N, M, D, Dv
  float eps;
  Operand q, k, v;
  Operand out;                               // forward
  Operand grad_out, grad_q, grad_k, grad_v;  // backward; grad_out is read only

  // Elements of the kv_state of one group: S^T, and z in the last row, (value_dim + 1, head_dim).
  int64_t kv_state_size() const { return head_dim * (value_dim + 1); }
};

}  // namespace effattn
