// Softmax attention as a module's inference: from an image to an image.
//
//   [q | k | v] = 1x1(x)    out = softmax attention (softmax_attention.h)
//
// then, of EfficientFormerV2, a depthwise convolution of v is added to out; then, of EfficientFormer, a 1x1
// convolution.
#pragma once

#include "parallel.h"
#include "project_tokens.h"
#include "softmax_attention.h"

namespace effattn::cpu {

struct ProjectedAttention {
  DType dtype;
  int64_t batch, height, width;
  SoftmaxHeads heads;  // all; queries and keys are the tokens
  // Outputs of q for all heads, then of k, each head's a whole number of vectors; from the next whole block
  // on those of v, in the same way.
  ProjectionWeights qkv;
  int64_t kernel;                 // of the depthwise convolution, odd; 0: there is none
  const float *taps, *tap_bias;   // (blocks of v, kernel * kernel, kPackedOutputs), (outputs of v)
  const ProjectionWeights* proj;  // of the heads' outputs, each a whole number of vectors; or null
  Image x, out;

  int64_t key_stride() const { return round_up(heads.head_dim, kWholeVectors); }
  int64_t value_stride() const { return round_up(heads.value_dim, kWholeVectors); }
  int64_t first_value() const { return round_up(2 * heads.heads * key_stride(), kPackedOutputs); }
  int64_t values() const { return heads.heads * value_stride(); }
};

void projected_attention(const ProjectedAttention& problem, const Parallel& parallel);

}  // namespace effattn::cpu
