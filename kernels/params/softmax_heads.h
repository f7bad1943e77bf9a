// Heads of softmax attention with a bias on every pair of tokens.
#pragma once

#include <cstdint>

namespace effattn {

// (heads, heads) and (heads) contiguous floats; all null without talking heads.
template <class Float>
struct TalkingHeads {
  Float *logits, *logits_bias, *weights, *weights_bias;
};

// The heads of one image that are computed together.
struct SoftmaxHeads {
  int64_t heads, queries, keys, head_dim, value_dim;
  float softmax_scale;
  const float* bias;    // (queries, keys) contiguous, for every head
  int64_t bias_stride;  // from head to head: more than queries * keys where these are some of more queries
  TalkingHeads<const float> mix;

  bool talking() const { return mix.logits != nullptr; }
};

}  // namespace effattn
