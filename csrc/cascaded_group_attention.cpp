// Cascaded group attention as a torch operator: allocation, launch, registration.
#include <tuple>

#include "cascade_params.h"
#include EFFATTN_KERNELS(cascaded_group_attention)

namespace effattn {
namespace {

using namespace cascade;

const Signature kSignature("cascaded_group_attention");

Tensor forward(const Tensor& x, Tensors qkv, MaybeTensors qkv_biases, Tensors dw, MaybeTensors dw_biases,
               const Tensor& bias, double scale, int64_t window_height, int64_t window_width) {
  kSignature.check(
      {&x, &qkv, &given(qkv_biases), &dw, &given(dw_biases), &bias, scale, window_height, window_width});
  const Call call(x, {qkv, given(qkv_biases), dw, given(dw_biases)}, bias, scale, window_height,
                  window_width);
  CascadeParams p = call.p;
  Tensor out = new_image(x, shape_of(x, x.size(1)), p.out);
  kernels::cascaded_group_attention(p, execution(x));
  return out;
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensor> backward(
    const Tensor& grad_out, const Tensor& x, Tensors qkv, MaybeTensors qkv_biases, Tensors dw,
    MaybeTensors dw_biases, const Tensor& bias, double scale, int64_t window_height, int64_t window_width) {
  kSignature.check_backward(
      grad_out,
      {&x, &qkv, &given(qkv_biases), &dw, &given(dw_biases), &bias, scale, window_height, window_width}, {});
  Call call(x, {qkv, given(qkv_biases), dw, given(dw_biases)}, bias, scale, window_height, window_width);
  CascadeParams& p = call.p;
  call.alive.push_back(with_mergeable_rows(grad_out));
  p.grad_out = image(call.alive.back());
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
  kernels::cascaded_group_attention_backward(p, execution(x));
  return all;
}

}  // namespace

EFFATTN_OPERATORS(m) {
  m.impl("cascaded_group_attention", TORCH_BOX(&forward));
  m.impl("cascaded_group_attention_forward", TORCH_BOX(&forward));
  m.impl("cascaded_group_attention_backward", TORCH_BOX(&backward));
}

}  // namespace effattn
