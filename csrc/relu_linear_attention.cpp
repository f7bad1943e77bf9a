// relu_linear_attention as a torch operator: checks, allocation, launch, registration.
#include <cmath>
#include <tuple>

#include "tensor.h"

namespace effattn {
namespace {

// The last strides of a tensor as the kernels take them. A dimension of size 1 has no step: its
// stride says nothing about the memory order, so it reads as contiguous.
Operand operand(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t rank = t.dim();
  return {const_cast<void*>(t.const_data_ptr()), strides.data(), sizes[rank - 2] == 1 ? 1 : strides[rank - 2],
          sizes[rank - 1] == 1 ? 1 : strides[rank - 1]};
}

// Checks q, k, v and eps, and fills in sizes and inputs.
LinearAttentionParams problem_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                 double eps) {
  LinearAttentionParams p{};
  p.dtype = kernel_dtype(op, "q", q);
  require_like(op, "k", k, q, "q");
  require_like(op, "v", v, q, "q");
  const int64_t rank = q.dim();
  EFFATTN_REQUIRE(rank >= 2, op, ": q must have at least 2 dimensions (..., N, D), got shape ",
                  shape_text(q));
  EFFATTN_REQUIRE(k.dim() == rank, op, ": k must have as many dimensions as q, got shapes ", shape_text(k),
                  " and ", shape_text(q));
  EFFATTN_REQUIRE(v.dim() == rank, op, ": v must have as many dimensions as q, got shapes ", shape_text(v),
                  " and ", shape_text(q));
  const auto q_sizes = q.sizes(), k_sizes = k.sizes(), v_sizes = v.sizes();
  p.groups = 1;
  for (int64_t i = 0; i < rank - 2; ++i) {
    EFFATTN_REQUIRE(k_sizes[i] == q_sizes[i], op, ": k must have the leading sizes of q, got shapes ",
                    shape_text(k), " and ", shape_text(q));
    EFFATTN_REQUIRE(v_sizes[i] == q_sizes[i], op, ": v must have the leading sizes of q, got shapes ",
                    shape_text(v), " and ", shape_text(q));
    p.groups *= q_sizes[i];
  }
  p.queries = q_sizes[rank - 2];
  p.head_dim = q_sizes[rank - 1];
  p.keys = k_sizes[rank - 2];
  p.value_dim = v_sizes[rank - 1];
  EFFATTN_REQUIRE(k_sizes[rank - 1] == p.head_dim, op,
                  ": k must have the head_dim of q in its last dimension, got shapes ", shape_text(k),
                  " and ", shape_text(q));
  EFFATTN_REQUIRE(v_sizes[rank - 2] == p.keys, op, ": v must have as many tokens as k, got shapes ",
                  shape_text(v), " and ", shape_text(k));
  EFFATTN_REQUIRE(eps >= 0 && std::isfinite(eps), op, ": eps must be a finite number >= 0, got ", eps);
  // Scratch and sums are counted in head_dim * value_dim; empty tensors can claim any size.
  EFFATTN_REQUIRE(p.head_dim <= kMaxDim && p.value_dim <= kMaxDim, op,
                  ": head_dim and value_dim must be at most ", kMaxDim, ", got ", p.head_dim, " and ",
                  p.value_dim);
  int64_t sums = 0;
  EFFATTN_REQUIRE(!__builtin_mul_overflow(p.groups, 4 * p.kv_state_size(), &sums), op,
                  ": too many groups for their sums, got ", p.groups);
  p.eps = static_cast<float>(eps);
  p.lead_rank = static_cast<int>(rank - 2);
  p.lead_sizes = q_sizes.data();
  p.q = operand(q);
  p.k = operand(k);
  p.v = operand(v);
  return p;
}

std::vector<int64_t> sums_shape(const Tensor& q, int64_t value_dim) {
  std::vector<int64_t> shape = shape_with_last(q, q.size(q.dim() - 1));
  shape[shape.size() - 2] = value_dim + 1;
  return shape;
}

Tensor inference(const Tensor& q, const Tensor& k, const Tensor& v, double eps) {
  LinearAttentionParams p = problem_of("relu_linear_attention", q, k, v, eps);
  Tensor out = empty_in_order_of(q, shape_with_last(q, p.value_dim));
  p.out = operand(out);
  kernels::forward(p, nullptr, execution(q));
  return out;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double eps) {
  LinearAttentionParams p = problem_of("relu_linear_attention_forward", q, k, v, eps);
  Tensor out = empty_in_order_of(q, shape_with_last(q, p.value_dim));
  p.out = operand(out);
  const std::vector<int64_t> shape = sums_shape(q, p.value_dim);
  Tensor sums = empty_floats(q, shape);
  kernels::forward(p, static_cast<float*>(sums.mutable_data_ptr()), execution(q));
  return {out, sums};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& sums, double eps) {
  const char* const op = "relu_linear_attention_backward";
  LinearAttentionParams p = problem_of(op, q, k, v, eps);
  require_like(op, "grad_out", grad_out, q, "q");
  require_shape(op, "grad_out", grad_out, shape_with_last(q, p.value_dim));
  const float* const kept = kept_floats(op, "sums", sums, sums_shape(q, p.value_dim));
  Tensor grad_q = empty_in_order_of(q, shape_with_last(q, p.head_dim));
  Tensor grad_k = empty_in_order_of(k, shape_with_last(k, p.head_dim));
  Tensor grad_v = empty_in_order_of(v, shape_with_last(v, p.value_dim));
  p.grad_out = operand(grad_out);
  p.grad_q = operand(grad_q);
  p.grad_k = operand(grad_k);
  p.grad_v = operand(grad_v);
  kernels::backward(p, kept, execution(q, sums));
  return {grad_q, grad_k, grad_v};
}

}  // namespace

EFFATTN_OPERATORS(m) {
  m.impl("relu_linear_attention", TORCH_BOX(&inference));
  m.impl("relu_linear_attention_forward", TORCH_BOX(&forward));
  m.impl("relu_linear_attention_backward", TORCH_BOX(&backward));
}

}  // namespace effattn
