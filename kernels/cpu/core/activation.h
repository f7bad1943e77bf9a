// What a convolution may end with.
#pragma once

#include <cstdint>

namespace effattn::cpu {

enum class Activation : int64_t { kNone, kRelu, kGelu, kRelu6, kHardswish, kSilu, kGeluTanh, kSigmoid };

}  // namespace effattn::cpu
