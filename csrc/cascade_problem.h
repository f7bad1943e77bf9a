// What the launchers of cascaded group attention share: checks, and the problem that kernels see.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/params/cascaded_group_attention.h"
#include "images.h"
#include "weights.h"

namespace effattn::cascade {

constexpr int64_t kMostSide = 1 << 15;  // of a window or a kernel: products of a few are far from overflowing

struct Weights {
  const Tensors &qkv, &qkv_biases, &depthwise, &depthwise_biases;
};

// The problem without its results and weights, and what it points into.
struct Problem {
  CascadeParams p{};
  std::vector<int64_t> kernels;
  std::vector<HeadWeights<const float>> weights;
  Tensors alive;

  Problem(const char* op, const Tensor& x, int64_t heads, int64_t key_dim, const Tensor& bias, double scale,
          int64_t window_height, int64_t window_width) {
    p.dtype = kernel_dtype(op, "x", x);
    EFFATTN_REQUIRE(x.dim() == 4, op, ": x must have 4 dimensions (B, C, H, W), got shape ", shape_text(x));
    EFFATTN_REQUIRE(
        window_height > 0 && window_width > 0 && window_height < kMostSide && window_width < kMostSide, op,
        ": window_size must be positive and below ", kMostSide, ", got ", window_height, " x ", window_width);
    EFFATTN_REQUIRE(std::isfinite(scale), op, ": scale must be finite, got ", scale);
    EFFATTN_REQUIRE(x.size(1) % heads == 0, op, ": x must have a multiple of ", heads,
                    " channels, one group a head, got ", x.size(1));
    p.batch = x.size(0);
    p.heads = heads;
    p.key_dim = key_dim;
    p.value_dim = x.size(1) / heads;
    p.height = x.size(2);
    p.width = x.size(3);
    p.window_height = window_height;
    p.window_width = window_width;
    p.softmax_scale = static_cast<float>(scale);
    const int64_t tokens = p.window_tokens();
    p.bias = floats(op, "attention_bias", bias, {heads, tokens, tokens}, alive);
    alive.push_back(with_mergeable_rows(x));
    p.x = image(alive.back());
  }

  void take(const char* op, const Weights& from) {
    const int64_t outputs = 2 * p.key_dim + p.value_dim;
    for (int64_t h = 0; h < p.heads; ++h) {
      const std::string at = "[" + std::to_string(h) + "]";
      const Tensor& dw = from.depthwise[h];
      EFFATTN_REQUIRE(dw.dim() == 4 && dw.size(2) % 2 == 1, op, ": q_dw_weights", at,
                      " must have shape (key_dim, 1, k, k) with an odd k, got ", shape_text(dw));
      kernels.push_back(dw.size(2));
      weights.push_back({
          floats(op, "qkv_weights" + at, from.qkv[h], {outputs, p.value_dim, 1, 1}, alive),
          from.qkv_biases.empty() ? nullptr
                                  : floats(op, "qkv_biases" + at, from.qkv_biases[h], {outputs}, alive),
          floats(op, "q_dw_weights" + at, dw, {p.key_dim, 1, dw.size(2), dw.size(2)}, alive),
          from.depthwise_biases.empty()
              ? nullptr
              : floats(op, "q_dw_biases" + at, from.depthwise_biases[h], {p.key_dim}, alive),
      });
    }
    p.kernels = kernels.data();
    p.weights = weights.data();
  }
};

inline Problem problem_of(const char* op, const Tensor& x, const Weights& from, const Tensor& bias,
                          double scale, int64_t window_height, int64_t window_width) {
  const int64_t heads = static_cast<int64_t>(from.qkv.size());
  EFFATTN_REQUIRE(heads > 0, op, ": qkv_weights must have a tensor a head, got none");
  for (const auto& [name, list] :
       {std::pair{"qkv_biases", &from.qkv_biases}, std::pair{"q_dw_weights", &from.depthwise},
        std::pair{"q_dw_biases", &from.depthwise_biases}}) {
    const bool may_be_empty = list != &from.depthwise;
    EFFATTN_REQUIRE((may_be_empty && list->empty()) || static_cast<int64_t>(list->size()) == heads, op, ": ",
                    name, " must have ", heads, " tensors, one a head, got ", list->size());
  }
  const Tensor& first = from.depthwise[0];
  EFFATTN_REQUIRE(first.dim() == 4 && first.size(0) > 0, op,
                  ": q_dw_weights[0] must have shape (key_dim, 1, k, k), got ", shape_text(first));
  Problem problem(op, x, heads, first.size(0), bias, scale, window_height, window_width);
  problem.take(op, from);
  return problem;
}

inline std::vector<int64_t> shape_of(const Tensor& x, int64_t channels) {
  return {x.size(0), channels, x.size(2), x.size(3)};
}

}  // namespace effattn::cascade
