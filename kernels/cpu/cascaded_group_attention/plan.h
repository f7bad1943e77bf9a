// Cascaded group attention on the CPU. A window stays in one thread's cache from its input to its output.
#pragma once

#include "../../params/cascaded_group_attention.h"
#include "../core/parallel.h"
#include "../channels_last/projection.h"
#include "../softmax_attention/ukernels.h"

namespace effattn::cpu {

// `projection`: what follows in the networks, relu and a 1x1 convolution; or null, and out has the channels
// of x.
void cascaded_group_attention(const CascadeParams& problem, const ProjectionWeights* projection,
                              const Parallel& parallel);
inline void cascaded_group_attention(const CascadeParams& problem, const Parallel& parallel) {
  cascaded_group_attention(problem, nullptr, parallel);
}
void cascaded_group_attention_backward(const CascadeParams& problem, const Parallel& parallel);

}  // namespace effattn::cpu
