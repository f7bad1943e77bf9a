#include "../../kernels/cpu/multi_scale/plan.h"

#include <pybind11/stl.h>

#include "module.h"

namespace py = pybind11;

namespace effattn {
namespace {

py::dict shown_plan(int64_t batch, int64_t heads, int64_t head_dim, int64_t height, int64_t width,
                    const std::vector<int64_t>& kernels) {
  require_sizes({batch, heads, head_dim, height, width});
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
  return out;
}

const Bindings bindings([](py::module_& m) {
  m.attr("limits")["scales"] = MultiScaleParams::kMaxScales;
  m.def("multi_scale_plan", &shown_plan, py::kw_only(), py::arg("batch"), py::arg("heads"),
        py::arg("head_dim"), py::arg("height"), py::arg("width"), py::arg("kernels"));
});

}  // namespace
}  // namespace effattn
