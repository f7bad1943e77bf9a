// The micro-kernels of softmax attention, for tens to hundreds of tokens.
//
// Float only, rows of channels. A block of queries has all its logits in cache at once.
#pragma once

#include "../../params/softmax_heads.h"
#include "../core/arena.h"
#include "../core/isa.h"
#include "../core/rows.h"

namespace effattn::cpu {

// Of all heads: a row a token, padded to whole vectors; the padding is written and never has a part in a
// result.
template <class Float>
struct HeadRows {
  Float* data;
  int64_t head_stride, stride;

  EFFATTN_INLINE Rows<Float> of(int64_t head) const { return {data + head * head_stride, stride}; }
  EFFATTN_INLINE operator HeadRows<const Float>() const
    requires(!std::is_const_v<Float>)
  {
    return {data, head_stride, stride};
  }
};

// Where gradients go. Those of q, k and v are written, the others added to.
struct SoftmaxGradients {
  HeadRows<float> q, k, v;
  float* bias;
  TalkingHeads<float> mix;
};

struct SoftmaxUkernels {
  int64_t (*scratch_floats)(const SoftmaxHeads&);
  int64_t (*scratch_floats_backward)(const SoftmaxHeads&);
  void (*forward)(const SoftmaxHeads&, const HeadRows<const float>& q, const HeadRows<const float>& k,
                  const HeadRows<const float>& v, const HeadRows<float>& out, Arena);
  void (*backward)(const SoftmaxHeads&, const HeadRows<const float>& q, const HeadRows<const float>& k,
                   const HeadRows<const float>& v, const HeadRows<const float>& grad_out,
                   const SoftmaxGradients& gradients, Arena);
};

EFFATTN_DISPATCH_TABLE(SoftmaxUkernels, softmax_ukernels)

}  // namespace effattn::cpu
