// EfficientFormer's attention as a torch operator: allocation, launch, registration.
#include <tuple>

#include "signature.h"
#include "talking_heads.h"
#include "weights.h"
#include EFFATTN_KERNELS(biased_attention)

namespace effattn {
namespace {

HeadsOperand operand(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2),
          t.size(3) == 1 ? 1 : t.stride(3)};
}

const Signature kSignature("biased_attention");

// The params without results, and the tensors that they point into; of arguments that are right.
struct Call {
  BiasedAttentionParams p{};
  Tensors alive;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensors& talking_heads,
       double scale) {
    const int64_t heads = q.size(1), queries = q.size(2), keys = k.size(2);
    p.dtype = kernel_dtype(q);
    p.batch = q.size(0);
    p.heads = {heads,   queries,        keys, q.size(3), v.size(3), static_cast<float>(scale),
               nullptr, queries * keys, {}};
    p.heads.bias = floats(bias, alive);
    p.heads.mix = talking_heads_of(talking_heads, alive);
    p.q = operand(q);
    p.k = operand(k);
    p.v = operand(v);
  }
};

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
               MaybeTensors talking_heads, double scale) {
  kSignature.check({&q, &k, &v, &bias, &given(talking_heads), scale});
  Call call(q, k, v, bias, given(talking_heads), scale);
  Tensor out = empty_in_order_of(q, shape_with_last(q, v.size(3)));
  call.p.out = operand(out);
  kernels::biased_attention(call.p, execution(q));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors> backward(const Tensor& grad_out, const Tensor& q,
                                                             const Tensor& k, const Tensor& v,
                                                             const Tensor& bias, MaybeTensors talking_heads,
                                                             double scale) {
  kSignature.check_backward(grad_out, {&q, &k, &v, &bias, &given(talking_heads), scale}, {});
  Call call(q, k, v, bias, given(talking_heads), scale);
  BiasedAttentionParams& p = call.p;
  p.grad_out = operand(grad_out);
  const auto like = [](const Tensor& t) { return empty_in_order_of(t, shape_of(t)); };
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
  kernels::biased_attention_backward(p, execution(q));
  return {grad_q, grad_k, grad_v, grad_bias, grad_mix};
}

}  // namespace

EFFATTN_OPERATORS(m) {
  m.impl("biased_attention", TORCH_BOX(&forward));
  m.impl("biased_attention_forward", TORCH_BOX(&forward));
  m.impl("biased_attention_backward", TORCH_BOX(&backward));
}

}  // namespace effattn
