// Softmax attention (../biased_attention.h) for the few tokens that the efficient networks have where they
// use it.
//
// Float only, rows of channels. A block of queries has all its logits in cache at once.
#pragma once

#include "../../params/biased_attention.h"
#include "../channels_last/ukernels.h"

namespace effattn::cpu {

// Of all heads: a row a token, a whole number of vectors long; what lies behind the last channel is written
// and never has a part in a result.
template <class Float>
struct HeadRows {
  Float* data;
  int64_t head_stride, stride;

  Rows<Float> of(int64_t head) const { return {data + head * head_stride, stride}; }
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
