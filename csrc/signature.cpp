#include "signature.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <set>
#include <span>
#include <sstream>
#include <string_view>

namespace effattn {
namespace {

constexpr int kMaxNames = 24;
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
struct Line {
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
  std::span<const Line> arguments, returned;
};

namespace {

using Text = std::string_view;
using Table = Signature::Table;
#include "signatures.inc"  // made by csrc/build.py

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Double:
      return "torch.float64";
    default:
      return "another dtype";
  }
}

std::string number_text(double number) {
  std::ostringstream text;
  if (number == std::floor(number) && std::fabs(number) < 1e15)
    text << static_cast<int64_t>(number);
  else
    text << number;
  return text.str();
}

}  // namespace

Signature::Signature(const char* name) : name_(name) {
  table_ =
      std::find_if(std::begin(kTables), std::end(kTables), [&](const Table& t) { return t.op == name_; });
  if (table_ == std::end(kTables)) fail("effattn/ops has no ", name, ".py with a SIGNATURE");
  if (table_->names.size() > kMaxNames) fail(name_, ": a signature with too many names");
}

// --- a call
// -----------------------------------------------------------------------------------------------------------

class Signature::Check {
 public:
  Check(const std::string& name, const Table& table, Arguments arguments)
      : name_(name), s_(table), arguments_(arguments.begin()) {
    sizes_.fill(kUnknown);
  }

  void all() {
    for (size_t i = 0; i < s_.arguments.size(); ++i) kind(s_.arguments[i], arguments_[i]);
    solve();
    for (size_t i = 0; i < s_.arguments.size(); ++i)
      if (s_.arguments[i].is_list) length(s_.arguments[i], count(arguments_[i]));
    for (size_t i = 0; i < s_.arguments.size(); ++i) {
      const Line& line = s_.arguments[i];
      each(line, arguments_[i], [&](const Tensor& t, const Shape& shape, int element) {
        if (line.is_list) solve(shape, t);  // names that each element may have its own size for
        sizes(line, element, shape, t);
        if (line.is_list) forget_local();
      });
    }
  }

  void like_output(std::string_view argument, const Tensor& t) {
    const Line line{.name = argument};
    tensor(line, -1, s_.returned[0].shapes[0], t);
    sizes(line, -1, s_.returned[0].shapes[0], t);
  }

  void kept(const Line& line, const Tensor& t) {
    Line of = line;
    of.kind = ArgumentKind::kWeight;
    tensor(of, -1, line.shapes[0], t);
    sizes(of, -1, line.shapes[0], t);
    if (!t.is_contiguous()) wrong(line, -1, "expected a contiguous tensor");
  }

 private:
  template <class... Parts>
  [[noreturn]] void wrong(const Line& line, int element, const Parts&... parts) const {
    const std::string at = element < 0 ? "" : "[" + std::to_string(element) + "]";
    fail(name_, ": ", line.name, at, ": ", parts...);
  }

  template <class F>
  void each(const Line& line, const Argument& given, const F& f) {
    if (const auto* const t = std::get_if<const Tensor*>(&given)) {
      if (*t != nullptr) f(**t, line.shapes[0], -1);
      return;
    }
    if (const auto* const list = std::get_if<const std::vector<Tensor>*>(&given)) {
      int element = 0;
      for (const Tensor& t : **list) {
        f(t, line.shape(element), element);
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

  void kind(const Line& line, const Argument& given) {
    if (const auto* const number = std::get_if<double>(&given)) return check_number(line, -1, *number);
    if (const auto* const integer = std::get_if<int64_t>(&given)) {
      if (*integer >= line.minimum && *integer <= line.maximum) return;
      const std::string maximum = std::isinf(line.maximum) ? "" : " and <= " + number_text(line.maximum);
      wrong(line, -1, "expected an int >= ", number_text(line.minimum), maximum, ", got ", *integer);
    }
    if (const auto* const numbers = std::get_if<const std::vector<double>*>(&given)) {
      for (size_t i = 0; i < (*numbers)->size(); ++i) check_number(line, static_cast<int>(i), (**numbers)[i]);
      return;
    }
    each(line, given,
         [&](const Tensor& t, const Shape& shape, int element) { tensor(line, element, shape, t); });
  }

  void check_number(const Line& line, int element, double number) const {
    if (number >= line.minimum && std::isfinite(number)) return;
    const std::string minimum = std::isinf(line.minimum) ? "" : " >= " + number_text(line.minimum);
    const char* const fraction = number == std::floor(number) && std::isfinite(number) ? ".0" : "";
    wrong(line, element, "expected a finite number", minimum, ", got ", number_text(number), fraction);
  }

  void tensor(const Line& line, int element, const Shape& shape, const Tensor& t) {
    const std::string_view of = s_.arguments[0].name;
    if (first_ == nullptr) {
      first_ = &t;
      type_ = t.scalar_type();
      device_index_ = t.get_device_index();
      if (type_ != ScalarType::Float && type_ != ScalarType::BFloat16 && type_ != ScalarType::Half)
        wrong(line, element, "expected float32, bfloat16 or float16 for the ", kBackend, " backend, got ",
              dtype_name(type_));
      if (!is_here(t)) wrong(line, element, "expected a tensor on ", kHere);
    } else {
      const ScalarType type = t.scalar_type();
      if (line.kind == ArgumentKind::kTensor && type != type_)
        wrong(line, element, "expected the dtype of ", of, ", ", dtype_name(type_), ", got ",
              dtype_name(type));
      if (line.kind == ArgumentKind::kWeight && type != ScalarType::Float)
        wrong(line, element, "expected float32, got ", dtype_name(type));
      if (!is_here(t) || t.get_device_index() != device_index_)
        wrong(line, element, "expected the device of ", of);
    }
    const int64_t rank = t.dim(), dims = static_cast<int64_t>(shape.dims.size());
    if (shape.has_leading ? rank >= dims : rank == dims) return;
    wrong(line, element, "expected ", shape.has_leading ? "at least " : "", dims,
          dims == 1 && !shape.has_leading ? " dimension " : " dimensions ", shape.text, ", got shape ",
          shape_text(t));
  }

  void solve() {
    for (size_t i = 0; i < s_.arguments.size(); ++i) {
      const Line& line = s_.arguments[i];
      if (s_.integers[i] >= 0) sizes_[s_.integers[i]] = std::get<int64_t>(arguments_[i]);
      const int64_t length = count(arguments_[i]);
      if (line.is_list && line.kind == ArgumentKind::kWeight && !(line.may_be_empty && length == 0))
        solve(line.length, length);
    }
    for (const Line& line : s_.arguments)
      for (const Term& term : line.length.sum)
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

  void length(const Line& line, int64_t count) const {
    const std::string_view of = line.kind == ArgumentKind::kNumber ? "number" : "tensor";
    if (line.length.positive && count == 0) wrong(line, -1, "expected at least one ", of, ", got none");
    const int64_t expected = value(line.length);
    if (count == expected || (count == 0 && line.may_be_empty)) return;
    const bool has_names = !line.length.sum[0].names.empty();
    const std::string meant = has_names ? " = " + std::to_string(expected) : "";
    wrong(line, -1, "expected ", line.may_be_empty ? "none or " : "", line.length.text, meant, " ", of,
          "s, got ", count);
  }

  void sizes(const Line& line, int element, const Shape& shape, const Tensor& t) const {
    const auto sizes = t.sizes();
    const size_t before = sizes.size() - shape.dims.size();
    bool fits = true;
    for (size_t i = 0; i < shape.dims.size(); ++i) {
      const Dim& dim = shape.dims[i];
      const int64_t size = sizes[before + i];
      if (dim.odd && size % 2 != 1)
        wrong(line, element, "expected an odd ", dim.text, " in ", shape.text, ", got shape ", shape_text(t));
      if (dim.positive && size < 1)
        wrong(line, element, "expected a positive ", dim.text, " in ", shape.text, ", got shape ",
              shape_text(t));
      fits = fits && value(dim) == size;
    }
    if (shape.has_leading) {
      const auto leading = leading_->sizes();
      fits = fits && leading.size() - trailing_ == before;
      for (size_t i = 0; fits && i < before; ++i) fits = sizes[i] == leading[i];
    }
    if (!fits) wrong(line, element, "expected shape ", shape.text, known(shape), ", got ", shape_text(t));
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

void Signature::check(Arguments arguments) const { Check(name_, *table_, arguments).all(); }

void Signature::check_backward(const Tensor& grad_out, Arguments arguments,
                               std::initializer_list<const Tensor*> kept) const {
  Check check(name_, *table_, arguments);
  check.all();
  check.like_output("grad_out", grad_out);
  size_t at = table_->returned.size() - kept.size();
  for (const Tensor* const t : kept) {
    at == 0 ? check.like_output(table_->returned[0].name, *t) : check.kept(table_->returned[at], *t);
    ++at;
  }
}

}  // namespace effattn
