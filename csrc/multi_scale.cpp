// Multi-scale aggregation and attention as torch operators: allocation, launch, registration.
#include <tuple>

#include "multi_scale_params.h"
#include EFFATTN_KERNELS(multi_scale)

namespace effattn {
namespace {

const Signature kAggregation("multi_scale_aggregation"), kAttention("multi_scale_linear_attention");

using Gradients = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors>;

// Allocates the gradients and points the params at them.
Gradients new_gradients(MultiScaleCall& call, const Tensor& qkv, const Weights& weights) {
  Gradients all;
  std::get<0>(all) = new_image(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3)}, call.p.grad_qkv);
  const auto allocate = [&](const Tensors& like, Tensors& into, float* ScaleWeights<float>::* member) {
    for (size_t s = 0; s < like.size(); ++s) {
      into.push_back(new_floats(like[s], call.p.gradients[s].*member));
    }
  };
  using W = ScaleWeights<float>;
  allocate(weights.depthwise, std::get<1>(all), &W::depthwise);
  allocate(weights.pointwise, std::get<2>(all), &W::pointwise);
  allocate(weights.depthwise_biases, std::get<3>(all), &W::depthwise_bias);
  allocate(weights.pointwise_biases, std::get<4>(all), &W::pointwise_bias);
  return all;
}

void take_grad_out(MultiScaleCall& call, const Tensor& grad_out) {
  call.alive.push_back(with_mergeable_rows(grad_out));
  call.p.grad_out = image(call.alive.back());
}

Tensor aggregation(const Tensor& qkv, MaybeTensors dw, MaybeTensors pw, MaybeTensors dw_biases,
                   MaybeTensors pw_biases, int64_t head_dim) {
  const Weights weights{given(dw), given(pw), given(dw_biases), given(pw_biases)};
  kAggregation.check({&qkv, &weights.depthwise, &weights.pointwise, &weights.depthwise_biases,
                      &weights.pointwise_biases, head_dim});
  MultiScaleCall call(kAggregation.name(), qkv, weights, head_dim);
  Tensor out = new_image(qkv, call.shape(true), call.p.out);
  kernels::aggregate(call.p, execution(qkv));
  return out;
}

Gradients aggregation_backward(const Tensor& grad_out, const Tensor& qkv, MaybeTensors dw, MaybeTensors pw,
                               MaybeTensors dw_biases, MaybeTensors pw_biases, int64_t head_dim) {
  const Weights weights{given(dw), given(pw), given(dw_biases), given(pw_biases)};
  kAggregation.check_backward(grad_out,
                              {&qkv, &weights.depthwise, &weights.pointwise, &weights.depthwise_biases,
                               &weights.pointwise_biases, head_dim},
                              {});
  MultiScaleCall call(kAggregation.name(), qkv, weights, head_dim);
  take_grad_out(call, grad_out);
  Gradients gradients = new_gradients(call, qkv, weights);
  kernels::aggregate_backward(call.p, execution(qkv));
  return gradients;
}

Tensor attention(const Tensor& qkv, MaybeTensors dw, MaybeTensors pw, MaybeTensors dw_biases,
                 MaybeTensors pw_biases, int64_t head_dim, double eps) {
  const Weights weights{given(dw), given(pw), given(dw_biases), given(pw_biases)};
  kAttention.check({&qkv, &weights.depthwise, &weights.pointwise, &weights.depthwise_biases,
                    &weights.pointwise_biases, head_dim, eps});
  MultiScaleCall call(kAttention.name(), qkv, weights, head_dim, eps);
  Tensor out = new_image(qkv, call.shape(false), call.p.out);
  kernels::attend(call.p, nullptr, execution(qkv));
  return out;
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& qkv, MaybeTensors dw, MaybeTensors pw,
                                             MaybeTensors dw_biases, MaybeTensors pw_biases, int64_t head_dim,
                                             double eps) {
  const Weights weights{given(dw), given(pw), given(dw_biases), given(pw_biases)};
  kAttention.check({&qkv, &weights.depthwise, &weights.pointwise, &weights.depthwise_biases,
                    &weights.pointwise_biases, head_dim, eps});
  MultiScaleCall call(kAttention.name(), qkv, weights, head_dim, eps);
  Tensor out = new_image(qkv, call.shape(false), call.p.out);
  const std::vector<int64_t> shape = call.kv_state_shape();
  Tensor kv_state = empty_floats(qkv, shape);
  kernels::attend(call.p, static_cast<float*>(kv_state.mutable_data_ptr()), execution(qkv));
  return {out, kv_state};
}

Gradients attention_backward(const Tensor& grad_out, const Tensor& qkv, MaybeTensors dw, MaybeTensors pw,
                             MaybeTensors dw_biases, MaybeTensors pw_biases, const Tensor& kv_state,
                             int64_t head_dim, double eps) {
  const Weights weights{given(dw), given(pw), given(dw_biases), given(pw_biases)};
  kAttention.check_backward(grad_out,
                            {&qkv, &weights.depthwise, &weights.pointwise, &weights.depthwise_biases,
                             &weights.pointwise_biases, head_dim, eps},
                            {&kv_state});
  MultiScaleCall call(kAttention.name(), qkv, weights, head_dim, eps);
  take_grad_out(call, grad_out);
  Gradients gradients = new_gradients(call, qkv, weights);
  kernels::attend_backward(call.p, static_cast<const float*>(kv_state.const_data_ptr()), execution(qkv));
  return gradients;
}

}  // namespace

EFFATTN_OPERATORS(m) {
  m.impl("multi_scale_aggregation", TORCH_BOX(&aggregation));
  m.impl("multi_scale_aggregation_forward", TORCH_BOX(&aggregation));
  m.impl("multi_scale_aggregation_backward", TORCH_BOX(&aggregation_backward));
  m.impl("multi_scale_linear_attention", TORCH_BOX(&attention));
  m.impl("multi_scale_linear_attention_forward", TORCH_BOX(&attention_forward));
  m.impl("multi_scale_linear_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace effattn
