// EfficientFormer's attention on a card: entry points, as those of the CPU.
#pragma once

#include "../../params/biased_attention.h"
#include "../core/execution.h"

namespace effattn::cuda {

void biased_attention(const BiasedAttentionParams& problem, const Execution& execution);
void biased_attention_backward(const BiasedAttentionParams& problem, const Execution& execution);

}  // namespace effattn::cuda
