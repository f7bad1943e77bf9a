// Argument validation: an operator's signature (effattn/ops/_signature.py says how it reads, and reads it
// when this is built) against what a call brings.
#pragma once

#include <cstdint>
#include <initializer_list>
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
  // and what came. Python raises the same texts as TypeError or ValueError. Two refusals are these alone:
  // float64, and tensors kept for the backward that are not contiguous.
  void check(Arguments arguments) const;
  void check_backward(const Tensor& grad_out, Arguments arguments,
                      std::initializer_list<const Tensor*> kept) const;

  struct Table;

 private:
  class Check;

  const Table& table() const;

  std::string name_;
  const Table* table_;
};

}  // namespace effattn
