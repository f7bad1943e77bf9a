// effattn._C: facts about this build, the plans of its kernels, and fingerprints. Holds no tensor code.
#include <pybind11/stl.h>

#include <vector>

#include "../../kernels/cpu/core/isa.h"
#include "module.h"

namespace py = pybind11;
using namespace effattn;

namespace {

std::vector<void (*)(py::module_&)>& all_bindings() {
  static std::vector<void (*)(py::module_&)> all;
  return all;
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

}  // namespace

Bindings::Bindings(void (*add)(py::module_&)) { all_bindings().push_back(add); }

DType effattn::dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error("dtype: expected 'float32', 'bfloat16' or 'float16', got '" + name + "'");
}

void effattn::require_sizes(std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    if (size < 0) throw py::value_error("plan: sizes must be >= 0, got " + std::to_string(size));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, instruction sets and kernel plans of effattn.";
  m.attr("build") =
      py::dict(py::arg("compiler") = EFFATTN_COMPILER, py::arg("torch") = EFFATTN_TORCH_VERSION,
               py::arg("architecture") = EFFATTN_ARCHITECTURE, py::arg("sanitizer") = EFFATTN_SANITIZER);
  m.attr("limits") = py::dict();  // of a call's sizes, by name
  m.def("isas", &isas, "The instruction sets compiled in, from narrow to wide.");
  m.def("active_isa", [] { return std::string(cpu::info(cpu::active_isa()).name); });
  m.def("set_isa", &cpu::set_active_isa, py::arg("name"));
  m.def("is_amd", &cpu::is_amd, "Whether the processor is one of AMD's.");
  for (const auto add : all_bindings()) add(m);
}
