// EfficientFormer's attention on a GPU: entry points, as those of the CPU.
#pragma once

#include "../../params/biased_attention.h"
#include "../core/execution.h"

namespace effattn::cuda {

void biased_attention(const BiasedAttentionParams& params, const Execution& execution);
void biased_attention_backward(const BiasedAttentionParams& params, const Execution& execution);

}  // namespace effattn::cuda
