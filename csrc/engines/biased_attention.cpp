// biased_attention: q (B, heads, N, D), k (B, heads, M, D), v (B, heads, M, Dv) -> (B, heads, N, Dv). Inputs
// behind v: bias (heads, N, M), then the four of talking_heads if there are any.
#include "../../kernels/cpu/biased_attention/plan.h"

#include "operation.h"

namespace effattn::engines {
namespace {

constexpr effattn_attribute_spec kAttributes[] = {{"scale", 0, 1}, {"talking_heads", 1, 0}, {nullptr, 0, 0}};

class BiasedAttention : public Operation {
 public:
  explicit BiasedAttention(const Attributes& a)
      : scale_(a.finite("scale")), mix_(a.integer("talking_heads", 4)) {
    if (mix_ != 0 && mix_ != 4) fail("biased_attention: talking_heads: expected none or 4, got ", mix_);
  }

  std::vector<int64_t> shape(const Inputs& inputs) const override {
    inputs.require_count(4 + mix_);
    inputs.require_rank(0, {"q"}, 4, "(B, heads, N, D)");
    inputs.require_rank(1, {"k"}, 4, "(B, heads, M, D)");
    inputs.require_rank(2, {"v"}, 4, "(B, heads, M, Dv)");
    const int64_t batch = inputs.size(0, 0), heads = inputs.size(0, 1), queries = inputs.size(0, 2);
    const int64_t keys = inputs.size(1, 2), dim = inputs.size(0, 3), value_dim = inputs.size(2, 3);
    inputs.require_shape(1, {"k"}, {batch, heads, keys, dim});
    inputs.require_shape(2, {"v"}, {batch, heads, keys, value_dim});
    inputs.require_shape(3, {"bias"}, {heads, queries, keys});
    if (dim > kMaxDim || value_dim > kMaxDim)
      fail(inputs.operation(), ": q, v: expected at most ", kMaxDim, " channels, got ", dim, " and ",
           value_dim);
    for (int64_t i = 0; i < mix_; ++i) {
      const Name name{"talking_heads", i};
      i % 2 == 0 ? inputs.require_shape(4 + i, name, {heads, heads})
                 : inputs.require_shape(4 + i, name, {heads});
    }
    return {batch, heads, queries, value_dim};
  }

  void run(const Inputs& inputs, const effattn_tensor& output, const cpu::Parallel& parallel) const override {
    BiasedAttentionParams p{};
    const int64_t heads = inputs.size(0, 1), queries = inputs.size(0, 2), keys = inputs.size(1, 2);
    p.dtype = dtype_of(output);
    p.batch = inputs.size(0, 0);
    p.heads = {heads,   queries,        keys, inputs.size(0, 3), inputs.size(2, 3), scale_,
               nullptr, queries * keys, {}};
    p.heads.bias = inputs.floats(3);
    if (mix_ > 0) p.heads.mix = {inputs.floats(4), inputs.floats(5), inputs.floats(6), inputs.floats(7)};
    p.q = operand(inputs[0]);
    p.k = operand(inputs[1]);
    p.v = operand(inputs[2]);
    p.out = operand(output);
    cpu::biased_attention(p, parallel);
  }

 private:
  static HeadsOperand operand(const effattn_tensor& t) {
    return {t.data, stride_of(t, 0), stride_of(t, 1), stride_of(t, 2), t.shape[3] == 1 ? 1 : stride_of(t, 3)};
  }

  float scale_;
  int64_t mix_;
};

const Registered registered({"biased_attention", kAttributes, 3,
                             [](const Attributes& a) -> std::unique_ptr<Operation> {
                               return std::make_unique<BiasedAttention>(a);
                             }});

}  // namespace
}  // namespace effattn::engines
