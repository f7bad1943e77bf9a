// Cascaded group attention for CPU tensors: checks, allocation, launch, registration.
#include "../../kernels/cpu/cascaded_group_attention.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "images.h"
#include "weights.h"

namespace effattn {
namespace {

constexpr int64_t kMostSide = 1 << 15;  // of a window or a kernel: products of a few are far from overflowing

struct Weights {
  const Tensors &qkv, &qkv_biases, &depthwise, &depthwise_biases;
};

// The problem without its results and weights, and what it points into.
struct Problem {
  cpu::CascadedGroupAttention p{};
  std::vector<int64_t> kernels;
  std::vector<cpu::HeadWeights<const float>> weights;
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
    p.scale = static_cast<float>(scale);
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

Problem problem_of(const char* op, const Tensor& x, const Weights& from, const Tensor& bias, double scale,
                   int64_t window_height, int64_t window_width) {
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

std::vector<int64_t> shape_of(const Tensor& x, int64_t channels) {
  return {x.size(0), channels, x.size(2), x.size(3)};
}

Tensor forward(const Tensor& x, Tensors qkv, Tensors qkv_biases, Tensors dw, Tensors dw_biases,
               const Tensor& bias, double scale, int64_t window_height, int64_t window_width) {
  const Problem problem = problem_of("cascaded_group_attention", x, {qkv, qkv_biases, dw, dw_biases}, bias,
                                     scale, window_height, window_width);
  cpu::CascadedGroupAttention p = problem.p;
  Tensor out = new_image(x, shape_of(x, x.size(1)), p.out);
  cpu::cascaded_group_attention(p, nullptr, torch_threads());
  return out;
}

Tensor projected(const Tensor& x, const Tensor& qkv, const Tensor& qkv_bias, const Tensor& taps,
                 const Tensor& tap_bias, const Tensor& bias, const Tensor& proj, const Tensor& proj_bias,
                 std::vector<int64_t> kernels, int64_t key_dim, double scale, int64_t window_height,
                 int64_t window_width) {
  const char* const op = "cascaded_group_attention_projected";
  const int64_t heads = static_cast<int64_t>(kernels.size());
  EFFATTN_REQUIRE(heads > 0 && key_dim > 0 && key_dim < kMostChannels, op,
                  ": kernels must have a size a head and key_dim be positive, at most 65535, got ", heads,
                  " and ", key_dim);
  int64_t all_taps = 0;
  for (const int64_t kernel : kernels) {
    EFFATTN_REQUIRE(kernel > 0 && kernel % 2 == 1 && kernel < kMostSide, op, ": kernels must be odd, got ",
                    kernel);
    all_taps += kernel * kernel;
  }
  Problem problem(op, x, heads, key_dim, bias, scale, window_height, window_width);
  cpu::CascadedGroupAttention& p = problem.p;
  Tensors& alive = problem.alive;
  const int64_t keys = cpu::round_up(key_dim, cpu::kWholeVectors);
  const int64_t stride = 2 * keys + cpu::round_up(p.value_dim, cpu::kWholeVectors);
  p.kernels = kernels.data();
  p.packed = {floats(op, "qkv", qkv, {heads, p.value_dim, stride}, alive),
              floats(op, "qkv_bias", qkv_bias, {heads, stride}, alive),
              floats(op, "taps", taps, {all_taps, keys}, alive),
              floats(op, "tap_bias", tap_bias, {heads, keys}, alive)};
  EFFATTN_REQUIRE(proj_bias.dim() == 1, op, ": proj_bias must have 1 dimension (outputs), got shape ",
                  shape_text(proj_bias));
  const cpu::ProjectionWeights projection =
      packed_projection(op, "proj", proj, &proj_bias, x.size(1), proj_bias.size(0), alive);
  Tensor out = new_image(x, shape_of(x, projection.outputs), p.out);
  cpu::cascaded_group_attention(p, &projection, torch_threads());
  return out;
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensor> backward(
    const Tensor& grad_out, const Tensor& x, Tensors qkv, Tensors qkv_biases, Tensors dw, Tensors dw_biases,
    const Tensor& bias, double scale, int64_t window_height, int64_t window_width) {
  const char* const op = "cascaded_group_attention_backward";
  Problem problem =
      problem_of(op, x, {qkv, qkv_biases, dw, dw_biases}, bias, scale, window_height, window_width);
  cpu::CascadedGroupAttention& p = problem.p;
  require_like(op, "grad_out", grad_out, x, "x");
  require_shape(op, "grad_out", grad_out, shape_of(x, x.size(1)));
  problem.alive.push_back(with_mergeable_rows(grad_out));
  p.grad_out = image(problem.alive.back());
  std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensor> all;
  std::get<0>(all) = new_image(x, shape_of(x, x.size(1)), p.grad_x);
  std::vector<cpu::HeadWeights<float>> gradients(p.heads);
  const auto allocate = [&](const Tensors& like, Tensors& into, float* cpu::HeadWeights<float>::* member) {
    for (size_t h = 0; h < like.size(); ++h) into.push_back(new_floats(like[h], gradients[h].*member));
  };
  using W = cpu::HeadWeights<float>;
  allocate(qkv, std::get<1>(all), &W::qkv);
  allocate(qkv_biases, std::get<2>(all), &W::qkv_bias);
  allocate(dw, std::get<3>(all), &W::depthwise);
  allocate(dw_biases, std::get<4>(all), &W::depthwise_bias);
  std::get<5>(all) = new_floats(bias, p.grad_bias);
  p.gradients = gradients.data();
  cpu::cascaded_group_attention_backward(p, torch_threads());
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("cascaded_group_attention", TORCH_BOX(&forward));
  m.impl("cascaded_group_attention_forward", TORCH_BOX(&forward));
  m.impl("cascaded_group_attention_backward", TORCH_BOX(&backward));
  m.impl("cascaded_group_attention_projected", TORCH_BOX(&projected));
}

}  // namespace effattn
