#include "signature.h"

#include <cctype>
#include <cmath>
#include <set>
#include <sstream>
#include <utility>

#include "signatures.h"  // made by csrc/build.py

namespace effattn {
namespace {

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

std::string trimmed(const std::string& text) {
  const size_t from = text.find_first_not_of(' ');
  return from == std::string::npos ? "" : text.substr(from, text.find_last_not_of(' ') + 1 - from);
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

// --- parsing: once, when the library is loaded
// ----------------------------------------------------------------------

class Signature::Parser {
 public:
  explicit Parser(Signature& to) : to_(to) {}

  void parse(const char* text) {
    std::istringstream lines(text);
    bool is_taken = true;
    for (std::string line; std::getline(lines, line);) {
      line = trimmed(line);
      if (line == "->")
        is_taken = false;
      else if (!line.empty())
        (is_taken ? to_.arguments_ : to_.returned_).push_back(parsed(line));
    }
    find_local_names();
  }

 private:
  Line parsed(const std::string& text) {
    Line line;
    size_t at = text.find(' ');
    line.name = text.substr(0, at);
    std::string rest = trimmed(text.substr(at));
    at = rest.find_first_of(" [(");
    std::string kind = rest.substr(0, at);
    rest = at == std::string::npos ? "" : rest.substr(at);
    if (!rest.empty() && rest[0] == '[') {
      const size_t end = rest.find(']');
      line.is_list = true;
      line.length = dim(rest.substr(1, end - 1));
      rest = rest.substr(end + 1);
      line.may_be_empty = !rest.empty() && rest[0] == '?';
      if (line.may_be_empty) rest = rest.substr(1);
      kind.pop_back();
    }
    if (!kind.empty() && kind.back() == '?') line.may_be_empty = true, kind.pop_back();
    line.is_kept = kind == "kept";
    line.is_alone = kind == "alone";
    line.kind = kind == "weight"    ? Kind::kWeight
                : kind == "integer" ? Kind::kInteger
                : kind == "number"  ? Kind::kNumber
                                    : Kind::kTensor;
    rest = trimmed(rest);
    if (rest.rfind(">=", 0) == 0) {
      line.least = std::stod(rest.substr(2));
    } else if (line.kind == Kind::kInteger && rest.find("..") != std::string::npos) {
      line.least = std::stod(rest.substr(0, rest.find("..")));
      line.most = std::stod(rest.substr(rest.find("..") + 2));
    } else {
      for (size_t from = rest.find('('); from != std::string::npos; from = rest.find('(', from)) {
        size_t to = from;
        for (int depth = 0; to < rest.size(); ++to) {
          depth += rest[to] == '(' ? 1 : rest[to] == ')' ? -1 : 0;
          if (depth == 0) break;
        }
        line.shapes.push_back(shape(rest.substr(from + 1, to - from - 1)));
        from = to;
      }
    }
    return line;
  }

  Shape shape(const std::string& text) {
    Shape shape;
    shape.text = "(";
    for (size_t from = 0; from <= text.size();) {
      const size_t to = text.find(", ", from) == std::string::npos ? text.size() : text.find(", ", from);
      const std::string part = trimmed(text.substr(from, to - from));
      if (shape.text.size() > 1) shape.text += ", ";
      if (part == "...") {
        shape.has_leading = true;
        shape.text += part;
      } else {
        shape.dims.push_back(dim(part));
        shape.text += shape.dims.back().text;
      }
      from = to + 2;
    }
    shape.text += ")";
    return shape;
  }

  Dim dim(std::string text) {
    Dim dim;
    dim.odd = text.rfind("odd ", 0) == 0;
    dim.positive = text.rfind("positive ", 0) == 0;
    if (dim.odd || dim.positive) text = text.substr(text.find(' ') + 1);
    dim.text = trimmed(text);
    size_t at = 0;
    dim.sum = sum(dim.text, at);
    return dim;
  }

  static char next(const std::string& text, size_t& at) {
    while (at < text.size() && text[at] == ' ') ++at;
    return at < text.size() ? text[at] : '\0';
  }

  std::vector<Term> sum(const std::string& text, size_t& at) {
    std::vector<Term> total = product(text, at);
    while (next(text, at) == '+') {
      ++at;
      for (Term& term : product(text, at)) total.push_back(std::move(term));
    }
    return total;
  }

  std::vector<Term> product(const std::string& text, size_t& at) {
    std::vector<Term> result{{1, {}}};
    while (true) {
      std::vector<Term> factor;
      if (next(text, at) == '(') {
        factor = sum(text, ++at);
        ++at;
      } else {
        const size_t from = at;
        while (at < text.size() && (std::isalnum(text[at]) || text[at] == '_')) ++at;
        const std::string word = text.substr(from, at - from);
        if (std::isdigit(word.at(0)))
          factor = {{std::stoll(word), {}}};
        else
          factor = {{1, {name(word)}}};
      }
      std::vector<Term> terms;
      for (const Term& a : result) {
        for (const Term& b : factor) {
          terms.push_back({a.factor * b.factor, a.names});
          terms.back().names.insert(terms.back().names.end(), b.names.begin(), b.names.end());
        }
      }
      result = std::move(terms);
      if (next(text, at) != '*') return result;
      ++at;
    }
  }

  int name(const std::string& word) {
    for (size_t i = 0; i < to_.names_.size(); ++i)
      if (to_.names_[i] == word) return static_cast<int>(i);
    if (to_.names_.size() == kMaxNames) fail(to_.name_, ": a signature with too many names");
    to_.names_.push_back(word);
    return static_cast<int>(to_.names_.size()) - 1;
  }

  void find_local_names() {
    const size_t count = to_.names_.size();
    std::vector<std::set<std::string>> stands_in(count);
    std::vector<bool> in_list(count, true), bound(count, false);
    for (const Line& line : to_.arguments_) {
      int itself = -1;
      for (size_t i = 0; line.kind == Kind::kInteger && i < count; ++i)
        if (to_.names_[i] == line.name) itself = static_cast<int>(i);
      to_.integers_.push_back(itself);
      if (itself >= 0) bound[itself] = true;
      for (const Term& term : line.length.sum)
        for (const int name : term.names) bound[name] = true;
      for (const Shape& shape : line.shapes) {
        for (const Dim& dim : shape.dims) {
          for (const Term& term : dim.sum) {
            for (const int name : term.names) {
              stands_in[name].insert(line.name);
              in_list[name] = in_list[name] && line.is_list;
            }
          }
        }
      }
    }
    for (size_t i = 0; i < count; ++i)
      to_.is_local_.push_back(stands_in[i].size() == 1 && in_list[i] && !bound[i]);
  }

  Signature& to_;
};

Signature::Signature(const char* name) : name_(name) {
  for (const auto& [known, text] : kSignatures) {
    if (name_ != known) continue;
    Parser(*this).parse(text);
    return;
  }
  fail("effattn/ops has no ", name, ".py with a SIGNATURE");
}

std::vector<std::string> Signature::schemas() const {
  std::string tensors, options, gradients, kept, taken_back;
  const auto add = [](std::string& to, const std::string& type, const std::string& name) {
    to += (to.empty() ? "" : ", ") + type + " " + name;
  };
  for (const Line& line : arguments_) {
    if (line.kind == Kind::kInteger || line.kind == Kind::kNumber) {
      const char* const type = line.kind == Kind::kInteger ? "int" : line.is_list ? "float[]" : "float";
      add(options, type, line.name);
      continue;
    }
    const std::string type = line.is_list ? "Tensor[]" : "Tensor";
    add(tensors, may_be_none(line) ? type + "?" : type, line.name);
    add(gradients, line.is_list ? "Tensor[]" : "Tensor", "grad_" + line.name);
  }
  for (size_t i = 1; i < returned_.size(); ++i) add(kept, "Tensor", returned_[i].name);
  for (size_t i = returned_[0].is_kept ? 0 : 1; i < returned_.size(); ++i)
    add(taken_back, "Tensor", returned_[i].name);
  const std::string& out = returned_[0].name;
  const auto joined = [](std::initializer_list<std::string> parts) {
    std::string text;
    for (const std::string& part : parts) text += part.empty() ? "" : (text.empty() ? "" : ", ") + part;
    return text;
  };
  const std::string taken = joined({tensors, options}), inference = name_ + "(" + taken + ") -> Tensor";
  if (returned_[0].is_alone) return {inference};
  std::vector<std::string> schemas{name_ + "_forward(" + taken + ") -> " +
                                       (kept.empty() ? "Tensor" : "(Tensor " + out + ", " + kept + ")"),
                                   name_ + "_backward(" +
                                       joined({"Tensor grad_" + out, tensors, taken_back, options}) +
                                       ") -> (" + gradients + ")"};
  if (!returned_[0].is_kept) schemas.push_back(inference);
  return schemas;
}

// Whether an argument may be missing, or a list have no elements, for which AOTInductor hands None to an
// operator.
bool Signature::may_be_none(const Line& line) const {
  if (line.may_be_empty || !line.is_list || line.length.sum[0].names.empty()) return line.may_be_empty;
  for (const Line& other : arguments_)
    if (other.length.positive && other.length.sum[0].names == line.length.sum[0].names) return false;
  return true;
}

// --- a call
// -----------------------------------------------------------------------------------------------------------

class Signature::Check {
 public:
  Check(const Signature& signature, Arguments arguments) : s_(signature), arguments_(arguments.begin()) {
    sizes_.fill(kUnknown);
  }

  void all() {
    for (size_t i = 0; i < s_.arguments_.size(); ++i) kind(s_.arguments_[i], arguments_[i]);
    solve();
    for (size_t i = 0; i < s_.arguments_.size(); ++i)
      if (s_.arguments_[i].is_list) length(s_.arguments_[i], count(arguments_[i]));
    for (size_t i = 0; i < s_.arguments_.size(); ++i) {
      const Line& line = s_.arguments_[i];
      each(line, arguments_[i], [&](const Tensor& t, const Shape& shape, int element) {
        solve(shape, t);
        sizes(line, element, shape, t);
        forget_local();
      });
    }
  }

  void like_output(const char* argument, const Tensor& t) {
    Line line;
    line.name = argument;
    tensor(line, -1, s_.returned_[0].shapes[0], t);
    sizes(line, -1, s_.returned_[0].shapes[0], t);
  }

  void kept(const Line& line, const Tensor& t) {
    Line of = line;
    of.kind = Kind::kWeight;
    tensor(of, -1, line.shapes[0], t);
    sizes(of, -1, line.shapes[0], t);
    if (!t.is_contiguous()) wrong(line, -1, "expected a contiguous tensor");
  }

 private:
  template <class... Parts>
  [[noreturn]] void wrong(const Line& line, int element, const Parts&... parts) const {
    const std::string at = element < 0 ? "" : "[" + std::to_string(element) + "]";
    fail(s_.name_, ": ", line.name, at, ": ", parts...);
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
      if (*integer >= line.least && *integer <= line.most) return;
      const std::string most = std::isinf(line.most) ? "" : " and <= " + number_text(line.most);
      wrong(line, -1, "expected an int >= ", number_text(line.least), most, ", got ", *integer);
    }
    if (const auto* const numbers = std::get_if<const std::vector<double>*>(&given)) {
      for (size_t i = 0; i < (*numbers)->size(); ++i) check_number(line, static_cast<int>(i), (**numbers)[i]);
      return;
    }
    each(line, given,
         [&](const Tensor& t, const Shape& shape, int element) { tensor(line, element, shape, t); });
  }

  void check_number(const Line& line, int element, double number) const {
    if (number >= line.least && std::isfinite(number)) return;
    const std::string least = std::isinf(line.least) ? "" : " >= " + number_text(line.least);
    const char* const fraction = number == std::floor(number) && std::isfinite(number) ? ".0" : "";
    wrong(line, element, "expected a finite number", least, ", got ", number_text(number), fraction);
  }

  void tensor(const Line& line, int element, const Shape& shape, const Tensor& t) {
    const std::string& of = s_.arguments_[0].name;
    if (first_ == nullptr) {
      first_ = &t;
      const auto type = t.scalar_type();
      if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half)
        wrong(line, element, "expected float32, bfloat16 or float16 for the ", kBackend, " backend, got ",
              dtype_name(type));
      if (!is_here(t)) wrong(line, element, "expected a tensor on ", kHere);
    } else {
      if (line.kind == Kind::kTensor && t.scalar_type() != first_->scalar_type())
        wrong(line, element, "expected the dtype of ", of, ", ", dtype_name(first_->scalar_type()), ", got ",
              dtype_name(t.scalar_type()));
      if (line.kind == Kind::kWeight && t.scalar_type() != ScalarType::Float)
        wrong(line, element, "expected float32, got ", dtype_name(t.scalar_type()));
      if (!is_here(t) || t.get_device_index() != first_->get_device_index())
        wrong(line, element, "expected the device of ", of);
    }
    const int64_t rank = t.dim(), dims = static_cast<int64_t>(shape.dims.size());
    if (shape.has_leading ? rank >= dims : rank == dims) return;
    wrong(line, element, "expected ", shape.has_leading ? "at least " : "", dims,
          dims == 1 && !shape.has_leading ? " dimension " : " dimensions ", shape.text, ", got shape ",
          shape_text(t));
  }

  void solve() {
    for (size_t i = 0; i < s_.arguments_.size(); ++i) {
      const Line& line = s_.arguments_[i];
      if (s_.integers_[i] >= 0) sizes_[s_.integers_[i]] = std::get<int64_t>(arguments_[i]);
      const int64_t length = count(arguments_[i]);
      if (line.is_list && line.kind == Kind::kWeight && !(line.may_be_empty && length == 0))
        solve(line.length, length);
    }
    for (const Line& line : s_.arguments_)
      for (const Term& term : line.length.sum)
        for (const int name : term.names)
          if (sizes_[name] == kUnknown) sizes_[name] = 0;
    for (size_t i = 0; i < s_.arguments_.size(); ++i) {
      each(s_.arguments_[i], arguments_[i], [&](const Tensor& t, const Shape& shape, int) {
        solve(shape, t);
        forget_local();
      });
    }
  }

  void solve(const Shape& shape, const Tensor& t) {
    if (shape.has_leading && leading_ == nullptr) leading_ = &t, trailing_ = shape.dims.size();
    const int64_t before = t.dim() - static_cast<int64_t>(shape.dims.size());
    for (size_t i = 0; i < shape.dims.size(); ++i) solve(shape.dims[i], t.size(before + i));
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
    for (size_t i = 0; i < s_.is_local_.size(); ++i)
      if (s_.is_local_[i]) sizes_[i] = kUnknown;
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
    const std::string of = line.kind == Kind::kNumber ? "number" : "tensor";
    if (line.length.positive && count == 0) wrong(line, -1, "expected at least one ", of, ", got none");
    const int64_t expected = value(line.length);
    if (count == expected || (count == 0 && line.may_be_empty)) return;
    const bool has_names = !line.length.sum[0].names.empty();
    const std::string meant = has_names ? " = " + std::to_string(expected) : "";
    wrong(line, -1, "expected ", line.may_be_empty ? "none or " : "", line.length.text, meant, " ", of,
          "s, got ", count);
  }

  void sizes(const Line& line, int element, const Shape& shape, const Tensor& t) const {
    const int64_t before = t.dim() - static_cast<int64_t>(shape.dims.size());
    bool fits = true;
    for (size_t i = 0; i < shape.dims.size(); ++i) {
      const Dim& dim = shape.dims[i];
      const int64_t size = t.size(before + i);
      if (dim.odd && size % 2 != 1)
        wrong(line, element, "expected an odd ", dim.text, " in ", shape.text, ", got shape ", shape_text(t));
      if (dim.positive && size < 1)
        wrong(line, element, "expected a positive ", dim.text, " in ", shape.text, ", got shape ",
              shape_text(t));
      fits = fits && value(dim) == size;
    }
    if (shape.has_leading) {
      const int64_t expected = leading_->dim() - static_cast<int64_t>(trailing_);
      fits = fits && expected == before;
      for (int64_t i = 0; fits && i < before; ++i) fits = t.size(i) == leading_->size(i);
    }
    if (!fits) wrong(line, element, "expected shape ", shape.text, known(shape), ", got ", shape_text(t));
  }

  std::string known(const Shape& shape) const {
    std::string text;
    const auto add = [&](const std::string& name, const std::string& value) {
      text += (text.empty() ? " with " : ", ") + name + " = " + value;
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
            add(s_.names_[name], std::to_string(sizes_[name]));
    return text;
  }

  const Signature& s_;
  const Argument* arguments_;
  Sizes sizes_;
  const Tensor* first_ = nullptr;
  const Tensor* leading_ = nullptr;  // whose leading sizes all have
  size_t trailing_ = 0;              // its other dimensions
};

void Signature::check(Arguments arguments) const { Check(*this, arguments).all(); }

void Signature::check_backward(const Tensor& grad_out, Arguments arguments,
                               std::initializer_list<const Tensor*> kept) const {
  Check check(*this, arguments);
  check.all();
  check.like_output("grad_out", grad_out);
  size_t at = returned_.size() - kept.size();
  for (const Tensor* const t : kept) {
    at == 0 ? check.like_output(returned_[0].name.c_str(), *t) : check.kept(returned_[at], *t);
    ++at;
  }
}

}  // namespace effattn
