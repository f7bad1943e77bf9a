#include "signature.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <set>
#include <span>
#include <string_view>

#include "names.h"

namespace effattn {
namespace {

constexpr int64_t kUnknown = -1;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A sum of products of names.
struct Term {
  int64_t factor;
  std::span<const int> names;
};
struct Dim {
  std::string_view text;
  std::span<const Term> sum;
  bool odd = false, positive = false;
};
struct Shape {
  std::string_view text;
  std::span<const Dim> dims;
  bool has_leading = false;
};
enum class ArgumentKind { kTensor, kWeight, kInteger, kNumber };
struct ArgumentSpec {
  std::string_view name;
  ArgumentKind kind = ArgumentKind::kTensor;
  std::span<const Shape> shapes{};
  bool is_list = false, may_be_empty = false;
  Dim length{};
  double minimum = -kInfinity, maximum = kInfinity;

  const Shape& shape(size_t element) const { return shapes[element % shapes.size()]; }
};

}  // namespace

struct Signature::Table {
  std::string_view op;
  std::span<const std::string_view> names;  // of sizes
  std::span<const bool> is_local;  // of each: whether it may differ from element to element of a list
  std::span<const int> integers;   // of each argument: the name that it is itself, or -1
  std::span<const ArgumentSpec> arguments, returned;
};

namespace {

using Text = std::string_view;
using Table = Signature::Table;
#include "signatures.inc"  // made by csrc/build.py

constexpr size_t kMaxNames = [] {  // of any operator
  size_t most = 0;
  for (const Table& table : kTables) most = std::max(most, table.names.size());
  return most;
}();

// An end of an option's range, which is an integer.
std::string end_text(double end) { return std::to_string(static_cast<int64_t>(end)); }

}  // namespace

Signature::Signature(const char* name) : name_(name) {
  table_ =
      std::find_if(std::begin(kTables), std::end(kTables), [&](const Table& t) { return t.op == name_; });
}

// Not in the constructor: an exception while the library is loaded would end the process.
const Signature::Table& Signature::table() const {
  if (table_ == std::end(kTables)) fail("effattn/ops has no ", name_, ".py with a SIGNATURE");
  return *table_;
}

// --- a call
// -----------------------------------------------------------------------------------------------------------

class Signature::Check {
 public:
  Check(const std::string& name, const Table& table, Arguments arguments)
      : name_(name), s_(table), arguments_(arguments.begin()) {
    sizes_.fill(kUnknown);
  }

  void check_all() {
    for (size_t i = 0; i < s_.arguments.size(); ++i) check_kind(s_.arguments[i], arguments_[i]);
    solve();
    for (size_t i = 0; i < s_.arguments.size(); ++i)
      if (s_.arguments[i].is_list) check_length(s_.arguments[i], count(arguments_[i]));
    for (size_t i = 0; i < s_.arguments.size(); ++i) {
      const ArgumentSpec& spec = s_.arguments[i];
      each(spec, arguments_[i], [&](const Tensor& t, const Shape& shape, int element) {
        if (spec.is_list) solve(shape, t);  // names that each element may have its own size for
        check_sizes(spec, element, shape, t);
        if (spec.is_list) forget_local();
      });
    }
  }

  void check_like_output(std::string_view argument, const Tensor& t) {
    const ArgumentSpec spec{.name = argument};
    check_tensor(spec, -1, s_.returned[0].shapes[0], t);
    check_sizes(spec, -1, s_.returned[0].shapes[0], t);
  }

  void check_kept(const ArgumentSpec& spec, const Tensor& t) {
    ArgumentSpec of = spec;
    of.kind = ArgumentKind::kWeight;
    check_tensor(of, -1, spec.shapes[0], t);
    check_sizes(of, -1, spec.shapes[0], t);
    if (!t.is_contiguous())
      wrong(spec, -1, "expected a contiguous tensor, got strides ", sizes_text(t.strides()));
  }

 private:
  template <class... Parts>
  [[noreturn]] void wrong(const ArgumentSpec& spec, int element, const Parts&... parts) const {
    const std::string at = element < 0 ? "" : "[" + std::to_string(element) + "]";
    fail(name_, ": ", spec.name, at, ": ", parts...);
  }

  template <class F>
  void each(const ArgumentSpec& spec, const Argument& given, const F& f) {
    if (const auto* const t = std::get_if<const Tensor*>(&given)) {
      if (*t != nullptr) f(**t, spec.shapes[0], -1);
      return;
    }
    if (const auto* const list = std::get_if<const std::vector<Tensor>*>(&given)) {
      int element = 0;
      for (const Tensor& t : **list) {
        f(t, spec.shape(element), element);
        ++element;
      }
    }
  }

  static int64_t count(const Argument& given) {
    if (const auto* const list = std::get_if<const std::vector<Tensor>*>(&given))
      return static_cast<int64_t>((*list)->size());
    const auto* const numbers = std::get_if<const std::vector<double>*>(&given);
    return numbers == nullptr ? 0 : static_cast<int64_t>((*numbers)->size());
  }

  void check_kind(const ArgumentSpec& spec, const Argument& given) {
    if (const auto* const number = std::get_if<double>(&given)) return check_number(spec, -1, *number);
    if (const auto* const integer = std::get_if<int64_t>(&given)) {
      if (*integer >= spec.minimum && *integer <= spec.maximum) return;
      const std::string maximum = std::isinf(spec.maximum) ? "" : " and <= " + end_text(spec.maximum);
      wrong(spec, -1, "expected an int >= ", end_text(spec.minimum), maximum, ", got ", *integer);
    }
    if (const auto* const numbers = std::get_if<const std::vector<double>*>(&given)) {
      for (size_t i = 0; i < (*numbers)->size(); ++i) check_number(spec, static_cast<int>(i), (**numbers)[i]);
      return;
    }
    each(spec, given,
         [&](const Tensor& t, const Shape& shape, int element) { check_tensor(spec, element, shape, t); });
  }

  void check_number(const ArgumentSpec& spec, int element, double number) const {
    if (number >= spec.minimum && fits_float(number)) return;
    const std::string minimum = std::isinf(spec.minimum) ? "" : " >= " + end_text(spec.minimum);
    wrong(spec, element, "expected a finite float32", minimum, ", got ", number_text(number));
  }

  void check_tensor(const ArgumentSpec& spec, int element, const Shape& shape, const Tensor& t) {
    // None, and a list's sparse tensor, come through torch's dispatcher.
    if (!t.defined()) wrong(spec, element, "expected a torch.Tensor, got NoneType");
    if (layout_of(t) != aoti_torch_layout_strided())
      wrong(spec, element, "expected a dense (strided) tensor, got layout ", layout_name(t));
    const std::string_view of = s_.arguments[0].name;
    if (first_ == nullptr) {
      first_ = &t;
      type_ = t.scalar_type();
      device_index_ = t.get_device_index();
      if (type_ != ScalarType::Float && type_ != ScalarType::BFloat16 && type_ != ScalarType::Half)
        wrong(spec, element, "expected float32, bfloat16 or float16, got ", dtype_name(type_));
      if (!is_here(t)) wrong(spec, element, "expected a tensor on ", kHere, ", got ", device_name(t));
    } else {
      const ScalarType type = t.scalar_type();
      if (spec.kind == ArgumentKind::kTensor && type != type_)
        wrong(spec, element, "expected the dtype of ", of, ", ", dtype_name(type_), ", got ",
              dtype_name(type));
      if (spec.kind == ArgumentKind::kWeight && type != ScalarType::Float)
        wrong(spec, element, "expected float32, got ", dtype_name(type));
      if (!is_here(t) || t.get_device_index() != device_index_)
        wrong(spec, element, "expected the device of ", of, ", ", device_name(*first_), ", got ",
              device_name(t));
    }
    const int64_t rank = t.dim(), dims = static_cast<int64_t>(shape.dims.size());
    if (shape.has_leading ? rank >= dims : rank == dims) return;
    wrong(spec, element, "expected ", shape.has_leading ? "at least " : "", dims,
          dims == 1 && !shape.has_leading ? " dimension " : " dimensions ", shape.text, ", got shape ",
          shape_text(t));
  }

  void solve() {
    for (size_t i = 0; i < s_.arguments.size(); ++i) {
      const ArgumentSpec& spec = s_.arguments[i];
      if (s_.integers[i] >= 0) sizes_[s_.integers[i]] = std::get<int64_t>(arguments_[i]);
      const int64_t length = count(arguments_[i]);
      if (spec.is_list && spec.kind == ArgumentKind::kWeight && !(spec.may_be_empty && length == 0))
        solve(spec.length, length);
    }
    for (const ArgumentSpec& spec : s_.arguments)
      for (const Term& term : spec.length.sum)
        for (const int name : term.names)
          if (sizes_[name] == kUnknown) sizes_[name] = 0;
    for (size_t i = 0; i < s_.arguments.size(); ++i) {
      each(s_.arguments[i], arguments_[i], [&](const Tensor& t, const Shape& shape, int) {
        solve(shape, t);
        if (s_.arguments[i].is_list) forget_local();
      });
    }
  }

  void solve(const Shape& shape, const Tensor& t) {
    if (shape.has_leading && leading_ == nullptr) leading_ = &t, trailing_ = shape.dims.size();
    const auto sizes = t.sizes();  // once: each question is a call into torch
    const size_t before = sizes.size() - shape.dims.size();
    for (size_t i = 0; i < shape.dims.size(); ++i) solve(shape.dims[i], sizes[before + i]);
  }

  void solve(const Dim& dim, int64_t size) {
    if (dim.sum.size() != 1) return;
    const Term& term = dim.sum[0];
    int unknown = -1;
    int64_t known = term.factor;
    for (const int name : term.names) {
      if (sizes_[name] != kUnknown) {
        if (__builtin_mul_overflow(known, sizes_[name], &known)) return;
      } else if (unknown >= 0) {
        return;
      } else {
        unknown = name;
      }
    }
    if (unknown >= 0 && known > 0 && size % known == 0) sizes_[unknown] = size / known;
  }

  void forget_local() {
    for (size_t i = 0; i < s_.is_local.size(); ++i)
      if (s_.is_local[i]) sizes_[i] = kUnknown;
  }

  // kUnknown where a name has no size, or where it is beyond any.
  int64_t value(const Dim& dim) const {
    int64_t total = 0;
    for (const Term& term : dim.sum) {
      int64_t product = term.factor;
      for (const int name : term.names) {
        if (sizes_[name] == kUnknown || __builtin_mul_overflow(product, sizes_[name], &product))
          return kUnknown;
      }
      if (__builtin_add_overflow(total, product, &total)) return kUnknown;
    }
    return total;
  }

  void check_length(const ArgumentSpec& spec, int64_t count) const {
    const std::string_view of = spec.kind == ArgumentKind::kNumber ? "number" : "tensor";
    if (spec.length.positive && count == 0) wrong(spec, -1, "expected at least one ", of, ", got none");
    const int64_t expected = value(spec.length);
    if (count == expected || (count == 0 && spec.may_be_empty)) return;
    const bool has_names = !spec.length.sum[0].names.empty();
    const std::string meant = has_names ? " = " + std::to_string(expected) : "";
    wrong(spec, -1, "expected ", spec.may_be_empty ? "none or " : "", spec.length.text, meant, " ", of,
          "s, got ", count);
  }

  void check_sizes(const ArgumentSpec& spec, int element, const Shape& shape, const Tensor& t) const {
    const auto sizes = t.sizes();
    const size_t before = sizes.size() - shape.dims.size();
    bool fits = true;
    for (size_t i = 0; i < shape.dims.size(); ++i) {
      const Dim& dim = shape.dims[i];
      const int64_t size = sizes[before + i];
      if (dim.odd && size % 2 != 1)
        wrong(spec, element, "expected an odd ", dim.text, " in ", shape.text, ", got shape ", shape_text(t));
      if (dim.positive && size < 1)
        wrong(spec, element, "expected a positive ", dim.text, " in ", shape.text, ", got shape ",
              shape_text(t));
      fits = fits && value(dim) == size;
    }
    if (shape.has_leading) {
      const auto leading = leading_->sizes();
      fits = fits && leading.size() - trailing_ == before;
      for (size_t i = 0; fits && i < before; ++i) fits = sizes[i] == leading[i];
    }
    if (!fits) wrong(spec, element, "expected shape ", shape.text, known(shape), ", got ", shape_text(t));
  }

  std::string known(const Shape& shape) const {
    std::string text;
    const auto add = [&](std::string_view name, const std::string& value) {
      text += (text.empty() ? " with " : ", ") + std::string(name) + " = " + value;
    };
    if (shape.has_leading) {
      std::string leading;
      for (int64_t i = 0; i + static_cast<int64_t>(trailing_) < leading_->dim(); ++i)
        leading += (i ? ", " : "") + std::to_string(leading_->size(i));
      add("...", "(" + leading + ")");
    }
    std::set<int> seen;
    for (const Dim& dim : shape.dims)
      for (const Term& term : dim.sum)
        for (const int name : term.names)
          if (sizes_[name] != kUnknown && seen.insert(name).second)
            add(s_.names[name], std::to_string(sizes_[name]));
    return text;
  }

  const std::string& name_;
  const Table& s_;
  const Argument* arguments_;
  std::array<int64_t, kMaxNames> sizes_;
  const Tensor* first_ = nullptr;
  ScalarType type_ = ScalarType::Undefined;  // of the first
  int32_t device_index_ = 0;
  const Tensor* leading_ = nullptr;  // whose leading sizes all have
  size_t trailing_ = 0;              // its other dimensions
};

void Signature::check(Arguments arguments) const { Check(name_, table(), arguments).check_all(); }

void Signature::check_backward(const Tensor& grad_out, Arguments arguments,
                               std::initializer_list<const Tensor*> kept) const {
  Check check(name_, table(), arguments);
  check.check_all();
  check.check_like_output("grad_out", grad_out);
  size_t at = table().returned.size() - kept.size();
  for (const Tensor* const t : kept) {
    at == 0 ? check.check_like_output(table().returned[0].name, *t)
            : check.check_kept(table().returned[at], *t);
    ++at;
  }
}

}  // namespace effattn
