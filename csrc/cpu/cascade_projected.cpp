// Cascaded group attention, relu and a 1x1 convolution for CPU tensors: checks, allocation, launch,
// registration.
#include "../../kernels/cpu/cascaded_group_attention/plan.h"

#include "../cascade_params.h"
#include "packed.h"

namespace effattn {
namespace {

using namespace cascade;

Tensor projected(const Tensor& x, const Tensor& qkv, const Tensor& qkv_bias, const Tensor& taps,
                 const Tensor& tap_bias, const Tensor& bias, const Tensor& proj, const Tensor& proj_bias,
                 std::vector<int64_t> kernels, int64_t key_dim, double scale, int64_t window_height,
                 int64_t window_width) {
  const char* const op = "cascaded_group_attention_projected";
  const int64_t heads = static_cast<int64_t>(kernels.size());
  EFFATTN_REQUIRE(heads > 0 && key_dim > 0 && key_dim <= kMaxDim, op,
                  ": kernels, key_dim: expected a size a head and a positive number up to ", kMaxDim,
                  ", got ", heads, " and ", key_dim);
  int64_t all_taps = 0;
  for (const int64_t kernel : kernels) {
    EFFATTN_REQUIRE(kernel > 0 && kernel % 2 == 1 && kernel < kMaxSide, op,
                    ": kernels: expected odd sizes, got ", kernel);
    all_taps += kernel * kernel;
  }
  require_image(op, x);
  EFFATTN_REQUIRE(x.size(1) % heads == 0, op, ": x: expected a multiple of ", heads, " channels, got ",
                  x.size(1));
  EFFATTN_REQUIRE(
      window_height > 0 && window_width > 0 && window_height < kMaxSide && window_width < kMaxSide, op,
      ": window_height, window_width: expected positive numbers below ", kMaxSide, ", got ", window_height,
      " and ", window_width);
  EFFATTN_REQUIRE(fits_float(scale), op, ": scale: expected a finite float32, got ", scale);
  const int64_t tokens = window_height * window_width;
  Tensors alive;
  floats(op, "attention_bias", bias, {heads, tokens, tokens}, alive);
  Call call(x, heads, key_dim, bias, scale, window_height, window_width);
  CascadeParams& p = call.p;
  const int64_t keys = round_up(key_dim, cpu::kWholeVectors);
  const int64_t stride = 2 * keys + round_up(p.value_dim, cpu::kWholeVectors);
  p.kernels = kernels.data();
  p.packed = {floats(op, "qkv", qkv, {heads, p.value_dim, stride}, alive),
              floats(op, "qkv_bias", qkv_bias, {heads, stride}, alive),
              floats(op, "taps", taps, {all_taps, keys}, alive),
              floats(op, "tap_bias", tap_bias, {heads, keys}, alive)};
  EFFATTN_REQUIRE(proj_bias.dim() == 1, op, ": proj_bias: expected 1 dimension (outputs), got shape ",
                  shape_text(proj_bias));
  const cpu::ProjectionWeights projection =
      packed_projection(op, "proj", proj, &proj_bias, x.size(1), proj_bias.size(0), alive);
  Tensor out = new_image(x, shape_of(x, projection.outputs), p.out);
  cpu::cascaded_group_attention(p, &projection, torch_threads());
  return out;
}

}  // namespace

EFFATTN_OPERATORS(m) { m.impl("cascaded_group_attention_projected", TORCH_BOX(&projected)); }

}  // namespace effattn
