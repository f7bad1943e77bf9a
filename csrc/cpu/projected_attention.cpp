// Attention with its projections for CPU tensors: checks, allocation, launch, registration.
#include "../../kernels/cpu/projected_attention.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "images.h"
#include "talking_heads.h"
#include "weights.h"

namespace effattn {
namespace {

// The odd k whose square it is, or 0.
int64_t side_of(int64_t square) {
  int64_t k = 1;
  while (k * k < square) k += 2;
  return k * k == square ? k : 0;
}

Tensor projected_attention(const Tensor& x, const Tensor& qkv, const Tensor& qkv_bias, const Tensor& bias,
                           Tensors talking_heads, std::optional<Tensor> taps, std::optional<Tensor> tap_bias,
                           std::optional<Tensor> proj, std::optional<Tensor> proj_bias, int64_t key_dim,
                           int64_t value_dim, double scale) {
  const char* const op = "projected_attention";
  cpu::ProjectedAttention p{};
  p.dtype = kernel_dtype(op, "x", x);
  EFFATTN_REQUIRE(x.dim() == 4, op, ": x must have 4 dimensions (B, C, H, W), got shape ", shape_text(x));
  EFFATTN_REQUIRE(bias.dim() == 3 && bias.size(0) > 0, op,
                  ": bias must have shape (heads, H * W, H * W), got ", shape_text(bias));
  EFFATTN_REQUIRE(key_dim > 0 && value_dim > 0, op, ": key_dim and value_dim must be positive, got ", key_dim,
                  " and ", value_dim);
  EFFATTN_REQUIRE(std::isfinite(scale), op, ": scale must be finite, got ", scale);
  EFFATTN_REQUIRE(taps.has_value() == tap_bias.has_value() && proj.has_value() == proj_bias.has_value(), op,
                  ": taps and proj come with their biases, or both are None");
  Tensors alive;
  const int64_t heads = bias.size(0), tokens = x.size(2) * x.size(3);
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.heads = {heads,   tokens,          tokens, key_dim, value_dim, static_cast<float>(scale),
             nullptr, tokens * tokens, {}};
  p.heads.bias = floats(op, "bias", bias, {heads, tokens, tokens}, alive);
  p.heads.mix = talking_heads_of(op, talking_heads, heads, alive);
  const int64_t values = p.values(), first = p.first_value();
  p.qkv = packed_projection(op, "qkv", qkv, &qkv_bias, x.size(1), first + values, alive);
  if (taps) {
    constexpr int64_t width = cpu::kPackedOutputs;
    EFFATTN_REQUIRE(taps->dim() == 3 && side_of(taps->size(1)) > 0, op,
                    ": taps must have shape (blocks, k * k, ", width, ") with an odd k, got ",
                    shape_text(*taps));
    p.kernel = side_of(taps->size(1));
    const int64_t blocks = cpu::ceil_div(values, width);
    p.taps = floats(op, "taps", *taps, {blocks, p.kernel * p.kernel, width}, alive);
    p.tap_bias = floats(op, "tap_bias", *tap_bias, {blocks * width}, alive);
  }
  cpu::ProjectionWeights last{};
  int64_t outputs = heads * value_dim;
  if (proj) {
    EFFATTN_REQUIRE(proj_bias->dim() == 1, op, ": proj_bias must have 1 dimension (outputs), got shape ",
                    shape_text(*proj_bias));
    outputs = proj_bias->size(0);
    last = packed_projection(op, "proj", *proj, &*proj_bias, values, outputs, alive);
    p.proj = &last;
  }
  alive.push_back(with_mergeable_rows(x));
  p.x = image(alive.back());
  Tensor out = new_image(x, {x.size(0), outputs, x.size(2), x.size(3)}, p.out);
  if (out.numel() > 0) cpu::projected_attention(p, torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) { m.impl("projected_attention", TORCH_BOX(&projected_attention)); }

}  // namespace effattn
