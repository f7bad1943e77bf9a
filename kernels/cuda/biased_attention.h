// EfficientFormer's attention on a card: entry points, as those of the CPU.
#pragma once

#include "../biased_attention.h"
#include "execution.h"

namespace effattn::cuda {

void biased_attention(const BiasedAttention& problem, const Execution& execution);
void biased_attention_backward(const BiasedAttention& problem, const Execution& execution);

}  // namespace effattn::cuda
