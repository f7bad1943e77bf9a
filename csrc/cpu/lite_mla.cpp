// LiteMLA's inference for CPU tensors: checks, allocation, launch, registration.
#include "../../kernels/cpu/lite_mla/plan.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "../multi_scale_problem.h"

namespace effattn {
namespace {

Tensor lite_mla(const Tensor& x, const Tensor& qkv_weight, std::optional<Tensor> qkv_bias, MaybeTensors dw,
                MaybeTensors pw, MaybeTensors dw_biases, MaybeTensors pw_biases, const Tensor& proj_weight,
                std::optional<Tensor> proj_bias, int64_t head_dim, double eps) {
  const char* const op = "lite_mla";
  EFFATTN_REQUIRE(qkv_weight.dim() == 2 && proj_weight.dim() == 2, op,
                  ": qkv_weight and proj_weight must have 2 dimensions (outputs, inputs), got shapes ",
                  shape_text(qkv_weight), " and ", shape_text(proj_weight));
  const int64_t channels = qkv_weight.size(0), out_channels = proj_weight.size(0);
  Problem problem(op, "x", x, channels, {given(dw), given(pw), given(dw_biases), given(pw_biases)}, head_dim);
  problem.attend_with(op, eps);
  cpu::LiteMLAParams p{};
  p.in_channels = x.size(1);
  p.out_channels = out_channels;
  p.qkv_weight = floats(op, "qkv_weight", qkv_weight, {channels, p.in_channels}, problem.alive);
  const int64_t attended = problem.sizes.all_heads() * head_dim;
  p.proj_weight = floats(op, "proj_weight", proj_weight, {out_channels, attended}, problem.alive);
  if (qkv_bias) p.qkv_bias = floats(op, "qkv_bias", *qkv_bias, {channels}, problem.alive);
  if (proj_bias) p.proj_bias = floats(op, "proj_bias", *proj_bias, {out_channels}, problem.alive);
  problem.alive.push_back(with_mergeable_rows(x));
  p.x = image(problem.alive.back());
  Tensor out = new_image(x, {x.size(0), out_channels, x.size(2), x.size(3)}, p.out);
  p.attention = problem.sizes;
  cpu::lite_mla(p, torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) { m.impl("lite_mla", TORCH_BOX(&lite_mla)); }

}  // namespace effattn
