// multi_scale_linear_attention: qkv (B, 3 * heads * head_dim, H, W) -> (B, (1 + S) * heads * head_dim, H, W).
// Inputs behind qkv, S each: dw_weights, pw_weights, then dw_biases and pw_biases if there are any.
#include "../../kernels/cpu/multi_scale/plan.h"
#include "operation.h"

namespace effattn::engines {
namespace {

constexpr effattn_attribute_spec kAttributes[] = {
    {"head_dim", 1, 1},  {"eps", 0, 1},       {"dw_weights", 1, 0}, {"pw_weights", 1, 0},
    {"dw_biases", 1, 0}, {"pw_biases", 1, 0}, {nullptr, 0, 0},
};

class MultiScaleLinearAttention : public Operation {
 public:
  explicit MultiScaleLinearAttention(const Attributes& a)
      : head_dim_(a.integer("head_dim", kMaxDim, 1)),
        scales_(a.integer("dw_weights", MultiScaleParams::kMaxScales)),
        dw_biases_(a.integer("dw_biases", scales_)),
        pw_biases_(a.integer("pw_biases", scales_)),
        eps_(a.not_negative("eps")) {
    if (a.integer("pw_weights", scales_) != scales_ || dw_biases_ % std::max<int64_t>(scales_, 1) != 0 ||
        pw_biases_ % std::max<int64_t>(scales_, 1) != 0)
      fail(
          "multi_scale_linear_attention: expected as many pw_weights as dw_weights, and as many biases or "
          "none");
  }

  std::vector<int64_t> shape(const Inputs& inputs) const override {
    inputs.require_count(1 + 2 * scales_ + dw_biases_ + pw_biases_);
    inputs.require_rank(0, {"qkv"}, 4, "(B, 3 * heads * head_dim, H, W)");
    const int64_t channels = inputs.size(0, 1), per_head = 3 * head_dim_;
    if (channels >= 0 && (channels % per_head != 0 || channels == 0))
      fail(inputs.operation(), ": qkv: expected a multiple of 3 * head_dim = ", per_head, " channels, got ",
           channels);
    int64_t input = 1;
    for (int64_t s = 0; s < scales_; ++s, ++input) {
      const Name name{"dw_weights", s};
      const int64_t k = kernel_of(inputs, input, name);
      inputs.require_shape(input, name, {channels, 1, k, k});
    }
    for (int64_t s = 0; s < scales_; ++s, ++input)
      inputs.require_shape(input, {"pw_weights", s}, {channels, head_dim_, 1, 1});
    for (int64_t i = 0; i < dw_biases_ + pw_biases_; ++i, ++input)
      inputs.require_shape(input, {i < dw_biases_ ? "dw_biases" : "pw_biases", i % scales_}, {channels});
    const int64_t out = channels < 0 ? kUnknown : (1 + scales_) * (channels / 3);
    return {inputs.size(0, 0), out, inputs.size(0, 2), inputs.size(0, 3)};
  }

  void run(const Inputs& inputs, const effattn_tensor& output, const cpu::Parallel& parallel) const override {
    MultiScaleParams p{};
    p.dtype = dtype_of(output);
    p.batch = inputs.size(0, 0);
    p.heads = inputs.size(0, 1) / (3 * head_dim_);
    p.head_dim = head_dim_;
    p.height = inputs.size(0, 2);
    p.width = inputs.size(0, 3);
    p.scales = static_cast<int>(scales_);
    p.eps = eps_;
    const int64_t biases = 1 + 2 * scales_;
    for (int64_t s = 0; s < scales_; ++s) {
      p.kernels[s] = inputs.size(1 + s, 3);
      p.weights[s] = {inputs.floats(1 + s), inputs.floats(1 + scales_ + s),
                      dw_biases_ > 0 ? inputs.floats(biases + s) : nullptr,
                      pw_biases_ > 0 ? inputs.floats(biases + dw_biases_ + s) : nullptr};
    }
    p.qkv = image_of(inputs.operation(), inputs[0]);
    p.out = image_of(inputs.operation(), output);
    cpu::attend(p, nullptr, parallel);
  }

 private:
  int64_t head_dim_, scales_, dw_biases_, pw_biases_;
  float eps_;
};

const Registered registered({"multi_scale_linear_attention", kAttributes, 1,
                             [](const Attributes& a) -> std::unique_ptr<Operation> {
                               return std::make_unique<MultiScaleLinearAttention>(a);
                             }});

}  // namespace
}  // namespace effattn::engines
