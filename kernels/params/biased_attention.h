// Biased attention, that of EfficientFormer: softmax attention with a bias on every pair of tokens,
//
//   L = softmax_scale q k^T + bias    P = softmax(L)    out = P v
//
// and with talking heads, which mix the heads' logits and weights:
//
//   L'_g = sum_h mix_logits(g, h) L_h + mix_logits_bias(g)    P = softmax(L')
//   P'_g = sum_h mix_weights(g, h) P_h + mix_weights_bias(g)    out = P' v
#pragma once

#include <cstdint>

#include "dtype.h"
#include "softmax_heads.h"

namespace effattn {

// A tensor (batch, heads, tokens, channels); strides count elements.
struct HeadsOperand {
  void* data;
  int64_t batch_stride, head_stride, token_stride, channel_stride;
};

struct BiasedAttentionParams {
  DType dtype;
  int64_t batch;
  SoftmaxHeads heads;  // all of them
  HeadsOperand q, k, v;
  HeadsOperand out;                               // forward
  HeadsOperand grad_out, grad_q, grad_k, grad_v;  // backward; grad_out is read only
  float* grad_bias;                               // (heads, queries, keys)
  TalkingHeads<float> grad_mix;
};

}  // namespace effattn
