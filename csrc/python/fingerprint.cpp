// Whether modules and their tensors are as they were: what effattn/nn/fold_cache.py asks on every call.
#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "module.h"

namespace py = pybind11;

namespace effattn {
namespace {

// --- what Python and torch count ------------------------------------------------------------------------
// Objects and attributes only: in Python the walk over a cascade's thirty modules and sixty tensors takes
// half as long as its kernel. Lists are handed in on every call, because only Python's own containers are
// seen by the garbage collector, and a module may refer to whoever keeps its fingerprint.

bool is_item(const py::list& list, size_t i, PyObject* object) {
  return PyList_GET_ITEM(list.ptr(), i) == object;
}

PyObject* item(const py::list& list, size_t i) { return PyList_GET_ITEM(list.ptr(), i); }

// Whether each dictionary is empty or not, as it was.
bool same_emptiness(const py::list& dictionaries, const py::list& were_empty) {
  const size_t n = dictionaries.size();
  for (size_t i = 0; i < n; ++i) {
    if ((PyDict_GET_SIZE(item(dictionaries, i)) == 0) != (item(were_empty, i) == Py_True)) return false;
  }
  return true;
}

// Whether every module has the class that it had, and every dictionary as many entries.
bool same_modules(const py::list& modules, const py::list& classes, const py::list& dictionaries,
                  const py::list& sizes) {
  const size_t n = modules.size(), n_dictionaries = dictionaries.size();
  for (size_t i = 0; i < n; ++i) {
    if (!is_item(classes, i, reinterpret_cast<PyObject*>(Py_TYPE(item(modules, i))))) return false;
  }
  for (size_t i = 0; i < n_dictionaries; ++i) {
    if (PyDict_GET_SIZE(item(dictionaries, i)) != PyLong_AsSsize_t(item(sizes, i))) return false;
  }
  return true;
}

// Whether every dictionary still has the object that was found in it under its name.
bool same_items(const py::list& dictionaries, const py::list& names, const py::list& found) {
  const size_t n = names.size();
  for (size_t i = 0; i < n; ++i) {
    PyObject* const now = PyDict_GetItemWithError(item(dictionaries, i), item(names, i));
    if (now == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (now != item(found, i)) return false;
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
  const size_t n = tensors.size();
  for (size_t i = 0; i < n; ++i) {
    if (!same(PyObject_GetAttr(item(tensors, i), version_name), item(versions, i)) ||
        !same(PyObject_CallMethodNoArgs(item(tensors, i), address_name), item(addresses, i))) {
      return false;
    }
  }
  return true;
}

// --- what nobody counts -----------------------------------------------------------------------------------

// What tensors in memory held. On every call, elements: one a row and a column (along diagonals) sees what is
// written through ``.data`` to a whole tensor, a filter or a channel. If asked for, a
// checksum of all.
class Contents {
 public:
  // (address, sizes, strides in elements, bytes of an element); memory must outlive this.
  using Tensor = std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, int64_t>;

  Contents(const std::vector<Tensor>& tensors, int64_t max_elements, bool with_checksum) {
    int64_t wanted = 0;
    for (const auto& [address, sizes, strides, width] : tensors) wanted += diagonal(sizes);
    const int64_t least_step =
        std::max<int64_t>(1, (wanted + max_elements - 1) / std::max<int64_t>(max_elements, 1));
    for (const auto& [address, sizes, strides, width] : tensors) {
      if (width != 1 && width != 2 && width != 4 && width != 8 && width != 16) {
        throw py::value_error("width: expected 1, 2, 4, 8 or 16 bytes, got " + std::to_string(width));
      }
      if (sizes.size() != strides.size()) throw py::value_error("sizes and strides must be as many");
      if (diagonal(sizes) == 0) continue;
      const char* const data = reinterpret_cast<const char*>(address);
      // Where a tensor is not dense, what lies between its elements counts too: at worst a change of nothing.
      int64_t last = 0;
      for (size_t dim = 0; dim < sizes.size(); ++dim) last += (sizes[dim] - 1) * strides[dim];
      ranges_.push_back({data, static_cast<size_t>(width * (last + 1))});
      // No divisor of a size, or rows would be left out by a pattern.
      int64_t step = least_step;
      while (step > 1 && (std::gcd(step, rows(sizes)) > 1 || std::gcd(step, columns(sizes)) > 1)) ++step;
      // A complex number of 16 bytes by its first half.
      Run run{static_cast<int>(std::min<int64_t>(width, 8)), elements_.size(), 0};
      for (int64_t k = 0; k < diagonal(sizes); k += step) {
        elements_.push_back(data + width * offset(k, sizes, strides));
      }
      run.end = elements_.size();
      runs_.push_back(run);
    }
    bits_.resize(elements_.size());
    for (const Run& run : runs_) visit(run, [this](size_t i, uint64_t bits) { bits_[i] = bits; });
    if (with_checksum) checksum_ = checksum();
  }

  bool sample_holds() const {
    uint64_t changed = 0;
    for (const Run& run : runs_) {
      visit(run, [&](size_t i, uint64_t bits) { changed |= bits ^ bits_[i]; });
      if (changed != 0) return false;
    }
    return true;
  }

  bool hold() const { return checksum_.has_value() && checksum() == *checksum_; }

  size_t sample_size() const { return elements_.size(); }

 private:
  struct Run {
    int width;
    size_t begin, end;
  };
  struct Range {
    const char* data;
    size_t bytes;
  };

  static int64_t rows(const std::vector<int64_t>& sizes) { return sizes.empty() ? 1 : sizes[0]; }
  static int64_t columns(const std::vector<int64_t>& sizes) {
    return sizes.empty() ? 1
                         : std::accumulate(sizes.begin() + 1, sizes.end(), int64_t{1}, std::multiplies<>());
  }
  static int64_t diagonal(const std::vector<int64_t>& sizes) {
    return rows(sizes) * columns(sizes) == 0 ? 0 : std::max(rows(sizes), columns(sizes));
  }
  // Of element k of the diagonal, which goes on at the first row or column when it leaves the last.
  static int64_t offset(int64_t k, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    int64_t at = sizes.empty() ? 0 : k % rows(sizes) * strides[0];
    int64_t column = k % columns(sizes);
    for (size_t dim = sizes.size(); dim-- > 1;) {
      at += column % sizes[dim] * strides[dim];
      column /= sizes[dim];
    }
    return at;
  }

  // In four chains that a processor follows side by side. A step can be undone, so one changed word always
  // shows.
  uint64_t checksum() const {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;
    uint64_t chains[4] = {1, 2, 3, 4};
    for (const Range& range : ranges_) {
      size_t i = 0;
      for (; i + sizeof(chains) <= range.bytes; i += sizeof(chains)) {
        uint64_t words[4];
        std::memcpy(words, range.data + i, sizeof(words));
        for (int c = 0; c < 4; ++c) chains[c] = (std::rotl(chains[c], 23) ^ words[c]) * kOdd;
      }
      for (; i < range.bytes; ++i) {
        chains[0] = (std::rotl(chains[0], 23) ^ static_cast<unsigned char>(range.data[i])) * kOdd;
      }
    }
    uint64_t all = 0;
    for (const uint64_t chain : chains) all = (std::rotl(all, 23) ^ chain) * kOdd;
    return all;
  }

  template <class Bits, class Function>
  void visit_as(const Run& run, Function function) const {
    for (size_t i = run.begin; i < run.end; ++i) {
      Bits bits;
      std::memcpy(&bits, elements_[i], sizeof(Bits));
      function(i, bits);
    }
  }

  template <class Function>
  void visit(const Run& run, Function function) const {
    switch (run.width) {
      case 1:
        return visit_as<uint8_t>(run, function);
      case 2:
        return visit_as<uint16_t>(run, function);
      case 4:
        return visit_as<uint32_t>(run, function);
      default:
        return visit_as<uint64_t>(run, function);
    }
  }

  std::vector<const char*> elements_;
  std::vector<uint64_t> bits_;
  std::vector<Run> runs_;
  std::vector<Range> ranges_;
  std::optional<uint64_t> checksum_;
};

const Bindings bindings([](py::module_& m) {
  m.def("same_emptiness", &same_emptiness, "Whether dictionaries are empty or not, as they were.");
  m.def("same_modules", &same_modules,
        "Whether modules have these classes, and dictionaries so many entries.");
  m.def("same_items", &same_items,
        "Whether dictionaries still have what was found in them under these names.");
  m.def("same_tensors", &same_tensors, "Whether tensors have these versions and data_ptr()s.");
  py::class_<Contents>(m, "Contents", "What tensors in memory held.")
      .def(py::init<const std::vector<Contents::Tensor>&, int64_t, bool>(), py::arg("tensors"),
           py::arg("max_elements"), py::arg("with_checksum"))
      .def("sample_holds", &Contents::sample_holds, "Whether some elements are as they were, bit by bit.")
      .def("hold", &Contents::hold,
           "Whether all bytes are as they were, by the checksum; no if there is none.")
      .def_property_readonly("sample_size", &Contents::sample_size, "The number of elements of the sample.");
});

}  // namespace

}  // namespace effattn
