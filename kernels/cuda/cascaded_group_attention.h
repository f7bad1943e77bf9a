// Cascaded group attention on a card: entry points, as those of the CPU.
#pragma once

#include "../cascaded_group_attention.h"
#include "execution.h"

namespace effattn::cuda {

void cascaded_group_attention(const CascadedGroupAttention& problem, const Execution& execution);
void cascaded_group_attention_backward(const CascadedGroupAttention& problem, const Execution& execution);

}  // namespace effattn::cuda
