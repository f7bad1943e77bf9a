// Multi-scale aggregation and attention for CPU tensors: checks, allocation, launch, registration.
#include "../../kernels/cpu/multi_scale.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "../../kernels/cpu/relu_linear_attention.h"
#include "../tensor.h"

namespace effattn {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Tokens must be one dimension of one stride; a view that is none, such as a crop, is copied.
Tensor with_mergeable_rows(const Tensor& t) {
  const bool mergeable = t.size(2) <= 1 || t.size(3) <= 1 || t.stride(2) == t.size(3) * t.stride(3);
  return mergeable ? t : torch::stable::contiguous(t);
}

cpu::Image image(const Tensor& t) {
  const int64_t token_stride = t.size(3) > 1 ? t.stride(3) : t.size(2) > 1 ? t.stride(2) : 1;
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.size(1) == 1 ? 1 : t.stride(1), token_stride};
}

struct Weights {
  const Tensors &depthwise, &pointwise, &depthwise_biases, &pointwise_biases;
};

// A contiguous tensor of float32 on the CPU, kept alive by `alive`.
const float* floats(const char* op, const std::string& argument, const Tensor& t,
                    const std::vector<int64_t>& shape, Tensors& alive) {
  EFFATTN_REQUIRE(t.is_cpu() && t.scalar_type() == ScalarType::Float, op, ": ", argument,
                  " must be float32 on the CPU");
  require_shape(op, argument.c_str(), t, shape);
  alive.push_back(torch::stable::contiguous(t));
  return static_cast<const float*>(alive.back().const_data_ptr());
}

// The problem without its results, and the tensors that it points into.
struct Problem {
  cpu::MultiScale sizes{};
  Tensors alive;

  Problem(const char* op, const Tensor& qkv, const Weights& weights, int64_t head_dim) {
    cpu::MultiScale& p = sizes;
    p.dtype = kernel_dtype(op, "qkv", qkv);
    EFFATTN_REQUIRE(qkv.dim() == 4, op, ": qkv must have 4 dimensions (B, C, H, W), got shape ",
                    shape_text(qkv));
    EFFATTN_REQUIRE(head_dim > 0 && head_dim <= cpu::kMaxDim, op, ": head_dim must be in 1 to ", cpu::kMaxDim,
                    ", got ", head_dim);
    const int64_t channels = qkv.size(1);
    EFFATTN_REQUIRE(channels % (3 * head_dim) == 0, op,
                    ": qkv must have a multiple of 3 * head_dim = ", 3 * head_dim, " channels, got ",
                    channels);
    p.batch = qkv.size(0);
    p.heads = channels / (3 * head_dim);
    p.head_dim = head_dim;
    p.height = qkv.size(2);
    p.width = qkv.size(3);
    const size_t scales = weights.depthwise.size();
    EFFATTN_REQUIRE(scales <= cpu::MultiScale::kMaxScales, op, ": at most ", cpu::MultiScale::kMaxScales,
                    " scales are supported, got ", scales);
    EFFATTN_REQUIRE(weights.pointwise.size() == scales, op, ": pw_weights must have ", scales,
                    " tensors, one a scale, got ", weights.pointwise.size());
    for (const auto& [name, biases] : {std::pair{"dw_biases", &weights.depthwise_biases},
                                       std::pair{"pw_biases", &weights.pointwise_biases}}) {
      EFFATTN_REQUIRE(biases->empty() || biases->size() == scales, op, ": ", name, " must be empty or have ",
                      scales, " tensors, one a scale, got ", biases->size());
    }
    p.scales = static_cast<int>(scales);
    alive.push_back(with_mergeable_rows(qkv));
    p.qkv = image(alive.back());
    for (size_t s = 0; s < scales; ++s) {
      const std::string at = "[" + std::to_string(s) + "]";
      const Tensor& dw = weights.depthwise[s];
      EFFATTN_REQUIRE(dw.dim() == 4 && dw.size(2) % 2 == 1, op, ": dw_weights", at,
                      " must have shape (C, 1, k, k) with an odd k, got ", shape_text(dw));
      const int64_t kernel = p.kernels[s] = dw.size(2);
      cpu::ScaleWeights<const float>& w = p.weights[s];
      w.depthwise = floats(op, "dw_weights" + at, dw, {channels, 1, kernel, kernel}, alive);
      w.pointwise = floats(op, "pw_weights" + at, weights.pointwise[s], {channels, head_dim, 1, 1}, alive);
      w.depthwise_bias = w.pointwise_bias = nullptr;
      if (!weights.depthwise_biases.empty()) {
        w.depthwise_bias = floats(op, "dw_biases" + at, weights.depthwise_biases[s], {channels}, alive);
      }
      if (!weights.pointwise_biases.empty()) {
        w.pointwise_bias = floats(op, "pw_biases" + at, weights.pointwise_biases[s], {channels}, alive);
      }
    }
  }

  // Rows of the image times columns, times what each scale makes of qkv's channels, or of q's alone.
  std::vector<int64_t> shape(bool all) const {
    const int64_t channels = sizes.all_heads() * sizes.head_dim * (all ? 3 : 1);
    return {sizes.batch, channels, sizes.height, sizes.width};
  }
  std::vector<int64_t> sums_shape() const {
    return {sizes.batch, sizes.all_heads(), sizes.head_dim + 1, sizes.head_dim};
  }
  void attend_with(const char* op, double eps) {
    EFFATTN_REQUIRE(eps >= 0 && std::isfinite(eps), op, ": eps must be a finite number >= 0, got ", eps);
    sizes.eps = static_cast<float>(eps);
  }
};

Tensor new_image(const Tensor& like, const std::vector<int64_t>& shape, cpu::Image& into) {
  Tensor t = empty_in_order_of(like, shape);
  into = image(t);
  return t;
}

using Gradients = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors>;

// Allocates the gradients of the weights and points the problem at them.
Gradients new_gradients(Problem& problem, const Tensor& qkv, const Weights& weights) {
  Gradients all;
  std::get<0>(all) =
      new_image(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3)}, problem.sizes.grad_qkv);
  const auto allocate = [&](const Tensors& like, Tensors& into, float* cpu::ScaleWeights<float>::* member) {
    for (size_t s = 0; s < like.size(); ++s) {
      const auto sizes = like[s].sizes();
      const std::vector<int64_t> shape(sizes.begin(), sizes.end());
      into.push_back(empty_strided(shape, contiguous_strides(shape), ScalarType::Float));
      problem.sizes.gradients[s].*member = static_cast<float*>(into.back().mutable_data_ptr());
    }
  };
  using W = cpu::ScaleWeights<float>;
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

Tensor aggregation(const Tensor& qkv, Tensors dw, Tensors pw, Tensors dw_biases, Tensors pw_biases,
                   int64_t head_dim) {
  Problem problem("multi_scale_aggregation", qkv, {dw, pw, dw_biases, pw_biases}, head_dim);
  Tensor out = new_image(qkv, problem.shape(true), problem.sizes.out);
  cpu::aggregate(problem.sizes, torch_threads());
  return out;
}

Gradients aggregation_backward(const Tensor& grad_out, const Tensor& qkv, Tensors dw, Tensors pw,
                               Tensors dw_biases, Tensors pw_biases, int64_t head_dim) {
  const char* const op = "multi_scale_aggregation_backward";
  const Weights weights{dw, pw, dw_biases, pw_biases};
  Problem problem(op, qkv, weights, head_dim);
  take_grad_out(op, problem, grad_out, qkv, true);
  Gradients gradients = new_gradients(problem, qkv, weights);
  cpu::aggregate_backward(problem.sizes, torch_threads());
  return gradients;
}

Tensor attention(const Tensor& qkv, Tensors dw, Tensors pw, Tensors dw_biases, Tensors pw_biases,
                 int64_t head_dim, double eps) {
  const char* const op = "multi_scale_linear_attention";
  Problem problem(op, qkv, {dw, pw, dw_biases, pw_biases}, head_dim);
  problem.attend_with(op, eps);
  Tensor out = new_image(qkv, problem.shape(false), problem.sizes.out);
  cpu::attend(problem.sizes, nullptr, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& qkv, Tensors dw, Tensors pw, Tensors dw_biases,
                                             Tensors pw_biases, int64_t head_dim, double eps) {
  const char* const op = "multi_scale_linear_attention_forward";
  Problem problem(op, qkv, {dw, pw, dw_biases, pw_biases}, head_dim);
  problem.attend_with(op, eps);
  Tensor out = new_image(qkv, problem.shape(false), problem.sizes.out);
  const std::vector<int64_t> shape = problem.sums_shape();
  Tensor sums = empty_strided(shape, contiguous_strides(shape), ScalarType::Float);
  cpu::attend(problem.sizes, static_cast<float*>(sums.mutable_data_ptr()), torch_threads());
  return {out, sums};
}

Gradients attention_backward(const Tensor& grad_out, const Tensor& qkv, Tensors dw, Tensors pw,
                             Tensors dw_biases, Tensors pw_biases, const Tensor& sums, int64_t head_dim,
                             double eps) {
  const char* const op = "multi_scale_linear_attention_backward";
  const Weights weights{dw, pw, dw_biases, pw_biases};
  Problem problem(op, qkv, weights, head_dim);
  problem.attend_with(op, eps);
  take_grad_out(op, problem, grad_out, qkv, false);
  EFFATTN_REQUIRE(sums.is_cpu() && sums.scalar_type() == ScalarType::Float, op,
                  ": sums must be float32 on the CPU");
  require_shape(op, "sums", sums, problem.sums_shape());
  EFFATTN_REQUIRE(sums.is_contiguous(), op, ": sums must be contiguous");
  Gradients gradients = new_gradients(problem, qkv, weights);
  cpu::attend_backward(problem.sizes, static_cast<const float*>(sums.const_data_ptr()), torch_threads());
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) {
  m.impl("multi_scale_aggregation", TORCH_BOX(&aggregation));
  m.impl("multi_scale_aggregation_forward", TORCH_BOX(&aggregation));
  m.impl("multi_scale_aggregation_backward", TORCH_BOX(&aggregation_backward));
  m.impl("multi_scale_linear_attention", TORCH_BOX(&attention));
  m.impl("multi_scale_linear_attention_forward", TORCH_BOX(&attention_forward));
  m.impl("multi_scale_linear_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace effattn
