// Cascaded group attention, relu and a 1x1 convolution for CPU tensors: checks, allocation, launch,
// registration.
#include "../cascade_problem.h"
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
  EFFATTN_REQUIRE(heads > 0 && key_dim > 0 && key_dim < kMostChannels, op,
                  ": kernels must have a size a head and key_dim be positive, at most 65535, got ", heads,
                  " and ", key_dim);
  int64_t all_taps = 0;
  for (const int64_t kernel : kernels) {
    EFFATTN_REQUIRE(kernel > 0 && kernel % 2 == 1 && kernel < kMostSide, op, ": kernels must be odd, got ",
                    kernel);
    all_taps += kernel * kernel;
  }
  Problem problem(op, x, heads, key_dim, bias, scale, window_height, window_width);
  CascadeParams& p = problem.p;
  Tensors& alive = problem.alive;
  const int64_t keys = round_up(key_dim, cpu::kWholeVectors);
  const int64_t stride = 2 * keys + round_up(p.value_dim, cpu::kWholeVectors);
  p.kernels = kernels.data();
  p.packed = {floats(op, "qkv", qkv, {heads, p.value_dim, stride}, alive),
              floats(op, "qkv_bias", qkv_bias, {heads, stride}, alive),
              floats(op, "taps", taps, {all_taps, keys}, alive),
              floats(op, "tap_bias", tap_bias, {heads, keys}, alive)};
  EFFATTN_REQUIRE(proj_bias.dim() == 1, op, ": proj_bias must have 1 dimension (outputs), got shape ",
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
