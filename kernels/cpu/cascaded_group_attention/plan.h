// Cascaded group attention on the CPU. A window stays in one thread's cache from its input to its output.
#pragma once

#include "../../params/cascaded_group_attention.h"
#include "../channels_last/projection.h"
#include "../core/isa.h"
#include "../core/parallel.h"

namespace effattn::cpu {

// `projection`: what follows in the networks, relu and a 1x1 convolution; or null, and out has the channels
// of x.
EFFATTN_EXPORT void cascaded_group_attention(const CascadeParams& params, const ProjectionWeights* projection,
                                             const Parallel& parallel);
inline void cascaded_group_attention(const CascadeParams& params, const Parallel& parallel) {
  cascaded_group_attention(params, nullptr, parallel);
}
// Of packed weights and a value_dim of whole vectors; the images of `params` are ignored.
struct CascadeBlocks {
  BlockedImage x, out;
  Activation activation;
};
void cascaded_group_attention(const CascadeParams& params, const CascadeBlocks& blocks,
                              const Parallel& parallel);
// Lays weights out once for many calls: `params.weights`, in as many floats as `packed_floats` says.
int64_t packed_floats(const CascadeParams& params);
PackedHeads pack(const CascadeParams& params, float* memory);

EFFATTN_EXPORT void cascaded_group_attention_backward(const CascadeParams& params, const Parallel& parallel);

// --- in training ------------------------------------------------------------------------------------------

// With a BatchNorm behind each convolution, whose statistics are those of the batch. No head can be
// normalised before all windows have gone through its convolution, so windows go through a head in three
// stages.

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

struct CascadeTrainingParams {
  CascadeParams cascade;  // weights not packed and without biases; float only; out is read by backward
  const HeadNorms<const float>* norms;
  const float *qkv_eps, *q_eps;  // a number a head
  // (heads, 2, outputs + key_dim): means, then variances (over the batch, not corrected), of the projection's
  // outputs and the convolution's. Written forward, read backward.
  float* statistics;
  const HeadNorms<float>* norm_gradients;  // backward
};

EFFATTN_EXPORT void cascade_training(const CascadeTrainingParams& params, const Parallel& parallel);
EFFATTN_EXPORT void cascade_training_backward(const CascadeTrainingParams& params, const Parallel& parallel);

}  // namespace effattn::cpu
