// Multi-scale aggregation and attention as torch operators: checks, allocation, launch, registration.
#include <tuple>

#include "multi_scale_problem.h"

namespace effattn {
namespace {

using Gradients = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors>;

// Allocates the gradients of the weights and points the problem at them.
Gradients new_gradients(Problem& problem, const Tensor& qkv, const Weights& weights) {
  Gradients all;
  std::get<0>(all) =
      new_image(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3)}, problem.sizes.grad_qkv);
  const auto allocate = [&](const Tensors& like, Tensors& into, float* ScaleWeights<float>::* member) {
    for (size_t s = 0; s < like.size(); ++s) {
      into.push_back(new_floats(like[s], problem.sizes.gradients[s].*member));
    }
  };
  using W = ScaleWeights<float>;
  allocate(weights.depthwise, std::get<1>(all), &W::depthwise);
  allocate(weights.pointwise, std::get<2>(all), &W::pointwise);
  allocate(weights.depthwise_biases, std::get<3>(all), &W::depthwise_bias);
  allocate(weights.pointwise_biases, std::get<4>(all), &W::pointwise_bias);
  return all;
}

void take_grad_out(const char* op, Problem& problem, const Tensor& grad_out, const Tensor& qkv, bool all) {
  require_like(op, "grad_out", grad_out, qkv, "qkv");
  require_shape(op, "grad_out", grad_out, problem.shape(all));
  problem.alive.push_back(with_mergeable_rows(grad_out));
  problem.sizes.grad_out = image(problem.alive.back());
}

Tensor aggregation(const Tensor& qkv, MaybeTensors dw, MaybeTensors pw, MaybeTensors dw_biases,
                   MaybeTensors pw_biases, int64_t head_dim) {
  Problem problem("multi_scale_aggregation", qkv, {given(dw), given(pw), given(dw_biases), given(pw_biases)},
                  head_dim);
  Tensor out = new_image(qkv, problem.shape(true), problem.sizes.out);
  kernels::aggregate(problem.sizes, execution(qkv, problem.alive));
  return out;
}

Gradients aggregation_backward(const Tensor& grad_out, const Tensor& qkv, MaybeTensors dw, MaybeTensors pw,
                               MaybeTensors dw_biases, MaybeTensors pw_biases, int64_t head_dim) {
  const char* const op = "multi_scale_aggregation_backward";
  const Weights weights{given(dw), given(pw), given(dw_biases), given(pw_biases)};
  Problem problem(op, qkv, weights, head_dim);
  take_grad_out(op, problem, grad_out, qkv, true);
  Gradients gradients = new_gradients(problem, qkv, weights);
  kernels::aggregate_backward(problem.sizes, execution(qkv, problem.alive));
  return gradients;
}

Tensor attention(const Tensor& qkv, MaybeTensors dw, MaybeTensors pw, MaybeTensors dw_biases,
                 MaybeTensors pw_biases, int64_t head_dim, double eps) {
  const char* const op = "multi_scale_linear_attention";
  Problem problem(op, qkv, {given(dw), given(pw), given(dw_biases), given(pw_biases)}, head_dim);
  problem.attend_with(op, eps);
  Tensor out = new_image(qkv, problem.shape(false), problem.sizes.out);
  kernels::attend(problem.sizes, nullptr, execution(qkv, problem.alive));
  return out;
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& qkv, MaybeTensors dw, MaybeTensors pw,
                                             MaybeTensors dw_biases, MaybeTensors pw_biases, int64_t head_dim,
                                             double eps) {
  const char* const op = "multi_scale_linear_attention_forward";
  Problem problem(op, qkv, {given(dw), given(pw), given(dw_biases), given(pw_biases)}, head_dim);
  problem.attend_with(op, eps);
  Tensor out = new_image(qkv, problem.shape(false), problem.sizes.out);
  const std::vector<int64_t> shape = problem.sums_shape();
  Tensor sums = empty_floats(qkv, shape);
  kernels::attend(problem.sizes, static_cast<float*>(sums.mutable_data_ptr()), execution(qkv, problem.alive));
  return {out, sums};
}

Gradients attention_backward(const Tensor& grad_out, const Tensor& qkv, MaybeTensors dw, MaybeTensors pw,
                             MaybeTensors dw_biases, MaybeTensors pw_biases, const Tensor& sums,
                             int64_t head_dim, double eps) {
  const char* const op = "multi_scale_linear_attention_backward";
  const Weights weights{given(dw), given(pw), given(dw_biases), given(pw_biases)};
  Problem problem(op, qkv, weights, head_dim);
  problem.attend_with(op, eps);
  take_grad_out(op, problem, grad_out, qkv, false);
  const float* const kept = kept_floats(op, "sums", sums, problem.sums_shape());
  Gradients gradients = new_gradients(problem, qkv, weights);
  kernels::attend_backward(problem.sizes, kept, execution(qkv, problem.alive, sums));
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
