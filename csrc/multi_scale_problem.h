// What the launchers of the multi-scale operators share: checks of tensors, and the problem that they make.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/params/multi_scale.h"
#include "../kernels/params/relu_linear_attention.h"
#include "images.h"
#include "weights.h"

namespace effattn {

struct Weights {
  const Tensors &depthwise, &pointwise, &depthwise_biases, &pointwise_biases;
};

// The problem without its results, and the tensors that it points into.
struct Problem {
  MultiScaleParams sizes{};
  Tensors alive;

  Problem(const char* op, const Tensor& qkv, const Weights& weights, int64_t head_dim)
      : Problem(op, "qkv", qkv, qkv.dim() == 4 ? qkv.size(1) : 0, weights, head_dim) {
    alive.push_back(with_mergeable_rows(qkv));
    sizes.qkv = image(alive.back());
  }

  // Of `channels` channels that are made of those of `x`, an image of the same size.
  Problem(const char* op, const char* argument, const Tensor& x, int64_t channels, const Weights& weights,
          int64_t head_dim) {
    MultiScaleParams& p = sizes;
    p.dtype = kernel_dtype(op, argument, x);
    EFFATTN_REQUIRE(x.dim() == 4, op, ": ", argument, " must have 4 dimensions (B, C, H, W), got shape ",
                    shape_text(x));
    EFFATTN_REQUIRE(head_dim > 0 && head_dim <= kMaxDim, op, ": head_dim must be in 1 to ", kMaxDim, ", got ",
                    head_dim);
    EFFATTN_REQUIRE(channels % (3 * head_dim) == 0, op,
                    ": qkv must have a multiple of 3 * head_dim = ", 3 * head_dim, " channels, got ",
                    channels);
    p.batch = x.size(0);
    p.heads = channels / (3 * head_dim);
    p.head_dim = head_dim;
    p.height = x.size(2);
    p.width = x.size(3);
    const size_t scales = weights.depthwise.size();
    EFFATTN_REQUIRE(scales <= MultiScaleParams::kMaxScales, op, ": at most ", MultiScaleParams::kMaxScales,
                    " scales are supported, got ", scales);
    EFFATTN_REQUIRE(weights.pointwise.size() == scales, op, ": pw_weights must have ", scales,
                    " tensors, one a scale, got ", weights.pointwise.size());
    for (const auto& [name, biases] : {std::pair{"dw_biases", &weights.depthwise_biases},
                                       std::pair{"pw_biases", &weights.pointwise_biases}}) {
      EFFATTN_REQUIRE(biases->empty() || biases->size() == scales, op, ": ", name, " must be empty or have ",
                      scales, " tensors, one a scale, got ", biases->size());
    }
    p.scales = static_cast<int>(scales);
    for (size_t s = 0; s < scales; ++s) {
      const std::string at = "[" + std::to_string(s) + "]";
      const Tensor& dw = weights.depthwise[s];
      EFFATTN_REQUIRE(dw.dim() == 4 && dw.size(2) % 2 == 1, op, ": dw_weights", at,
                      " must have shape (C, 1, k, k) with an odd k, got ", shape_text(dw));
      const int64_t kernel = p.kernels[s] = dw.size(2);
      ScaleWeights<const float>& w = p.weights[s];
      w.depthwise = floats(op, "dw_weights" + at, dw, {channels, 1, kernel, kernel}, alive);
      w.pointwise = floats(op, "pw_weights" + at, weights.pointwise[s], {channels, head_dim, 1, 1}, alive);
      w.depthwise_bias = w.pointwise_bias = nullptr;
      if (!weights.depthwise_biases.empty()) {
        w.depthwise_bias = floats(op, "dw_biases" + at, weights.depthwise_biases[s], {channels}, alive);
      }
      if (!weights.pointwise_biases.empty()) {
        w.pointwise_bias = floats(op, "pw_biases" + at, weights.pointwise_biases[s], {channels}, alive);
      }
    }
  }

  // Of the output: q, k and v of every scale (the aggregation), or as many channels as q has (the attention).
  std::vector<int64_t> shape(bool all) const {
    const int64_t channels = sizes.all_heads() * sizes.head_dim * (all ? 3 : 1);
    return {sizes.batch, channels, sizes.height, sizes.width};
  }
  std::vector<int64_t> sums_shape() const {
    return {sizes.batch, sizes.all_heads(), sizes.head_dim + 1, sizes.head_dim};
  }
  void attend_with(const char* op, double eps) {
    EFFATTN_REQUIRE(eps >= 0 && std::isfinite(eps), op, ": eps must be a finite number >= 0, got ", eps);
    sizes.eps = static_cast<float>(eps);
  }
};

}  // namespace effattn
