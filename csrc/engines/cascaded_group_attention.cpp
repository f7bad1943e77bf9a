// cascaded_group_attention: x (B, heads * d, H, W) -> the same. Inputs behind x, one a head each:
// qkv_weights, qkv_biases if there are any, q_dw_weights, q_dw_biases if there are any; then attention_bias.
#include "../../kernels/cpu/cascaded_group_attention/plan.h"

#include "../../kernels/cpu/core/arena.h"
#include "operation.h"

namespace effattn::engines {
namespace {

constexpr effattn_attribute_spec kAttributes[] = {
    {"scale", 0, 1},      {"window_height", 1, 1}, {"window_width", 1, 1}, {"qkv_weights", 1, 1},
    {"qkv_biases", 1, 0}, {"q_dw_weights", 1, 1},  {"q_dw_biases", 1, 0},  {nullptr, 0, 0},
};

class CascadedGroupAttention : public Operation {
 public:
  explicit CascadedGroupAttention(const Attributes& a)
      : scale_(a.finite("scale")),
        window_height_(a.integer("window_height", kMaxSide - 1, 1)),
        window_width_(a.integer("window_width", kMaxSide - 1, 1)),
        heads_(a.integer("qkv_weights", kMaxInputs / 4, 1)),
        qkv_biases_(a.integer("qkv_biases", heads_)),
        dw_biases_(a.integer("q_dw_biases", heads_)) {
    if (a.integer("q_dw_weights", heads_) != heads_ || qkv_biases_ % heads_ != 0 || dw_biases_ % heads_ != 0)
      fail(
          "cascaded_group_attention: expected as many q_dw_weights as qkv_weights, and as many biases or "
          "none");
  }

  std::vector<int64_t> shape(const Inputs& inputs) const override {
    inputs.require_count(bias() + 1);
    inputs.require_rank(0, {"x"}, 4, "(B, heads * d, H, W)");
    const int64_t channels = inputs.size(0, 1);
    if (channels >= 0 && (channels % heads_ != 0 || channels == 0))
      fail(inputs.operation(), ": x: expected a multiple of ", heads_, " channels, got ", channels);
    const int64_t d = channels < 0 ? kUnknown : channels / heads_;
    inputs.require_rank(depthwise(), {"q_dw_weights", 0}, 4, "(key_dim, 1, odd k, k)");
    const int64_t key_dim = inputs.size(depthwise(), 0);
    if (key_dim == 0 || key_dim > kMaxDim || d > kMaxDim)
      fail(inputs.operation(), ": expected from 1 to ", kMaxDim, " channels of a head, got ", key_dim,
           " and ", d);
    const int64_t outputs = key_dim < 0 || d < 0 ? kUnknown : 2 * key_dim + d;
    for (int64_t h = 0; h < heads_; ++h) {
      inputs.require_shape(1 + h, {"qkv_weights", h}, {outputs, d, 1, 1});
      if (qkv_biases_ > 0) inputs.require_shape(1 + heads_ + h, {"qkv_biases", h}, {outputs});
      const int64_t k = kernel_of(inputs, depthwise() + h, {"q_dw_weights", h});
      inputs.require_shape(depthwise() + h, {"q_dw_weights", h}, {key_dim, 1, k, k});
      if (dw_biases_ > 0) inputs.require_shape(depthwise() + heads_ + h, {"q_dw_biases", h}, {key_dim});
    }
    const int64_t tokens = window_height_ * window_width_;
    inputs.require_shape(bias(), {"attention_bias"}, {heads_, tokens, tokens});
    return {inputs.size(0, 0), channels, inputs.size(0, 2), inputs.size(0, 3)};
  }

  void pack(const Inputs& inputs) override {
    Call call(*this, inputs);
    packed_memory_ = cpu::allocate(cpu::packed_floats(call.p));
    packed_ = cpu::pack(call.p, packed_memory_.get());
  }

  void run(const Inputs& inputs, const effattn_tensor& output, const cpu::Parallel& parallel) const override {
    Call call(*this, inputs);
    CascadeParams& p = call.p;
    if (packed_memory_ != nullptr) {
      p.weights = nullptr;
      p.packed = packed_;
    }
    p.dtype = dtype_of(output);
    p.x = image_of(inputs.operation(), inputs[0]);
    p.out = image_of(inputs.operation(), output);
    cpu::cascaded_group_attention(p, parallel);
  }

 private:
  // The inputs that these are the first of.
  int64_t depthwise() const { return 1 + heads_ + qkv_biases_; }
  int64_t bias() const { return depthwise() + heads_ + dw_biases_; }

  // The params without images, and what they point into.
  struct Call {
    CascadeParams p{};
    std::vector<int64_t> kernels;
    std::vector<HeadWeights<const float>> weights;

    Call(const CascadedGroupAttention& of, const Inputs& inputs) {
      p.batch = inputs.size(0, 0);
      p.heads = of.heads_;
      p.key_dim = inputs.size(of.depthwise(), 0);
      p.value_dim = inputs.size(1, 1);
      p.height = inputs.size(0, 2);
      p.width = inputs.size(0, 3);
      p.window_height = of.window_height_;
      p.window_width = of.window_width_;
      p.softmax_scale = of.scale_;
      p.bias = inputs.floats(of.bias());
      for (int64_t h = 0; h < of.heads_; ++h) {
        const int64_t dw = of.depthwise() + h;
        kernels.push_back(inputs.size(dw, 3));
        weights.push_back({inputs.floats(1 + h),
                           of.qkv_biases_ > 0 ? inputs.floats(1 + of.heads_ + h) : nullptr, inputs.floats(dw),
                           of.dw_biases_ > 0 ? inputs.floats(dw + of.heads_) : nullptr});
      }
      p.kernels = kernels.data();
      p.weights = weights.data();
    }
  };

  float scale_;
  int64_t window_height_, window_width_, heads_, qkv_biases_, dw_biases_;
  cpu::Floats packed_memory_;
  PackedHeads packed_{};
};

const Registered registered({"cascaded_group_attention", kAttributes, 1,
                             [](const Attributes& a) -> std::unique_ptr<Operation> {
                               return std::make_unique<CascadedGroupAttention>(a);
                             }});

}  // namespace
}  // namespace effattn::engines
