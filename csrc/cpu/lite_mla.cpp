// LiteMLA's inference for CPU tensors: allocation, launch, registration.
#include "../../kernels/cpu/lite_mla/plan.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "../multi_scale_params.h"

namespace effattn {
namespace {

const Signature kSignature("lite_mla");

Tensor lite_mla(const Tensor& x, const Tensor& qkv_weight, std::optional<Tensor> qkv_bias, MaybeTensors dw,
                MaybeTensors pw, MaybeTensors dw_biases, MaybeTensors pw_biases, const Tensor& proj_weight,
                std::optional<Tensor> proj_bias, int64_t head_dim, double eps) {
  const Weights weights{given(dw), given(pw), given(dw_biases), given(pw_biases)};
  const auto given_or_null = [](const std::optional<Tensor>& t) { return t ? &*t : nullptr; };
  kSignature.check({&x, &qkv_weight, given_or_null(qkv_bias), &weights.depthwise, &weights.pointwise,
                    &weights.depthwise_biases, &weights.pointwise_biases, &proj_weight,
                    given_or_null(proj_bias), head_dim, eps});
  const int64_t out_channels = proj_weight.size(0);
  MultiScaleCall call(kSignature.name(), x, qkv_weight.size(0), weights, head_dim, eps);
  cpu::LiteMLAParams p{};
  p.in_channels = x.size(1);
  p.out_channels = out_channels;
  p.qkv_weight = floats(qkv_weight, call.alive);
  p.proj_weight = floats(proj_weight, call.alive);
  if (qkv_bias) p.qkv_bias = floats(*qkv_bias, call.alive);
  if (proj_bias) p.proj_bias = floats(*proj_bias, call.alive);
  call.alive.push_back(with_mergeable_rows(x));
  p.x = image(call.alive.back());
  Tensor out = new_image(x, {x.size(0), out_channels, x.size(2), x.size(3)}, p.out);
  p.attention = call.p;
  cpu::lite_mla(p, torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) { m.impl("lite_mla", TORCH_BOX(&lite_mla)); }

}  // namespace effattn
