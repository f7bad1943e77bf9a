// The functions of the C interface, for all operations.
#include "operation.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

struct effattn_operation {
  const effattn::engines::Kind* kind;
  std::unique_ptr<effattn::engines::Operation> operation;
};

namespace effattn::engines {
namespace {

std::vector<Kind>& kinds() {
  static std::vector<Kind> all;
  return all;
}

const Kind* find(const char* name) {
  for (const Kind& kind : kinds())
    if (name != nullptr && std::strcmp(kind.name, name) == 0) return &kind;
  return nullptr;
}

// What went wrong, kept for the thread; NULL if nothing did.
template <class F>
const char* caught(const F& f) {
  thread_local std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    try {
      message = error.what();
      return message.c_str();
    } catch (...) {
    }
  } catch (...) {
  }
  return "effattn: out of memory";
}

template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes)
    text += (text.empty() ? "" : ", ") + (size < 0 ? "?" : std::to_string(size));
  return "(" + text + ")";
}

std::string shape_text(const effattn_tensor& tensor) {
  return text_of(std::vector<int64_t>(tensor.shape, tensor.shape + tensor.rank));
}

cpu::Parallel parallel_of(const effattn_threads* threads) {
  using Body = void (*)(const void*, int64_t, int64_t);
  struct Task {
    Body body;
    const void* context;
  };
  if (threads == nullptr || threads->run == nullptr || threads->count < 2) {
    return {1, false,
            [](const void*, int64_t count, Body body, const void* context) { body(context, 0, count); },
            nullptr};
  }
  return {threads->count, false,
          [](const void* pool, int64_t count, Body body, const void* context) {
            const auto* const host = static_cast<const effattn_threads*>(pool);
            Task task{body, context};
            host->run(
                host->pool, count,
                [](void* of, int64_t i) {
                  const Task& one = *static_cast<const Task*>(of);
                  one.body(one.context, i, i + 1);
                },
                &task);
          },
          threads};
}

bool is_dense(const effattn_tensor& tensor) {
  int64_t step = 1;
  for (int32_t i = tensor.rank; i-- > 0;) {
    if (tensor.shape[i] != 1 && stride_of(tensor, i) != step) return false;
    step *= tensor.shape[i];
  }
  return true;
}

// Elements, of a shape that is known; throws where they cannot be counted.
int64_t elements_of(const char* operation, const effattn_tensor& tensor) {
  int64_t count = 1;
  for (int32_t i = 0; i < tensor.rank; ++i) {
    // An empty tensor may claim sizes whose product is none.
    if (__builtin_mul_overflow(count, std::max<int64_t>(tensor.shape[i], 1), &count) ||
        count > INT64_MAX / 16)
      fail(operation, ": expected a tensor whose elements can be counted, got shape ", shape_text(tensor));
  }
  return std::find(tensor.shape, tensor.shape + tensor.rank, 0) == tensor.shape + tensor.rank ? count : 0;
}

// Of those inputs from `first` on.
void require_data(const Kind& kind, const Inputs& inputs, int64_t first) {
  for (int64_t i = first; i < inputs.count(); ++i) {
    for (int32_t dim = 0; dim < inputs[i].rank; ++dim)
      if (inputs[i].shape[dim] < 0)
        fail(kind.name, ": input ", i, ": expected sizes, got shape ", shape_text(inputs[i]));
    if (elements_of(kind.name, inputs[i]) > 0 && inputs[i].data == nullptr)
      fail(kind.name, ": input ", i, ": expected data, got NULL");
    if (i >= kind.activations && !is_dense(inputs[i]))
      fail(kind.name, ": input ", i, ": expected dense weights");
  }
}

const Kind& kind_of(const effattn_operation* operation) {
  if (operation == nullptr) fail("effattn: expected an operation, got NULL");
  return *operation->kind;
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.list;
  return name.index < 0 ? out : out << "[" << name.index << "]";
}

Registered::Registered(const Kind& kind) { kinds().push_back(kind); }

Attributes::Attributes(const char* operation, const effattn_attribute_spec* specs,
                       const effattn_attribute* given, int32_t count)
    : operation_(operation), specs_(specs) {
  if (count < 0 || (count > 0 && given == nullptr)) fail(operation, ": expected attributes, got NULL");
  for (int32_t i = 0; i < count; ++i)
    if (given[i].name == nullptr) fail(operation, ": expected names of attributes, got NULL");
  const auto is_known = [specs](const effattn_attribute& one) {
    const effattn_attribute_spec* spec = specs;
    while (spec->name != nullptr && std::strcmp(spec->name, one.name) != 0) ++spec;
    return spec->name != nullptr;
  };
  for (int32_t i = 0; i < count; ++i)
    if (!is_known(given[i])) fail(operation, ": has no attribute ", given[i].name);
  for (const effattn_attribute_spec* spec = specs; spec->name != nullptr; ++spec) {
    const effattn_attribute* const end = given + count;
    const effattn_attribute* const found =
        std::find_if(given, end, [&](const auto& a) { return std::strcmp(a.name, spec->name) == 0; });
    if (found == end && spec->is_required) fail(operation, ": expected an attribute ", spec->name);
    values_.push_back(found == end ? 0 : found->value);
    if (spec->is_integer && values_.back() != std::floor(values_.back()))
      fail(operation, ": ", spec->name, ": expected an integer, got ", values_.back());
  }
}

double Attributes::number(const char* name) const {
  size_t i = 0;
  while (std::strcmp(specs_[i].name, name) != 0) ++i;
  return values_[i];
}

int64_t Attributes::integer(const char* name, int64_t most, int64_t least) const {
  const double value = number(name);
  if (!(value >= static_cast<double>(least) && value <= static_cast<double>(most)))
    fail(operation_, ": ", name, ": expected an integer from ", least, " to ", most, ", got ", value);
  return static_cast<int64_t>(value);
}

float Attributes::finite(const char* name) const {
  const double value = number(name);
  if (!(std::abs(value) <= std::numeric_limits<float>::max()))
    fail(operation_, ": ", name, ": expected a finite float32, got ", value);
  return static_cast<float>(value);
}

float Attributes::not_negative(const char* name) const {
  const float value = finite(name);
  if (value < 0) fail(operation_, ": ", name, ": expected a number >= 0, got ", value);
  return value;
}

Inputs::Inputs(const char* operation, const effattn_tensor* tensors, int32_t count, int32_t activations)
    : operation_(operation), tensors_(tensors), count_(count) {
  if (tensors == nullptr || count < activations || count > kMaxInputs)
    fail(operation, ": expected inputs, at least ", activations, ", got ", count);
  for (int32_t i = 0; i < count; ++i) {
    const effattn_dtype expected = i < activations ? tensors[0].dtype : EFFATTN_FLOAT32;
    if (tensors[i].dtype != expected || expected < EFFATTN_FLOAT32 || expected > EFFATTN_FLOAT16)
      fail(operation, ": input ", i, ": expected ",
           i < activations ? "activations of one dtype" : "float32 weights");
    if (tensors[i].rank > 0 && tensors[i].shape == nullptr)
      fail(operation, ": input ", i, ": expected a shape, got NULL");
    if (tensors[i].rank < 0 || tensors[i].rank > 64)
      fail(operation, ": input ", i, ": expected up to 64 dimensions");
  }
}

void Inputs::require_count(int64_t count) const {
  if (count_ != count) fail(operation_, ": expected ", count, " inputs, got ", count_);
}

void Inputs::require_rank(int64_t input, const Name& name, int64_t rank, const char* text) const {
  if (tensors_[input].rank != rank)
    fail(operation_, ": ", name, ": expected shape ", text, ", got ", shape_text(tensors_[input]));
}

void Inputs::require_shape(int64_t input, const Name& name, std::initializer_list<int64_t> shape) const {
  const effattn_tensor& given = tensors_[input];
  bool fits = given.rank == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    const int64_t expected = shape.begin()[i];
    fits = expected < 0 || given.shape[i] < 0 || expected == given.shape[i];
  }
  if (!fits) fail(operation_, ": ", name, ": expected shape ", text_of(shape), ", got ", shape_text(given));
}

int64_t kernel_of(const Inputs& inputs, int64_t input, const Name& name) {
  inputs.require_rank(input, name, 4, "(channels, 1, odd k, k)");
  const int64_t k = inputs.size(input, 3);
  if (k != kUnknown && (k % 2 == 0 || k >= kMaxSide || k < 1))
    fail(inputs.operation(), ": ", name, ": expected shape (channels, 1, odd k, k), got ",
         shape_text(inputs[input]));
  return k;
}

DType dtype_of(const effattn_tensor& tensor) {
  switch (tensor.dtype) {
    case EFFATTN_BFLOAT16:
      return DType::kBFloat16;
    case EFFATTN_FLOAT16:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

int64_t stride_of(const effattn_tensor& tensor, int64_t dim) {
  if (tensor.strides != nullptr) return tensor.strides[dim];
  int64_t step = 1;
  for (int64_t i = tensor.rank - 1; i > dim; --i) step *= tensor.shape[i];
  return step;
}

Image image_of(const char* operation, const effattn_tensor& t) {
  const int64_t height = t.shape[2], width = t.shape[3];
  if (height > 1 && width > 1 && stride_of(t, 2) != width * stride_of(t, 3))
    fail(operation, ": expected images whose rows follow each other");
  const int64_t token_stride = width > 1 ? stride_of(t, 3) : height > 1 ? stride_of(t, 2) : 1;
  return {t.data, stride_of(t, 0), t.shape[1] == 1 ? 1 : stride_of(t, 1), token_stride};
}

}  // namespace effattn::engines

using namespace effattn::engines;

int32_t effattn_interface(void) { return EFFATTN_INTERFACE; }
int32_t effattn_format(void) { return EFFATTN_FORMAT; }
const char* effattn_version(void) { return EFFATTN_VERSION; }

const char* const* effattn_operations(void) {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> all;
    for (const Kind& kind : kinds()) all.push_back(kind.name);
    all.push_back(nullptr);
    return all;
  }();
  return names.data();
}

const effattn_attribute_spec* effattn_attributes(const char* operation) {
  const Kind* const kind = find(operation);
  return kind == nullptr ? nullptr : kind->attributes;
}

int32_t effattn_activations(const char* operation) {
  const Kind* const kind = find(operation);
  return kind == nullptr ? 0 : kind->activations;
}

const char* effattn_create(const char* operation, const effattn_attribute* attributes, int32_t count,
                           effattn_operation** created) {
  return caught([&] {
    const Kind* const kind = find(operation);
    if (kind == nullptr)
      fail("effattn ", effattn_version(), " has no operation ", operation == nullptr ? "NULL" : operation);
    if (created == nullptr) fail(kind->name, ": expected where to put the operation, got NULL");
    *created = new effattn_operation{kind, kind->create({kind->name, kind->attributes, attributes, count})};
  });
}

void effattn_destroy(effattn_operation* operation) { delete operation; }

const char* effattn_pack(effattn_operation* operation, const effattn_tensor* inputs, int32_t count) {
  return caught([&] {
    const Kind& kind = kind_of(operation);
    const Inputs all(kind.name, inputs, count, kind.activations);
    operation->operation->shape(all);
    require_data(kind, all, kind.activations);
    operation->operation->pack(all);
  });
}

const char* effattn_shape(const effattn_operation* operation, const effattn_tensor* inputs, int32_t count,
                          int64_t* shape) {
  return caught([&] {
    const Kind& kind = kind_of(operation);
    const std::vector<int64_t> found =
        operation->operation->shape({kind.name, inputs, count, kind.activations});
    if (shape == nullptr) fail(kind.name, ": expected where to put the shape, got NULL");
    std::copy(found.begin(), found.end(), shape);
  });
}

const char* effattn_run(const effattn_operation* operation, const effattn_tensor* inputs, int32_t count,
                        const effattn_tensor* output, const effattn_threads* threads) {
  return caught([&] {
    const Kind& kind = kind_of(operation);
    const Inputs all(kind.name, inputs, count, kind.activations);
    const std::vector<int64_t> expected = operation->operation->shape(all);
    require_data(kind, all, 0);
    if (output == nullptr || output->shape == nullptr)
      fail(kind.name, ": output: expected a tensor with a shape, got NULL");
    if (output->dtype != inputs[0].dtype || output->rank != static_cast<int32_t>(expected.size()) ||
        !std::equal(expected.begin(), expected.end(), output->shape))
      fail(kind.name, ": output: expected shape ", text_of(expected), " in the first input's dtype ",
           inputs[0].dtype, ", got ", shape_text(*output), " in ", output->dtype);
    if (elements_of(kind.name, *output) == 0) return;
    if (output->data == nullptr) fail(kind.name, ": output: expected data, got NULL");
    operation->operation->run(all, *output, parallel_of(threads));
  });
}
