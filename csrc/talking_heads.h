// The two 1x1 convolutions over the heads, as a list of four tensors or of none.
#pragma once

#include "../kernels/params/biased_attention.h"
#include "weights.h"

namespace effattn {

constexpr size_t kTalkingHeads = 4;

inline TalkingHeads<const float> talking_heads_of(const char* op, const Tensors& talking_heads, int64_t heads,
                                                  Tensors& alive) {
  EFFATTN_REQUIRE(talking_heads.empty() || talking_heads.size() == kTalkingHeads, op,
                  ": talking_heads must have no tensors or ", kTalkingHeads, ", got ", talking_heads.size());
  if (talking_heads.empty()) return {};
  return {floats(op, "talking_heads[0]", talking_heads[0], {heads, heads}, alive),
          floats(op, "talking_heads[1]", talking_heads[1], {heads}, alive),
          floats(op, "talking_heads[2]", talking_heads[2], {heads, heads}, alive),
          floats(op, "talking_heads[3]", talking_heads[3], {heads}, alive)};
}

}  // namespace effattn
