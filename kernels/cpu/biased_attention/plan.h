// EfficientFormer's attention on the CPU: softmax attention with a bias on every pair of tokens, with or
// without talking heads. Tensors of any dtype and any strides; everything is computed in float.
#pragma once

#include "../core/parallel.h"
#include "../softmax_attention/ukernels.h"

namespace effattn::cpu {

void biased_attention(const BiasedAttentionParams& problem, const Parallel& parallel);
void biased_attention_backward(const BiasedAttentionParams& problem, const Parallel& parallel);

}  // namespace effattn::cpu
