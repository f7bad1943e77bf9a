// The square of a ReLU on the CPU: tiles and entry points.
#pragma once

#include <cstdint>

#include "../../params/squared_relu.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "../core/rows.h"

namespace effattn::cpu {

// A thread takes some channels of all images, so that nobody else adds to the gradients of their weights.
constexpr int64_t kSquaredReluChannels = kWholeVectors;
constexpr int64_t kSquaredReluTokens = 256;  // of a tile: 16 KiB

EFFATTN_EXPORT void squared_relu(const SquaredReluParams& params, const Parallel& parallel);
EFFATTN_EXPORT void squared_relu_backward(const SquaredReluParams& params, const Parallel& parallel);

}  // namespace effattn::cpu
