// EfficientFormer's attention as a torch operator: checks, allocation, launch, registration.
#include <cmath>
#include <tuple>

#include "talking_heads.h"
#include "weights.h"

namespace effattn {
namespace {

HeadsOperand operand(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2),
          t.size(3) == 1 ? 1 : t.stride(3)};
}

// The problem without its results, and the tensors that it points into.
struct Problem {
  BiasedAttentionParams p{};
  Tensors alive;

  Problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
          const Tensors& talking_heads, double scale) {
    p.dtype = kernel_dtype(op, "q", q);
    require_like(op, "k", k, q, "q");
    require_like(op, "v", v, q, "q");
    EFFATTN_REQUIRE(q.dim() == 4, op, ": q must have 4 dimensions (B, heads, N, head_dim), got shape ",
                    shape_text(q));
    EFFATTN_REQUIRE(v.dim() == 4, op, ": v must have 4 dimensions (B, heads, M, value_dim), got shape ",
                    shape_text(v));
    const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = v.size(2);
    require_shape(op, "k", k, {batch, heads, keys, q.size(3)});
    require_shape(op, "v", v, {batch, heads, keys, v.size(3)});
    EFFATTN_REQUIRE(std::isfinite(scale), op, ": scale must be finite, got ", scale);
    p.batch = batch;
    p.heads = {heads,   queries,        keys, q.size(3), v.size(3), static_cast<float>(scale),
               nullptr, queries * keys, {}};
    p.heads.bias = floats(op, "bias", bias, {heads, queries, keys}, alive);
    p.heads.mix = talking_heads_of(op, talking_heads, heads, alive);
    p.q = operand(q);
    p.k = operand(k);
    p.v = operand(v);
  }
};

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
               MaybeTensors talking_heads, double scale) {
  Problem problem("biased_attention", q, k, v, bias, given(talking_heads), scale);
  Tensor out = empty_in_order_of(q, shape_with_last(q, v.size(3)));
  problem.p.out = operand(out);
  kernels::biased_attention(problem.p, execution(q, problem.alive));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors> backward(const Tensor& grad_out, const Tensor& q,
                                                             const Tensor& k, const Tensor& v,
                                                             const Tensor& bias, MaybeTensors talking_heads,
                                                             double scale) {
  const char* const op = "biased_attention_backward";
  Problem problem(op, q, k, v, bias, given(talking_heads), scale);
  BiasedAttentionParams& p = problem.p;
  require_like(op, "grad_out", grad_out, q, "q");
  require_shape(op, "grad_out", grad_out, shape_with_last(q, v.size(3)));
  p.grad_out = operand(grad_out);
  const auto like = [](const Tensor& t) {
    const auto sizes = t.sizes();
    return empty_in_order_of(t, std::vector<int64_t>(sizes.begin(), sizes.end()));
  };
  Tensor grad_q = like(q), grad_k = like(k), grad_v = like(v);
  p.grad_q = operand(grad_q);
  p.grad_k = operand(grad_k);
  p.grad_v = operand(grad_v);
  Tensor grad_bias = new_floats(bias, p.grad_bias);
  Tensors grad_mix;
  float** const into[] = {&p.grad_mix.logits, &p.grad_mix.logits_bias, &p.grad_mix.weights,
                          &p.grad_mix.weights_bias};
  for (size_t i = 0; i < given(talking_heads).size(); ++i)
    grad_mix.push_back(new_floats(given(talking_heads)[i], *into[i]));
  kernels::biased_attention_backward(p, execution(q, problem.alive));
  return {grad_q, grad_k, grad_v, grad_bias, grad_mix};
}

}  // namespace

EFFATTN_OPERATORS(m) {
  m.impl("biased_attention", TORCH_BOX(&forward));
  m.impl("biased_attention_forward", TORCH_BOX(&forward));
  m.impl("biased_attention_backward", TORCH_BOX(&backward));
}

}  // namespace effattn
