// Biased attention on the CPU, with or without talking heads. Tensors of any dtype and any strides;
// everything is computed in float.
#pragma once

#include "../../params/biased_attention.h"
#include "../core/isa.h"
#include "../core/parallel.h"

namespace effattn::cpu {

EFFATTN_EXPORT void biased_attention(const BiasedAttentionParams& params, const Parallel& parallel);
EFFATTN_EXPORT void biased_attention_backward(const BiasedAttentionParams& params, const Parallel& parallel);

}  // namespace effattn::cpu
