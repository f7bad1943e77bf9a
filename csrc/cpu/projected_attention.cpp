// Attention with its projections for CPU tensors: checks, allocation, launch, registration.
#include "../../kernels/cpu/projected_attention/plan.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "../images.h"
#include "../talking_heads.h"
#include "packed.h"

namespace effattn {
namespace {

// The odd k whose square it is, or 0.
int64_t side_of(int64_t square) {
  int64_t k = 1;
  while (k < kMaxSide && k * k < square) k += 2;
  return k * k == square ? k : 0;
}

// A depthwise convolution of `channels`, or none.
cpu::Depthwise depthwise_of(const char* op, const char* names[2], const std::optional<Tensor>& taps,
                            const std::optional<Tensor>& bias, int64_t channels, Tensors& alive) {
  constexpr int64_t width = cpu::kPackedOutputs;
  EFFATTN_REQUIRE(taps.has_value() == bias.has_value(), op, ": ", names[0], ", ", names[1],
                  ": expected both or None for both");
  if (!taps) return {};
  EFFATTN_REQUIRE(taps->dim() == 3 && side_of(taps->size(1)) > 0, op, ": ", names[0],
                  ": expected shape (blocks, k * k, ", width, ") with an odd k, got ", shape_text(*taps));
  const int64_t blocks = ceil_div(channels, width);
  return {side_of(taps->size(1)), floats(op, names[0], *taps, {blocks, taps->size(1), width}, alive),
          floats(op, names[1], *bias, {blocks * width}, alive)};
}

Tensor projected_attention(const Tensor& x, std::optional<Tensor> halving_taps,
                           std::optional<Tensor> halving_bias, std::optional<Tensor> q,
                           std::optional<Tensor> q_bias, const Tensor& qkv, const Tensor& qkv_bias,
                           const Tensor& bias, MaybeTensors talking_heads, std::optional<Tensor> taps,
                           std::optional<Tensor> tap_bias, const Tensor& proj, const Tensor& proj_bias,
                           int64_t key_dim, int64_t value_dim, double scale, int64_t activation,
                           int64_t out_height, int64_t out_width) {
  const char* const op = "projected_attention";
  cpu::ProjectedAttentionParams p{};
  require_image(op, x);
  p.dtype = kernel_dtype(x);
  EFFATTN_REQUIRE(bias.dim() == 3 && bias.size(0) > 0, op,
                  ": bias: expected shape (heads, queries, keys), got ", shape_text(bias));
  EFFATTN_REQUIRE(key_dim > 0 && value_dim > 0 && key_dim <= kMaxDim && value_dim <= kMaxDim, op,
                  ": key_dim, value_dim: expected positive numbers up to ", kMaxDim, ", got ", key_dim,
                  " and ", value_dim);
  EFFATTN_REQUIRE(fits_float(scale), op, ": scale: expected a finite float32, got ", scale);
  EFFATTN_REQUIRE(activation >= 0 && activation <= static_cast<int64_t>(cpu::Activation::kGelu), op,
                  ": activation: expected 0 (none), 1 (relu) or 2 (gelu), got ", activation);
  EFFATTN_REQUIRE(q.has_value() == q_bias.has_value(), op, ": q, q_bias: expected both or None for both");
  Tensors alive;
  const int64_t heads = bias.size(0);
  p.batch = x.size(0);
  p.channels = x.size(1);
  const char* of_halving[] = {"halving_taps", "halving_bias"};
  p.halving = depthwise_of(op, of_halving, halving_taps, halving_bias, p.channels, alive);
  EFFATTN_REQUIRE(halving_taps || !q, op, ": q: expected None where no halving_taps make its image");
  p.x_size = p.size = p.query_size = {x.size(2), x.size(3)};
  if (halving_taps) p.query_size = {ceil_div(x.size(2), 2), ceil_div(x.size(3), 2)};
  if (!q) p.size = p.query_size;
  p.out_size = {out_height, out_width};
  EFFATTN_REQUIRE(out_height >= p.query_size.height && out_width >= p.query_size.width, op,
                  ": out_height, out_width: expected at least the queries', ", p.query_size.height, " x ",
                  p.query_size.width, ", got ", out_height, " x ", out_width);
  const int64_t queries = p.query_size.tokens(), keys = p.size.tokens();
  p.heads = {heads,   queries,        keys, key_dim, value_dim, static_cast<float>(scale),
             nullptr, queries * keys, {}};
  p.heads.bias = floats(op, "bias", bias, {heads, queries, keys}, alive);
  const Tensors& mix = given(talking_heads);
  EFFATTN_REQUIRE(mix.empty() || mix.size() == 4, op, ": talking_heads: expected none or 4 tensors, got ",
                  mix.size());
  for (size_t i = 0; i < mix.size(); ++i)
    floats(op, "talking_heads[" + std::to_string(i) + "]", mix[i],
           i % 2 == 0 ? std::vector<int64_t>{heads, heads} : std::vector<int64_t>{heads}, alive);
  p.heads.mix = talking_heads_of(mix, alive);
  cpu::ProjectionWeights of_q{};
  if (q) {
    of_q = packed_projection(op, "q", *q, &*q_bias, x.size(1), p.keys(), alive);
    p.q = &of_q;
  }
  const int64_t values = p.values();
  p.qkv = packed_projection(op, "qkv", qkv, &qkv_bias, x.size(1), p.first_value() + values, alive);
  const char* of_local[] = {"taps", "tap_bias"};
  p.local = depthwise_of(op, of_local, taps, tap_bias, values, alive);
  p.activation = static_cast<cpu::Activation>(activation);
  EFFATTN_REQUIRE(proj_bias.dim() == 1, op, ": proj_bias: expected 1 dimension (outputs), got shape ",
                  shape_text(proj_bias));
  p.proj = packed_projection(op, "proj", proj, &proj_bias, values, proj_bias.size(0), alive);
  alive.push_back(with_mergeable_rows(x));
  p.x = image(alive.back());
  Tensor out = new_image(x, {x.size(0), p.proj.outputs, out_height, out_width}, p.out);
  cpu::projected_attention(p, torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m) { m.impl("projected_attention", TORCH_BOX(&projected_attention)); }

}  // namespace effattn
