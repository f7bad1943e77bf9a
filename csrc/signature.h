// Argument validation: an operator's signature (effattn/ops/_signature.py says how it reads, and reads it
// when this is built) against what a call brings.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <variant>
#include <vector>

#include "tensor.h"

namespace effattn {

class Signature {
 public:
  // A tensor that may be missing is null.
  using Argument =
      std::variant<const Tensor*, const std::vector<Tensor>*, const std::vector<double>*, int64_t, double>;
  using Arguments = std::initializer_list<Argument>;

  // Of effattn/ops/<name>.py, as it was when this library was built.
  explicit Signature(const char* name);

  const char* name() const { return name_.c_str(); }

  // Throws std::runtime_error for the first thing that is wrong, naming operator, argument, what is expected
  // and what came; Python says the same in the same words.
  void check(Arguments arguments) const;
  void check_backward(const Tensor& grad_out, Arguments arguments,
                      std::initializer_list<const Tensor*> kept) const;

 private:
  static constexpr int kMaxNames = 24;
  static constexpr int64_t kUnknown = -1;
  using Sizes = std::array<int64_t, kMaxNames>;
  // A sum of products of names.
  struct Term {
    int64_t factor;
    std::vector<int> names;
  };
  struct Dim {
    std::string text;
    std::vector<Term> sum{};
    bool odd = false, positive = false;
  };
  struct Shape {
    std::string text;
    std::vector<Dim> dims{};
    bool has_leading = false;
  };
  enum class Kind { kTensor, kWeight, kInteger, kNumber };
  struct Line {
    std::string name;
    Kind kind = Kind::kTensor;
    std::vector<Shape> shapes{};
    bool is_list = false, may_be_empty = false;
    Dim length{};
    double minimum = -std::numeric_limits<double>::infinity(),
           maximum = std::numeric_limits<double>::infinity();

    const Shape& shape(size_t element) const { return shapes[element % shapes.size()]; }
  };

  struct Table {
    std::vector<std::string> names;  // of sizes
    std::vector<bool> is_local;      // of each: whether it may differ from element to element of a list
    std::vector<int> integers;       // of each argument: the name that it is itself, or -1
    std::vector<Line> arguments, returned;
  };

  class Check;

  std::string name_;
  const Table* table_;
};

}  // namespace effattn
