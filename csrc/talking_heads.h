// The two 1x1 convolutions over the heads, as a list of four tensors or of none.
#pragma once

#include "../kernels/params/softmax_heads.h"
#include "weights.h"

namespace effattn {

inline TalkingHeads<const float> talking_heads_of(const Tensors& given, Tensors& alive) {
  if (given.empty()) return {};
  return {floats(given[0], alive), floats(given[1], alive), floats(given[2], alive), floats(given[3], alive)};
}

}  // namespace effattn
