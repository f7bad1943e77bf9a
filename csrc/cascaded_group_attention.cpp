// Cascaded group attention as a torch operator: allocation, launch, registration.
#include <tuple>

#include "cascade_problem.h"

namespace effattn {
namespace {

using namespace cascade;

Tensor forward(const Tensor& x, Tensors qkv, MaybeTensors qkv_biases, Tensors dw, MaybeTensors dw_biases,
               const Tensor& bias, double scale, int64_t window_height, int64_t window_width) {
  const Problem problem =
      problem_of("cascaded_group_attention", x, {qkv, given(qkv_biases), dw, given(dw_biases)}, bias, scale,
                 window_height, window_width);
  CascadeParams p = problem.p;
  Tensor out = new_image(x, shape_of(x, x.size(1)), p.out);
  kernels::cascaded_group_attention(p, execution(x, problem.alive));
  return out;
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensor> backward(
    const Tensor& grad_out, const Tensor& x, Tensors qkv, MaybeTensors qkv_biases, Tensors dw,
    MaybeTensors dw_biases, const Tensor& bias, double scale, int64_t window_height, int64_t window_width) {
  const char* const op = "cascaded_group_attention_backward";
  Problem problem = problem_of(op, x, {qkv, given(qkv_biases), dw, given(dw_biases)}, bias, scale,
                               window_height, window_width);
  CascadeParams& p = problem.p;
  require_like(op, "grad_out", grad_out, x, "x");
  require_shape(op, "grad_out", grad_out, shape_of(x, x.size(1)));
  problem.alive.push_back(with_mergeable_rows(grad_out));
  p.grad_out = image(problem.alive.back());
  std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensor> all;
  std::get<0>(all) = new_image(x, shape_of(x, x.size(1)), p.grad_x);
  std::vector<HeadWeights<float>> gradients(p.heads);
  const auto allocate = [&](const Tensors& like, Tensors& into, float* HeadWeights<float>::* member) {
    for (size_t h = 0; h < like.size(); ++h) into.push_back(new_floats(like[h], gradients[h].*member));
  };
  using W = HeadWeights<float>;
  allocate(qkv, std::get<1>(all), &W::qkv);
  allocate(given(qkv_biases), std::get<2>(all), &W::qkv_bias);
  allocate(dw, std::get<3>(all), &W::depthwise);
  allocate(given(dw_biases), std::get<4>(all), &W::depthwise_bias);
  std::get<5>(all) = new_floats(bias, p.grad_bias);
  p.gradients = gradients.data();
  kernels::cascaded_group_attention_backward(p, execution(x, problem.alive));
  return all;
}

}  // namespace

EFFATTN_OPERATORS(m) {
  m.impl("cascaded_group_attention", TORCH_BOX(&forward));
  m.impl("cascaded_group_attention_forward", TORCH_BOX(&forward));
  m.impl("cascaded_group_attention_backward", TORCH_BOX(&backward));
}

}  // namespace effattn
