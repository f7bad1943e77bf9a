// Cascaded group attention for CPU tensors: allocation, launch, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cascade_problem.h"

namespace effattn {
namespace {

using namespace cascade;

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
