// Cascaded group attention in training for CPU tensors: allocation, launch, registration.
#include "../../kernels/cpu/cascaded_group_attention/plan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cascade_params.h"
#include "../names.h"

namespace effattn {
namespace {

using namespace cascade;

const Signature kSignature("cascaded_group_attention_batch_norm");

// Of the norms behind the projections, and behind the convolutions of q.
struct Norms {
  const Tensors &qkv_weights, &qkv_biases, &q_weights, &q_biases;
};

// The params without results, and what they point into; of arguments that are right but for the dtype.
struct TrainingCall {
  Call of;
  cpu::CascadeTrainingParams p{};
  std::vector<cpu::HeadNorms<const float>> norms;
  std::vector<float> qkv_eps, q_eps;

  TrainingCall(const Tensor& x, const Tensors& qkv, const Tensors& dw, const Norms& of_norms,
               const Tensor& bias, const std::vector<double>& eps, double scale, int64_t window_height,
               int64_t window_width)
      : of(x, {qkv, none_, dw, none_}, bias, scale, window_height, window_width) {
    EFFATTN_REQUIRE(x.scalar_type() == ScalarType::Float, kSignature.name(), ": x: expected float32, got ",
                    dtype_name(x.scalar_type()));
    const int64_t heads = of.p.heads;
    const auto norm = [&](const Tensor& weight, const Tensor& bias) {
      return cpu::Norm<const float>{floats(weight, of.alive), floats(bias, of.alive)};
    };
    for (int64_t h = 0; h < heads; ++h) {
      norms.push_back({norm(of_norms.qkv_weights[h], of_norms.qkv_biases[h]),
                       norm(of_norms.q_weights[h], of_norms.q_biases[h])});
      qkv_eps.push_back(static_cast<float>(eps[h]));
      q_eps.push_back(static_cast<float>(eps[heads + h]));
    }
    p.norms = norms.data();
    p.qkv_eps = qkv_eps.data();
    p.q_eps = q_eps.data();
  }

  std::vector<int64_t> statistics_shape() const { return {of.p.heads, 2, 3 * of.p.key_dim + of.p.value_dim}; }

 private:
  static inline const Tensors none_;
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, Tensors qkv, Tensors dw, Tensors qkv_norm_weights,
                                   Tensors qkv_norm_biases, Tensors q_norm_weights, Tensors q_norm_biases,
                                   const Tensor& bias, std::vector<double> eps, double scale,
                                   int64_t window_height, int64_t window_width) {
  kSignature.check({&x, &qkv, &dw, &qkv_norm_weights, &qkv_norm_biases, &q_norm_weights, &q_norm_biases,
                    &bias, &eps, scale, window_height, window_width});
  TrainingCall call(x, qkv, dw, {qkv_norm_weights, qkv_norm_biases, q_norm_weights, q_norm_biases}, bias, eps,
                    scale, window_height, window_width);
  const std::vector<int64_t> shape = call.statistics_shape();
  Tensor statistics = empty_floats(x, shape);
  call.p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  Tensor out = new_image(x, shape_of(x, x.size(1)), call.of.p.out);
  call.p.cascade = call.of.p;
  cpu::cascade_training(call.p, torch_threads());
  return {out, statistics};
}

using Gradients = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensor>;

Gradients backward(const Tensor& grad_out, const Tensor& x, Tensors qkv, Tensors dw, Tensors qkv_norm_weights,
                   Tensors qkv_norm_biases, Tensors q_norm_weights, Tensors q_norm_biases, const Tensor& bias,
                   const Tensor& out, const Tensor& statistics, std::vector<double> eps, double scale,
                   int64_t window_height, int64_t window_width) {
  kSignature.check_backward(grad_out,
                            {&x, &qkv, &dw, &qkv_norm_weights, &qkv_norm_biases, &q_norm_weights,
                             &q_norm_biases, &bias, &eps, scale, window_height, window_width},
                            {&out, &statistics});
  TrainingCall call(x, qkv, dw, {qkv_norm_weights, qkv_norm_biases, q_norm_weights, q_norm_biases}, bias, eps,
                    scale, window_height, window_width);
  CascadeParams& p = call.of.p;
  Tensors& alive = call.of.alive;
  for (const auto& [t, into] : {std::pair{&grad_out, &p.grad_out}, std::pair{&out, &p.out}}) {
    alive.push_back(with_mergeable_rows(*t));
    *into = image(alive.back());
  }
  call.p.statistics = const_cast<float*>(floats(statistics, alive));
  Gradients all;
  std::get<0>(all) = new_image(x, shape_of(x, x.size(1)), p.grad_x);
  std::vector<HeadWeights<float>> gradients(p.heads);
  std::vector<cpu::HeadNorms<float>> norm_gradients(p.heads);
  for (int64_t h = 0; h < p.heads; ++h) {
    std::get<1>(all).push_back(new_floats(qkv[h], gradients[h].qkv));
    std::get<2>(all).push_back(new_floats(dw[h], gradients[h].depthwise));
  }
  for (int64_t h = 0; h < p.heads; ++h) {
    std::get<3>(all).push_back(new_floats(qkv_norm_weights[h], norm_gradients[h].qkv.weight));
    std::get<4>(all).push_back(new_floats(qkv_norm_biases[h], norm_gradients[h].qkv.bias));
    std::get<5>(all).push_back(new_floats(q_norm_weights[h], norm_gradients[h].q.weight));
    std::get<6>(all).push_back(new_floats(q_norm_biases[h], norm_gradients[h].q.bias));
  }
  std::get<7>(all) = new_floats(bias, p.grad_bias);
  p.gradients = gradients.data();
  call.p.norm_gradients = norm_gradients.data();
  call.p.cascade = p;
  cpu::cascade_training_backward(call.p, torch_threads());
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("cascaded_group_attention_batch_norm_forward", TORCH_BOX(&forward));
  m.impl("cascaded_group_attention_batch_norm_backward", TORCH_BOX(&backward));
}

}  // namespace effattn
