// relu_linear_attention: q (..., N, D), k (..., M, D), v (..., M, Dv) -> (..., N, Dv).
#include "../../kernels/cpu/relu_linear_attention/plan.h"

#include "operation.h"

namespace effattn::engines {
namespace {

constexpr effattn_attribute_spec kAttributes[] = {{"eps", 0, 1}, {nullptr, 0, 0}};

class ReluLinearAttention : public Operation {
 public:
  explicit ReluLinearAttention(const Attributes& attributes) : eps_(attributes.not_negative("eps")) {}

  std::vector<int64_t> shape(const Inputs& inputs) const override {
    inputs.require_count(3);
    const int64_t rank = inputs[0].rank;
    if (rank < 2) inputs.require_rank(0, {"q"}, 2, "(..., N, D)");
    inputs.require_rank(1, {"k"}, rank, "(..., M, D), with as many dimensions as q");
    inputs.require_rank(2, {"v"}, rank, "(..., M, Dv), with as many dimensions as q");
    std::vector<int64_t> out(inputs[0].shape, inputs[0].shape + rank);
    const auto same = [&](int64_t input, const char* name, int64_t dim, int64_t expected) {
      const int64_t size = inputs.size(input, dim);
      if (size >= 0 && expected >= 0 && size != expected)
        fail(inputs.operation(), ": ", name, ": expected size ", expected, " of dimension ", dim, ", got ",
             size);
    };
    for (int64_t dim = 0; dim < rank - 2; ++dim) {
      same(1, "k", dim, out[dim]);
      same(2, "v", dim, out[dim]);
    }
    same(1, "k", rank - 1, out[rank - 1]);
    same(2, "v", rank - 2, inputs.size(1, rank - 2));
    const int64_t channels[] = {out[rank - 1], inputs.size(2, rank - 1)};
    if (channels[0] > kMaxDim || channels[1] > kMaxDim)
      fail(inputs.operation(), ": q, v: expected at most ", kMaxDim, " channels, got ", channels[0], " and ",
           channels[1]);
    out[rank - 1] = channels[1];
    return out;
  }

  void run(const Inputs& inputs, const effattn_tensor& output, const cpu::Parallel& parallel) const override {
    LinearAttentionParams p{};
    const int64_t rank = inputs[0].rank;
    p.dtype = dtype_of(output);
    p.groups = 1;
    for (int64_t dim = 0; dim < rank - 2; ++dim) p.groups *= inputs.size(0, dim);
    int64_t floats = 0;
    p.queries = inputs.size(0, rank - 2);
    p.head_dim = inputs.size(0, rank - 1);
    p.keys = inputs.size(1, rank - 2);
    p.value_dim = output.shape[rank - 1];
    if (__builtin_mul_overflow(p.groups, 4 * p.kv_state_size(), &floats))
      fail(inputs.operation(), ": q: expected leading sizes whose kv_state can be counted");
    p.eps = eps_;
    p.lead_rank = static_cast<int>(rank - 2);
    p.lead_sizes = inputs[0].shape;
    std::vector<int64_t> strides[4];
    p.q = operand(inputs[0], strides[0]);
    p.k = operand(inputs[1], strides[1]);
    p.v = operand(inputs[2], strides[2]);
    p.out = operand(output, strides[3]);
    cpu::forward(p, nullptr, parallel);
  }

 private:
  static Operand operand(const effattn_tensor& t, std::vector<int64_t>& lead_strides) {
    const auto step = [&](int64_t dim) { return t.shape[dim] == 1 ? 1 : stride_of(t, dim); };
    for (int64_t dim = 0; dim < t.rank - 2; ++dim) lead_strides.push_back(stride_of(t, dim));
    return {t.data, lead_strides.data(), step(t.rank - 2), step(t.rank - 1)};
  }

  float eps_;
};

const Registered registered({"relu_linear_attention", kAttributes, 3,
                             [](const Attributes& a) -> std::unique_ptr<Operation> {
                               return std::make_unique<ReluLinearAttention>(a);
                             }});

}  // namespace
}  // namespace effattn::engines
