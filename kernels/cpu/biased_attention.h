// EfficientFormer's attention on the CPU: softmax attention with a bias on every pair of tokens, with or
// without talking heads. Tensors of any dtype and any strides; everything is computed in float.
#pragma once

#include "parallel.h"
#include "softmax_attention.h"

namespace effattn::cpu {

// A tensor (batch, heads, tokens, channels); strides count elements.
struct HeadsOperand {
  void* data;
  int64_t batch_stride, head_stride, token_stride, channel_stride;
};

struct BiasedAttention {
  DType dtype;
  int64_t batch;
  SoftmaxHeads heads;  // all of them
  HeadsOperand q, k, v;
  HeadsOperand out;                               // forward
  HeadsOperand grad_out, grad_q, grad_k, grad_v;  // backward; grad_out is read only
  float* grad_bias;                               // (heads, queries, keys)
  TalkingHeads<float> grad_mix;
};

void biased_attention(const BiasedAttention& problem, const Parallel& parallel);
void biased_attention_backward(const BiasedAttention& problem, const Parallel& parallel);

}  // namespace effattn::cpu
