// Cascaded group attention in training for CPU tensors: checks, allocation, launch, registration.
#include "../../kernels/cpu/cascaded_group_attention/plan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cascade_problem.h"

namespace effattn {
namespace {

using namespace cascade;

// The problem without its results, and what it points into.
struct TrainingProblem {
  Problem of;
  cpu::CascadeTrainingParams p{};
  std::vector<cpu::HeadNorms<const float>> norms;
  std::vector<float> qkv_eps, q_eps;

  TrainingProblem(const char* op, const Tensor& x, const Tensors& qkv, const Tensors& dw,
                  const Tensors& norm_weights, const Tensors& norm_biases, const Tensor& bias,
                  const std::vector<double>& eps, double scale, int64_t window_height, int64_t window_width)
      : of(problem_of(op, x, {qkv, none_, dw, none_}, bias, scale, window_height, window_width)) {
    EFFATTN_REQUIRE(x.scalar_type() == ScalarType::Float, op, ": x must be float32");
    const int64_t heads = of.p.heads, outputs = 2 * of.p.key_dim + of.p.value_dim;
    EFFATTN_REQUIRE(x.numel() > 0, op, ": x must not be empty: it has no statistics");
    // What a head makes of the zeros behind an image is not stored with the output, but the next one reads
    // it.
    EFFATTN_REQUIRE(x.size(2) % window_height == 0 && x.size(3) % window_width == 0, op,
                    ": x must have whole windows of ", window_height, " x ", window_width, ", got shape ",
                    shape_text(x));
    for (const auto& [name, size] :
         {std::pair{"norm_weights", norm_weights.size()}, std::pair{"norm_biases", norm_biases.size()},
          std::pair{"eps", eps.size()}}) {
      EFFATTN_REQUIRE(static_cast<int64_t>(size) == 2 * heads, op, ": ", name, " must have ", 2 * heads,
                      " items, those behind the projections, then those behind the convolutions, got ", size);
    }
    for (int64_t h = 0; h < heads; ++h) {
      const auto norm = [&](int64_t i, int64_t channels) {
        const std::string at = "[" + std::to_string(i) + "]";
        return cpu::Norm<const float>{floats(op, "norm_weights" + at, norm_weights[i], {channels}, of.alive),
                                      floats(op, "norm_biases" + at, norm_biases[i], {channels}, of.alive)};
      };
      norms.push_back({norm(h, outputs), norm(heads + h, of.p.key_dim)});
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

std::tuple<Tensor, Tensor> forward(const Tensor& x, Tensors qkv, Tensors dw, Tensors norm_weights,
                                   Tensors norm_biases, const Tensor& bias, std::vector<double> eps,
                                   double scale, int64_t window_height, int64_t window_width) {
  TrainingProblem problem("cascaded_group_attention_batch_norm", x, qkv, dw, norm_weights, norm_biases, bias,
                          eps, scale, window_height, window_width);
  const std::vector<int64_t> shape = problem.statistics_shape();
  Tensor statistics = empty_floats(x, shape);
  problem.p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  Tensor out = new_image(x, shape_of(x, x.size(1)), problem.of.p.out);
  problem.p.cascade = problem.of.p;
  cpu::cascade_training(problem.p, torch_threads());
  return {out, statistics};
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensor> backward(
    const Tensor& grad_out, const Tensor& x, Tensors qkv, Tensors dw, Tensors norm_weights,
    Tensors norm_biases, const Tensor& bias, const Tensor& out, const Tensor& statistics,
    std::vector<double> eps, double scale, int64_t window_height, int64_t window_width) {
  const char* const op = "cascaded_group_attention_batch_norm_backward";
  TrainingProblem problem(op, x, qkv, dw, norm_weights, norm_biases, bias, eps, scale, window_height,
                          window_width);
  CascadeParams& p = problem.of.p;
  Tensors& alive = problem.of.alive;
  for (const auto& [name, t, into] :
       {std::tuple{"grad_out", &grad_out, &p.grad_out}, std::tuple{"out", &out, &p.out}}) {
    require_like(op, name, *t, x, "x");
    require_shape(op, name, *t, shape_of(x, x.size(1)));
    alive.push_back(with_mergeable_rows(*t));
    *into = image(alive.back());
  }
  problem.p.statistics =
      const_cast<float*>(floats(op, "statistics", statistics, problem.statistics_shape(), alive));
  std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensor> all;
  std::get<0>(all) = new_image(x, shape_of(x, x.size(1)), p.grad_x);
  std::vector<HeadWeights<float>> gradients(p.heads);
  std::vector<cpu::HeadNorms<float>> norm_gradients(p.heads);
  for (int64_t h = 0; h < p.heads; ++h) {
    std::get<1>(all).push_back(new_floats(qkv[h], gradients[h].qkv));
    std::get<2>(all).push_back(new_floats(dw[h], gradients[h].depthwise));
  }
  for (int64_t i = 0; i < 2 * p.heads; ++i) {
    cpu::HeadNorms<float>& of_head = norm_gradients[i % p.heads];
    cpu::Norm<float>& norm = i < p.heads ? of_head.qkv : of_head.q;
    std::get<3>(all).push_back(new_floats(norm_weights[i], norm.weight));
    std::get<4>(all).push_back(new_floats(norm_biases[i], norm.bias));
  }
  std::get<5>(all) = new_floats(bias, p.grad_bias);
  p.gradients = gradients.data();
  problem.p.norm_gradients = norm_gradients.data();
  problem.p.cascade = p;
  cpu::cascade_training_backward(problem.p, torch_threads());
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("cascaded_group_attention_batch_norm_forward", TORCH_BOX(&forward));
  m.impl("cascaded_group_attention_batch_norm_backward", TORCH_BOX(&backward));
}

}  // namespace effattn
