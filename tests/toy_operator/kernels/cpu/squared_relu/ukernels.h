// The micro-kernels of the square of a ReLU.
#pragma once

#include "../core/arena.h"
#include "../core/isa.h"
#include "plan.h"

namespace effattn::cpu {

// On kSquaredReluChannels channels of all images, or on those that are left, from channel `first` on.
struct SquaredReluUkernels {
  void (*forward)(const SquaredReluParams&, int64_t first, Arena);
  void (*backward)(const SquaredReluParams&, int64_t first, Arena);
};

EFFATTN_DISPATCH_TABLE(SquaredReluUkernels, squared_relu_ukernels)

}  // namespace effattn::cpu
