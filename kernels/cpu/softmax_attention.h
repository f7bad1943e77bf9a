// Softmax attention with a bias on every pair of tokens, for the few tokens that the efficient networks have
// where they use it:
//
//   L = scale q k^T + bias    P = softmax(L)    out = P v
//
// and with talking heads, which mix the heads' logits and weights:
//
//   L'_g = sum_h mix_logits(g, h) L_h + mix_logits_bias(g)    P = softmax(L')
//   P'_g = sum_h mix_weights(g, h) P_h + mix_weights_bias(g)    out = P' v
//
// Float only, rows of channels. A block of queries has all its logits in cache at once.
#pragma once

#include "channels_last.h"

namespace effattn::cpu {

// Of all heads: a row a token, a whole number of vectors long; what lies behind the last channel is written
// and never has a part in a result.
template <class Float>
struct HeadRows {
  Float* data;
  int64_t head_stride, stride;

  Rows<Float> of(int64_t head) const { return {data + head * head_stride, stride}; }
};

// The mixing of heads: (heads, heads) and (heads) contiguous floats; all null where heads do not talk.
template <class Float>
struct TalkingHeads {
  Float *logits, *logits_bias, *weights, *weights_bias;
};

// The heads of one image that are computed together.
struct SoftmaxHeads {
  int64_t heads, queries, keys, head_dim, value_dim;
  float scale;
  const float* bias;    // (queries, keys) contiguous, for every head
  int64_t bias_stride;  // from head to head: more than queries * keys where these are some of more queries
  TalkingHeads<const float> mix;

  bool talk() const { return mix.logits != nullptr; }
};

// Where gradients go. Those of q, k and v are written, the others added to.
struct SoftmaxGradients {
  HeadRows<float> q, k, v;
  float* bias;
  TalkingHeads<float> mix;
};

struct SoftmaxPasses {
  int64_t (*scratch_floats)(const SoftmaxHeads&);
  int64_t (*scratch_floats_backward)(const SoftmaxHeads&);
  void (*forward)(const SoftmaxHeads&, const HeadRows<const float>& q, const HeadRows<const float>& k,
                  const HeadRows<const float>& v, const HeadRows<float>& out, float* scratch);
  void (*backward)(const SoftmaxHeads&, const HeadRows<const float>& q, const HeadRows<const float>& k,
                   const HeadRows<const float>& v, const HeadRows<const float>& grad_out,
                   const SoftmaxGradients& gradients, float* scratch);
};

const SoftmaxPasses& softmax_passes(Isa isa);

#define EFFATTN_ROW(name, lanes)         \
  namespace name {                       \
  const SoftmaxPasses& softmax_passes(); \
  }
EFFATTN_ISA_LIST(EFFATTN_ROW)
#undef EFFATTN_ROW

}  // namespace effattn::cpu
