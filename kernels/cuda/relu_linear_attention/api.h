// ReLU linear attention on a GPU: the entry points, as those of the CPU.
#pragma once

#include "../../params/relu_linear_attention.h"
#include "../core/execution.h"

namespace effattn::cuda {

// `kv_state`: groups x (value_dim + 1, head_dim) floats to keep for the backward, or null.
void forward(const LinearAttentionParams& params, float* kv_state, const Execution& execution);
// Fills `kv_state` as the forward does, from keys and values alone.
void make_kv_state(const LinearAttentionParams& params, float* kv_state, const Execution& execution);
void backward(const LinearAttentionParams& params, const float* kv_state, const Execution& execution);

}  // namespace effattn::cuda
