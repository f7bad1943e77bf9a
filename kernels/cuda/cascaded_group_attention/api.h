// Cascaded group attention on a GPU: entry points, as those of the CPU.
#pragma once

#include "../../params/cascaded_group_attention.h"
#include "../core/execution.h"

namespace effattn::cuda {

void cascaded_group_attention(const CascadeParams& params, const Execution& execution);
void cascaded_group_attention_backward(const CascadeParams& params, const Execution& execution);

}  // namespace effattn::cuda
