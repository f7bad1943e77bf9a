// What the launchers of cascaded group attention share: the params of a call.
#pragma once

#include <vector>

#include "../kernels/params/cascaded_group_attention.h"
#include "images.h"
#include "signature.h"
#include "weights.h"

namespace effattn::cascade {

struct Weights {
  const Tensors &qkv, &qkv_biases, &depthwise, &depthwise_biases;
};

// The params without results, and what they point into; of arguments that are right.
struct Call {
  CascadeParams p{};
  std::vector<int64_t> kernels;
  std::vector<HeadWeights<const float>> weights;
  Tensors alive;

  // Without weights but the bias.
  Call(const Tensor& x, int64_t heads, int64_t key_dim, const Tensor& bias, double scale,
       int64_t window_height, int64_t window_width) {
    p.dtype = kernel_dtype(x);
    p.batch = x.size(0);
    p.heads = heads;
    p.key_dim = key_dim;
    p.value_dim = x.size(1) / heads;
    p.height = x.size(2);
    p.width = x.size(3);
    p.window_height = window_height;
    p.window_width = window_width;
    p.softmax_scale = static_cast<float>(scale);
    p.bias = floats(bias, alive);
    alive.push_back(with_mergeable_rows(x));
    p.x = image(alive.back());
  }

  Call(const Tensor& x, const Weights& from, const Tensor& bias, double scale, int64_t window_height,
       int64_t window_width)
      : Call(x, static_cast<int64_t>(from.qkv.size()), from.depthwise[0].size(0), bias, scale, window_height,
             window_width) {
    for (size_t h = 0; h < from.qkv.size(); ++h) {
      kernels.push_back(from.depthwise[h].size(3));
      weights.push_back({floats(from.qkv[h], alive), floats(from.qkv_biases, h, alive),
                         floats(from.depthwise[h], alive), floats(from.depthwise_biases, h, alive)});
    }
    p.kernels = kernels.data();
    p.weights = weights.data();
  }
};

inline std::vector<int64_t> shape_of(const Tensor& x, int64_t channels) {
  return {x.size(0), channels, x.size(2), x.size(3)};
}

}  // namespace effattn::cascade
