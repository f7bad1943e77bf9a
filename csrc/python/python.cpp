// effattn._C: facts about this build, the plans of its kernels, and fingerprints. Holds no tensor code.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../kernels/cpu/core/isa.h"
#include "../../kernels/cpu/multi_scale/plan.h"
#include "../../kernels/cpu/relu_linear_attention/plan.h"
#include "fingerprint.h"

namespace py = pybind11;
using namespace effattn;

namespace {

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error("dtype: expected 'float32', 'bfloat16' or 'float16', got '" + name + "'");
}

py::list isas() {
  py::list rows;
  for (const cpu::IsaInfo& row : cpu::compiled_isas()) {
    py::dict entry;
    entry["name"] = row.name;
    entry["lanes"] = row.lanes;
    entry["supported"] = row.supported;
    entry["test_only"] = row.test_only;
    entry["needs"] = row.needs;
    rows.append(entry);
  }
  return rows;
}

py::dict relu_linear_attention_plan(int64_t groups, int64_t queries, int64_t keys, int64_t head_dim,
                                    int64_t value_dim, const std::string& dtype) {
  for (const int64_t size : {groups, queries, keys, head_dim, value_dim}) {
    if (size < 0) throw py::value_error("plan: sizes must be >= 0, got " + std::to_string(size));
  }
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
  out["partial_floats"] = plan.partial_floats;
  out["flops_forward"] = plan.flops_forward;
  out["flops_backward"] = plan.flops_backward;
  out["minimum_bytes_forward"] = plan.minimum_bytes_forward;
  out["minimum_bytes_backward"] = plan.minimum_bytes_backward;
  return out;
}

py::dict multi_scale_plan(int64_t batch, int64_t heads, int64_t head_dim, int64_t height, int64_t width,
                          const std::vector<int64_t>& kernels) {
  for (const int64_t size : {batch, heads, head_dim, height, width}) {
    if (size < 0) throw py::value_error("plan: sizes must be >= 0, got " + std::to_string(size));
  }
  if (kernels.size() > MultiScaleParams::kMaxScales) {
    throw py::value_error("kernels: expected at most " + std::to_string(MultiScaleParams::kMaxScales) +
                          ", got " + std::to_string(kernels.size()));
  }
  MultiScaleParams p{};
  p.dtype = DType::kFloat32;  // plans are the same for all
  p.batch = batch;
  p.heads = heads;
  p.head_dim = head_dim;
  p.height = height;
  p.width = width;
  p.scales = static_cast<int>(kernels.size());
  for (size_t s = 0; s < kernels.size(); ++s) {
    if (kernels[s] < 1 || kernels[s] % 2 == 0) {
      throw py::value_error("kernels: expected odd sizes, got " + std::to_string(kernels[s]));
    }
    p.kernels[s] = kernels[s];
  }
  const cpu::MultiScalePlan plan = cpu::plan(p);
  py::dict out;
  out["isa"] = cpu::info(cpu::active_isa()).name;
  out["rows"] = plan.rows;
  out["scratch_floats"] = plan.scratch_floats;
  out["scratch_floats_backward"] = plan.scratch_floats_backward;
  out["flops_aggregation"] = plan.flops_aggregation;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, instruction sets and kernel plans of effattn.";
  m.attr("build") =
      py::dict(py::arg("compiler") = EFFATTN_COMPILER, py::arg("torch") = EFFATTN_TORCH_VERSION,
               py::arg("architecture") = EFFATTN_ARCHITECTURE, py::arg("sanitizer") = EFFATTN_SANITIZER);
  m.attr("limits") = py::dict(py::arg("scales") = MultiScaleParams::kMaxScales);
  m.def("isas", &isas, "The instruction sets compiled in, from narrow to wide.");
  m.def("active_isa", [] { return std::string(cpu::info(cpu::active_isa()).name); });
  m.def("set_isa", &cpu::set_active_isa, py::arg("name"));
  m.def("is_amd", &cpu::is_amd, "Whether the processor is one of AMD's.");
  bind_fingerprint(m);
  m.def("relu_linear_attention_plan", &relu_linear_attention_plan, py::kw_only(), py::arg("groups"),
        py::arg("queries"), py::arg("keys"), py::arg("head_dim"), py::arg("value_dim"), py::arg("dtype"));
  m.def("multi_scale_plan", &multi_scale_plan, py::kw_only(), py::arg("batch"), py::arg("heads"),
        py::arg("head_dim"), py::arg("height"), py::arg("width"), py::arg("kernels"));
}
