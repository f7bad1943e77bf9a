// Biased attention with its projections, for inference: from an image to an image.
//
//   [q | k | v] = 1x1(x)    out = softmax(softmax_scale q k^T + bias) v
//
// then, of EfficientFormerV2, a depthwise convolution of v is added to out, which is upsampled bilinearly and
// goes through an activation; then a 1x1 convolution. A depthwise convolution with a stride of two may halve
// the image before all this; or that of the queries alone, and the convolution of v then has such a stride
// too.
#pragma once

#include "../channels_last/projection.h"
#include "../core/isa.h"
#include "../core/parallel.h"
#include "../softmax_attention/ukernels.h"

namespace effattn::cpu {

struct ImageSize {
  int64_t height, width;
  int64_t tokens() const { return height * width; }
  bool operator==(const ImageSize& other) const { return height == other.height && width == other.width; }
};

// A depthwise convolution: taps (blocks, kernel * kernel, kPackedOutputs), a bias (blocks * kPackedOutputs).
struct Depthwise {
  int64_t kernel;  // odd; 0: there is none
  const float *taps, *bias;

  const float* taps_of(int64_t channel) const { return taps + channel * kernel * kernel; }
};

struct ProjectedAttentionParams {
  DType dtype;
  int64_t batch, channels;
  // Of x; of the keys and of the queries, as large as x or half, rounded up; of out, as the queries' or
  // larger.
  ImageSize x_size, size, query_size, out_size;
  SoftmaxHeads heads;  // all
  // Outputs of q for all heads (unless `q` has them), then of k, each head's a whole number of vectors; from
  // the next whole block on those of v, in the same way.
  ProjectionWeights qkv;
  const ProjectionWeights* q;  // of the halved image, all else being x's; or null
  Depthwise halving, local;    // of x, and of v
  Activation activation;
  ProjectionWeights proj;  // of the heads' outputs, each a whole number of vectors
  Image x, out;

  bool is_halved() const { return halving.kernel != 0 && q == nullptr; }

  int64_t key_stride() const { return round_up(heads.head_dim, kWholeVectors); }
  int64_t value_stride() const { return round_up(heads.value_dim, kWholeVectors); }
  int64_t keys() const { return heads.heads * key_stride(); }
  int64_t values() const { return heads.heads * value_stride(); }
  int64_t first_key() const { return q == nullptr ? keys() : 0; }
  int64_t first_value() const { return round_up(first_key() + keys(), kPackedOutputs); }
};

EFFATTN_EXPORT void projected_attention(const ProjectedAttentionParams& params, const Parallel& parallel);

}  // namespace effattn::cpu
