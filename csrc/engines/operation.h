// An operation of the C interface: checks of what a host gives, and the params of a call. One file an
// operator.
#pragma once

#include <initializer_list>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../kernels/cpu/core/parallel.h"
#include "../../kernels/params/image.h"
#include "effattn_kernels.h"  // effattn/include

namespace effattn::engines {

constexpr int64_t kUnknown = -1;
constexpr int kMaxInputs = 4096;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

// The attributes that were given, by the specification's names.
class Attributes {
 public:
  Attributes(const char* operation, const effattn_attribute_spec* specs, const effattn_attribute* given,
             int32_t count);
  double number(const char* name) const;
  // Between 0 and `most`.
  int64_t integer(const char* name, int64_t most, int64_t least = 0) const;
  // A finite float32.
  float finite(const char* name) const;
  // As above, and not negative.
  float not_negative(const char* name) const;

 private:
  const char* operation_;
  const effattn_attribute_spec* specs_;
  std::vector<double> values_;
};

// What messages call an input, "bias" or "dw_weights[0]": made into a text only where something is wrong.
struct Name {
  const char* list;
  int64_t index = -1;
};
std::ostream& operator<<(std::ostream& out, const Name& name);

// A call's inputs.
class Inputs {
 public:
  Inputs(const char* operation, const effattn_tensor* tensors, int32_t count, int32_t activations);

  const effattn_tensor& operator[](int64_t i) const { return tensors_[i]; }
  int64_t size(int64_t input, int64_t dim) const { return tensors_[input].shape[dim]; }
  int64_t count() const { return count_; }
  const char* operation() const { return operation_; }

  void require_count(int64_t count) const;
  void require_rank(int64_t input, const Name& name, int64_t rank, const char* text) const;
  // Sizes that are kUnknown, here or there, fit.
  void require_shape(int64_t input, const Name& name, std::initializer_list<int64_t> shape) const;
  // A weight's numbers, or null in a call that does not look at data.
  const float* floats(int64_t input) const { return static_cast<const float*>(tensors_[input].data); }

 private:
  const char* operation_;
  const effattn_tensor* tensors_;
  int64_t count_;
};

// The side of a square depthwise kernel, the last size of an input: odd.
int64_t kernel_of(const Inputs& inputs, int64_t input, const Name& name);

DType dtype_of(const effattn_tensor& tensor);
int64_t stride_of(const effattn_tensor& tensor, int64_t dim);
// (B, C, H, W), whose rows follow each other.
Image image_of(const char* operation, const effattn_tensor& tensor);

class Operation {
 public:
  virtual ~Operation() = default;
  // Checks all inputs. Throws if one does not fit.
  virtual std::vector<int64_t> shape(const Inputs& inputs) const = 0;
  // Of inputs that were checked.
  virtual void pack(const Inputs&) {}
  // Of inputs and an output that were checked, and are not empty.
  virtual void run(const Inputs& inputs, const effattn_tensor& output,
                   const cpu::Parallel& parallel) const = 0;
};

struct Kind {
  const char* name;
  const effattn_attribute_spec* attributes;
  int32_t activations;
  std::unique_ptr<Operation> (*create)(const Attributes&);
};

// Makes a kind known; an object of each operator's file.
struct Registered {
  explicit Registered(const Kind& kind);
};

}  // namespace effattn::engines
