// Cascaded group attention in training: with a BatchNorm behind each of its convolutions, whose statistics
// are those of the batch. No head can be normalised before all windows have gone through its convolution, so
// windows go through a head in three passes.
#pragma once

#include "plan.h"

namespace effattn::cpu {

// Of one BatchNorm; contiguous floats.
template <class Float>
struct Norm {
  Float *weight, *bias;
};

// Of one head: behind the projection to q, k and v, and behind the depthwise convolution.
template <class Float>
struct HeadNorms {
  Norm<Float> qkv, q;
};

struct CascadeTraining {
  CascadeParams cascade;  // weights not packed and without biases; float only; out is read by backward
  const HeadNorms<const float>* norms;
  const float *qkv_eps, *q_eps;  // a number a head
  // (heads, 2, outputs + key_dim): means, then variances (over the batch, not corrected), of the projection's
  // outputs and the convolution's. Written forward, read backward.
  float* statistics;
  const HeadNorms<float>* norm_gradients;  // backward
};

void cascade_training(const CascadeTraining& problem, const Parallel& parallel);
void cascade_training_backward(const CascadeTraining& problem, const Parallel& parallel);

}  // namespace effattn::cpu
