// effattn._C: facts about this build and the plans of its kernels. Holds no tensor code.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../kernels/cpu/isa.h"
#include "../kernels/cpu/multi_scale.h"
#include "../kernels/cpu/relu_linear_attention.h"

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
  ReluLinearAttention p{};
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
  if (kernels.size() > MultiScale::kMaxScales) {
    throw py::value_error("kernels: expected at most " + std::to_string(MultiScale::kMaxScales) + ", got " +
                          std::to_string(kernels.size()));
  }
  MultiScale p{};
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

// --- whether what weights were derived from is as it was ---------------------------------------------
// Objects and attributes only. In Python the walk over a module's thirty parts and sixty tensors takes half
// as long as the kernels whose weights it guards.

bool all_empty(const py::list& dictionaries) {
  for (const py::handle dictionary : dictionaries) {
    if (PyDict_GET_SIZE(dictionary.ptr()) != 0) return false;
  }
  return true;
}

// Whether every module has the class and the number of parts that it had, and no forward of its own.
bool same_modules(const py::list& modules, const py::list& classes, const py::list& attributes,
                  const py::list& parts, const std::vector<Py_ssize_t>& sizes) {
  static PyObject* const forward = PyUnicode_InternFromString("forward");
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyList_GET_ITEM(modules.ptr(), i))) !=
            PyList_GET_ITEM(classes.ptr(), i) ||
        PyDict_GET_SIZE(PyList_GET_ITEM(parts.ptr(), i)) != sizes[i]) {
      return false;
    }
    const int own = PyDict_Contains(PyList_GET_ITEM(attributes.ptr(), i), forward);
    if (own < 0) throw py::error_already_set();
    if (own == 1) return false;
  }
  return true;
}

// Whether every dictionary still has what was found in it under its name.
bool same_items(const py::list& dictionaries, const py::list& names, const py::list& found) {
  for (size_t i = 0; i < dictionaries.size(); ++i) {
    PyObject* const now =
        PyDict_GetItemWithError(PyList_GET_ITEM(dictionaries.ptr(), i), PyList_GET_ITEM(names.ptr(), i));
    if (now == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (now != PyList_GET_ITEM(found.ptr(), i)) return false;
  }
  return true;
}

// Whether every tensor has the version that it had, and lies where it lay.
bool same_tensors(const py::list& tensors, const py::list& versions, const py::list& addresses) {
  static PyObject* const version_name = PyUnicode_InternFromString("_version");
  static PyObject* const address_name = PyUnicode_InternFromString("data_ptr");
  const auto same = [](PyObject* now, PyObject* before) {
    const auto owned = py::reinterpret_steal<py::object>(now);
    if (now == nullptr) throw py::error_already_set();
    const int equal = PyObject_RichCompareBool(now, before, Py_EQ);
    if (equal < 0) throw py::error_already_set();
    return equal == 1;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
    if (!same(PyObject_GetAttr(tensor, version_name), PyList_GET_ITEM(versions.ptr(), i)) ||
        !same(PyObject_CallMethodNoArgs(tensor, address_name), PyList_GET_ITEM(addresses.ptr(), i))) {
      return false;
    }
  }
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, instruction sets and kernel plans of effattn.";
  m.attr("build") =
      py::dict(py::arg("compiler") = EFFATTN_COMPILER, py::arg("torch") = EFFATTN_TORCH_VERSION,
               py::arg("architecture") = EFFATTN_ARCHITECTURE, py::arg("sanitizer") = EFFATTN_SANITIZER);
  m.attr("limits") = py::dict(py::arg("scales") = MultiScale::kMaxScales);
  m.def("isas", &isas, "The instruction sets compiled in, from narrow to wide.");
  m.def("active_isa", [] { return std::string(cpu::info(cpu::active_isa()).name); });
  m.def("set_isa", &cpu::set_active_isa, py::arg("name"));
  m.def("is_amd", &cpu::is_amd, "Whether the processor is one of AMD's.");
  m.def("all_empty", &all_empty, "Whether dictionaries are.");
  m.def("same_modules", &same_modules,
        "Whether modules have these classes and numbers of parts, and no forward of their own.");
  m.def("same_items", &same_items,
        "Whether dictionaries still have what was found in them under these names.");
  m.def("same_tensors", &same_tensors, "Whether tensors have these versions and data_ptr()s.");
  m.def("relu_linear_attention_plan", &relu_linear_attention_plan, py::kw_only(), py::arg("groups"),
        py::arg("queries"), py::arg("keys"), py::arg("head_dim"), py::arg("value_dim"), py::arg("dtype"));
  m.def("multi_scale_plan", &multi_scale_plan, py::kw_only(), py::arg("batch"), py::arg("heads"),
        py::arg("head_dim"), py::arg("height"), py::arg("width"), py::arg("kernels"));
}
