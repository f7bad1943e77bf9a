// What the launchers of the multi-scale operators share: the params of a call.
#pragma once

#include <vector>

#include "../kernels/params/multi_scale.h"
#include "images.h"
#include "signature.h"
#include "weights.h"

namespace effattn {

struct Weights {
  const Tensors &depthwise, &pointwise, &depthwise_biases, &pointwise_biases;
};

// The params without results, and the tensors that they point into; of arguments that are right.
struct MultiScaleCall {
  MultiScaleParams p{};
  Tensors alive;

  MultiScaleCall(const char* op, const Tensor& qkv, const Weights& weights, int64_t head_dim, double eps = 0)
      : MultiScaleCall(op, qkv, qkv.size(1), weights, head_dim, eps) {
    alive.push_back(with_mergeable_rows(qkv));
    p.qkv = image(alive.back());
  }

  // Of `channels` channels that are made of those of `x`, an image of the same size.
  MultiScaleCall(const char* op, const Tensor& x, int64_t channels, const Weights& weights, int64_t head_dim,
                 double eps) {
    const size_t scales = weights.depthwise.size();
    EFFATTN_REQUIRE(head_dim <= kMaxDim, op, ": head_dim: expected at most ", kMaxDim, ", got ", head_dim);
    EFFATTN_REQUIRE(scales <= MultiScaleParams::kMaxScales, op, ": dw_weights: expected at most ",
                    MultiScaleParams::kMaxScales, " scales, got ", scales);
    p.dtype = kernel_dtype(x);
    p.batch = x.size(0);
    p.heads = channels / (3 * head_dim);
    p.head_dim = head_dim;
    p.height = x.size(2);
    p.width = x.size(3);
    p.scales = static_cast<int>(scales);
    p.eps = static_cast<float>(eps);
    for (size_t s = 0; s < scales; ++s) {
      p.kernels[s] = weights.depthwise[s].size(3);
      p.weights[s] = {floats(weights.depthwise[s], alive), floats(weights.pointwise[s], alive),
                      floats(weights.depthwise_biases, s, alive), floats(weights.pointwise_biases, s, alive)};
    }
  }

  // Of the output: q, k and v of every scale (the aggregation), or as many channels as q has (the attention).
  std::vector<int64_t> shape(bool all) const {
    const int64_t channels = p.all_heads() * p.head_dim * (all ? 3 : 1);
    return {p.batch, channels, p.height, p.width};
  }
  std::vector<int64_t> kv_state_shape() const { return {p.batch, p.all_heads(), p.head_dim + 1, p.head_dim}; }
};

}  // namespace effattn
