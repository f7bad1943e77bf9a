// ReLU linear attention on a card: entry points, as those of the CPU.
#pragma once

#include "../../params/relu_linear_attention.h"
#include "../core/execution.h"

namespace effattn::cuda {

// `sums`: groups x (value_dim + 1, head_dim) floats to keep for the backward pass, or null.
void forward(const LinearAttentionParams& problem, float* sums, const Execution& execution);
// Fills `sums` with those of the forward pass, of keys and values alone.
void sum_keys(const LinearAttentionParams& problem, float* sums, const Execution& execution);
// `sums`: those of the forward pass.
void backward(const LinearAttentionParams& problem, const float* sums, const Execution& execution);

}  // namespace effattn::cuda
