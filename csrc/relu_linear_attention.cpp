// relu_linear_attention as a torch operator: allocation, launch, registration.
#include <tuple>

#include "signature.h"
#include "tensor.h"
#include EFFATTN_KERNELS(relu_linear_attention)

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

const Signature kSignature("relu_linear_attention");

// Of arguments that are right: sizes and inputs.
LinearAttentionParams params_of(const Tensor& q, const Tensor& k, const Tensor& v, double eps) {
  LinearAttentionParams p{};
  const int64_t rank = q.dim();
  p.dtype = kernel_dtype(q);
  p.groups = 1;
  for (int64_t i = 0; i < rank - 2; ++i) p.groups *= q.size(i);
  p.queries = q.size(rank - 2);
  p.head_dim = q.size(rank - 1);
  p.keys = k.size(rank - 2);
  p.value_dim = v.size(rank - 1);
  // Scratch and kv_state are counted in head_dim * value_dim; empty tensors can claim any size.
  EFFATTN_REQUIRE(p.head_dim <= kMaxDim && p.value_dim <= kMaxDim, kSignature.name(),
                  ": q, v: expected at most ", kMaxDim, " channels, got ", p.head_dim, " and ", p.value_dim);
  int64_t floats = 0;
  EFFATTN_REQUIRE(!__builtin_mul_overflow(p.groups, 4 * p.kv_state_size(), &floats), kSignature.name(),
                  ": q: expected leading sizes whose kv_state can be counted, got shape ", shape_text(q));
  p.eps = static_cast<float>(eps);
  p.lead_rank = static_cast<int>(rank - 2);
  p.lead_sizes = q.sizes().data();
  p.q = operand(q);
  p.k = operand(k);
  p.v = operand(v);
  return p;
}

std::vector<int64_t> kv_state_shape(const Tensor& q, int64_t value_dim) {
  std::vector<int64_t> shape = shape_with_last(q, q.size(q.dim() - 1));
  shape[shape.size() - 2] = value_dim + 1;
  return shape;
}

Tensor inference(const Tensor& q, const Tensor& k, const Tensor& v, double eps) {
  kSignature.check({&q, &k, &v, eps});
  LinearAttentionParams p = params_of(q, k, v, eps);
  Tensor out = empty_in_order_of(q, shape_with_last(q, p.value_dim));
  p.out = operand(out);
  kernels::forward(p, nullptr, execution(q));
  return out;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double eps) {
  kSignature.check({&q, &k, &v, eps});
  LinearAttentionParams p = params_of(q, k, v, eps);
  Tensor out = empty_in_order_of(q, shape_with_last(q, p.value_dim));
  p.out = operand(out);
  const std::vector<int64_t> shape = kv_state_shape(q, p.value_dim);
  Tensor kv_state = empty_floats(q, shape);
  kernels::forward(p, static_cast<float*>(kv_state.mutable_data_ptr()), execution(q));
  return {out, kv_state};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& kv_state, double eps) {
  kSignature.check_backward(grad_out, {&q, &k, &v, eps}, {&kv_state});
  LinearAttentionParams p = params_of(q, k, v, eps);
  Tensor grad_q = empty_in_order_of(q, shape_with_last(q, p.head_dim));
  Tensor grad_k = empty_in_order_of(k, shape_with_last(k, p.head_dim));
  Tensor grad_v = empty_in_order_of(v, shape_with_last(v, p.value_dim));
  p.grad_out = operand(grad_out);
  p.grad_q = operand(grad_q);
  p.grad_k = operand(grad_k);
  p.grad_v = operand(grad_v);
  kernels::backward(p, static_cast<const float*>(kv_state.const_data_ptr()), execution(q));
  return {grad_q, grad_k, grad_v};
}

}  // namespace

EFFATTN_OPERATORS(m) {
  m.impl("relu_linear_attention", TORCH_BOX(&inference));
  m.impl("relu_linear_attention_forward", TORCH_BOX(&forward));
  m.impl("relu_linear_attention_backward", TORCH_BOX(&backward));
}

}  // namespace effattn
