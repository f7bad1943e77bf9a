// ReLU linear attention on the CPU: the plan and the entry points.
#pragma once

#include <cstdint>

#include "../../params/relu_linear_attention.h"
#include "../core/isa.h"
#include "../core/parallel.h"

namespace effattn::cpu {

// What a call will do, for given sizes; kernels, glue and tests all read it from here.
struct ReluLinearAttentionPlan {
  int64_t chunk;           // tokens whose state is accumulated alone, a function of the sizes only
  int64_t tile;            // tokens held in cache at once
  int64_t scratch_floats;  // cache-resident floats a micro-kernel needs
};

EFFATTN_EXPORT ReluLinearAttentionPlan plan(const LinearAttentionParams& params, Isa isa);

// `kv_state`: groups x (value_dim + 1, head_dim) floats to keep for the backward pass, or null.
EFFATTN_EXPORT void forward(const LinearAttentionParams& params, float* kv_state, const Parallel& parallel);

// `kv_state`: that of the forward pass.
EFFATTN_EXPORT void backward(const LinearAttentionParams& params, const float* kv_state,
                             const Parallel& parallel);

}  // namespace effattn::cpu
