#include "../../kernels/cpu/relu_linear_attention/plan.h"

#include "module.h"

namespace py = pybind11;

namespace effattn {
namespace {

py::dict shown_plan(int64_t groups, int64_t queries, int64_t keys, int64_t head_dim, int64_t value_dim,
                    const std::string& dtype) {
  require_sizes({groups, queries, keys, head_dim, value_dim});
  LinearAttentionParams p{};
  p.dtype = dtype_named(dtype);
  p.groups = groups;
  p.queries = queries;
  p.keys = keys;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  const cpu::ReluLinearAttentionPlan plan = cpu::plan(p, cpu::active_isa());
  py::dict out;
  out["isa"] = cpu::info(cpu::active_isa()).name;
  out["chunk"] = plan.chunk;
  out["tile"] = plan.tile;
  out["scratch_floats"] = plan.scratch_floats;
  return out;
}

const Bindings bindings([](py::module_& m) {
  m.attr("limits")["channels"] = kMaxDim;
  m.def("relu_linear_attention_plan", &shown_plan, py::kw_only(), py::arg("groups"), py::arg("queries"),
        py::arg("keys"), py::arg("head_dim"), py::arg("value_dim"), py::arg("dtype"));
});

}  // namespace
}  // namespace effattn
