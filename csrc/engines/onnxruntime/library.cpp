// Every operation of the C interface as a custom operator of onnxruntime, domain "effattn". Its weights are
// packed when a session is created, and it works in the session's own thread pool.
#include <climits>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "effattn_kernels.h"  // effattn/include
#include "interface.h"

namespace effattn::engines::ort {
namespace {

using Api = const void* const*;

// An onnxruntime function failed; its status goes back to onnxruntime as it is.
struct Failed {
  Status* status;
};
void require(Status* status) {
  if (status != nullptr) throw Failed{status};
}
void require_text(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

// What f throws, as onnxruntime takes it.
template <class F>
Status* status_of(Api api, const F& f) {
  try {
    f();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return create_status(api, kFail, error.what());
  }
}

struct ReleaseInfo {
  Api api;
  void operator()(TensorInfo* info) const { release_tensor_info(api, info); }
};
using Info = std::unique_ptr<TensorInfo, ReleaseInfo>;

std::vector<int64_t> shape_of(Api api, const TensorInfo* info) {
  size_t rank = 0;
  require(dimension_count(api, info, &rank));
  std::vector<int64_t> shape(rank);
  require(dimensions(api, info, shape.data(), rank));
  return shape;
}

// A tensor of a session: its numbers, and its shape where somebody keeps it.
struct Tensor {
  std::vector<int64_t> shape;
  void* data = nullptr;

  effattn_tensor view() const {
    return {data, EFFATTN_FLOAT32, static_cast<int32_t>(shape.size()), shape.data(), nullptr};
  }
};

Tensor tensor_of(Api api, const Value* value) {
  Tensor tensor;
  TensorInfo* info = nullptr;
  require(tensor_info(api, value, &info));
  tensor.shape = shape_of(api, Info(info, {api}).get());
  require(tensor_data(api, const_cast<Value*>(value), &tensor.data));
  return tensor;
}

struct Destroy {
  void operator()(effattn_operation* operation) const { effattn_destroy(operation); }
};
using Operation = std::unique_ptr<effattn_operation, Destroy>;

// `read(spec, &value)` returns whether the node has the attribute.
template <class Read>
Operation create(const char* name, const Read& read) {
  std::vector<effattn_attribute> given;
  const effattn_attribute_spec format = {"format", 1, 1};
  double value = 0;
  if (!read(format, value) || value != effattn_format())
    throw std::runtime_error(std::string("effattn ") + effattn_version() + ": " + name +
                             ": reads models of format " + std::to_string(effattn_format()) +
                             ", this one is of format " + std::to_string(static_cast<int64_t>(value)) +
                             "; export it again with this version, or load the library that belongs to it");
  for (const effattn_attribute_spec* spec = effattn_attributes(name); spec->name != nullptr; ++spec)
    if (read(*spec, value)) given.push_back({spec->name, value});
  effattn_operation* created = nullptr;
  require_text(effattn_create(name, given.data(), static_cast<int32_t>(given.size()), &created));
  return Operation(created);
}

// One node of a session.
class Kernel {
 public:
  Kernel(Api api, const char* name, const KernelInfo* info)
      : api_(api), name_(name), activations_(effattn_activations(name)) {
    operation_ = create(name, [&](const effattn_attribute_spec& spec, double& value) {
      float number = 0;
      int64_t integer = 0;
      Status* const status = spec.is_integer ? integer_attribute(api_, info, spec.name, &integer)
                                             : float_attribute(api_, info, spec.name, &number);
      value = spec.is_integer ? static_cast<double>(integer) : number;
      if (status != nullptr) release_status(api_, status);
      return status == nullptr;
    });
    take_weights(info);
  }

  void compute(KernelContext* context) const {
    size_t count = 0;
    require(input_count(api_, context, &count));
    // Weights are where they were when the session was created.
    const size_t changing = weights_.empty() ? count : activations_;
    std::vector<Tensor> tensors(changing);
    std::vector<effattn_tensor> inputs;
    for (size_t i = 0; i < changing; ++i) {
      const Value* value = nullptr;
      require(input(api_, context, i, &value));
      tensors[i] = tensor_of(api_, value);
      inputs.push_back(tensors[i].view());
    }
    for (const Tensor& weight : weights_) inputs.push_back(weight.view());
    const int32_t given = static_cast<int32_t>(inputs.size());
    Tensor out;
    out.shape.resize(tensors.empty() ? 0 : tensors[0].shape.size());
    require_text(effattn_shape(operation_.get(), inputs.data(), given, out.shape.data()));
    Value* value = nullptr;
    require(output(api_, context, 0, out.shape.data(), out.shape.size(), &value));
    require(tensor_data(api_, value, &out.data));
    const effattn_tensor result = out.view();
    Pool pool{api_, context};
    const effattn_threads threads{static_cast<int32_t>(std::thread::hardware_concurrency()), &pool,
                                  &Pool::run};
    require_text(effattn_run(operation_.get(), inputs.data(), given, &result, &threads));
  }

  Api api() const { return api_; }

 private:
  struct Pool {
    Api api;
    const KernelContext* context;

    static void run(void* self, int64_t count, void (*task)(void*, int64_t), void* of_task) {
      struct Task {
        void (*task)(void*, int64_t);
        void* context;
      } one{task, of_task};
      const Pool& pool = *static_cast<const Pool*>(self);
      Status* const status = parallel_for(
          pool.api, pool.context,
          [](void* of, size_t i) { static_cast<Task*>(of)->task(static_cast<Task*>(of)->context, i); }, count,
          0, &one);
      if (status == nullptr) return;
      release_status(pool.api, status);  // it has run nothing
      for (int64_t i = 0; i < count; ++i) task(of_task, i);
    }
  };

  // Packs the weights if none of them can change.
  void take_weights(const KernelInfo* info) {
    size_t count = 0;
    require(kernel_input_count(api_, info, &count));
    std::vector<Tensor> found;
    for (size_t i = activations_; i < count; ++i) {
      int is_constant = 0;
      const Value* value = nullptr;
      require(constant_input(api_, info, i, &is_constant, &value));
      if (!is_constant) return;
      found.push_back(tensor_of(api_, value));
    }
    if (found.empty()) return;
    // Of activations, nothing is known yet.
    std::vector<effattn_tensor> inputs(activations_);
    std::vector<int64_t> unknown(8, -1);
    for (effattn_tensor& activation : inputs)
      activation = {nullptr, EFFATTN_FLOAT32, 4, unknown.data(), nullptr};
    for (const Tensor& weight : found) inputs.push_back(weight.view());
    require_text(effattn_pack(operation_.get(), inputs.data(), static_cast<int32_t>(inputs.size())));
    weights_ = std::move(found);
  }

  Api api_;
  const char* name_;
  size_t activations_;
  Operation operation_;
  std::vector<Tensor> weights_;
};

// The shape of the output, with names of sizes that are the first input's.
void infer(Api api, const char* name, ShapeInferContext* context) {
  const Operation operation = create(name, [&](const effattn_attribute_spec& spec, double& value) {
    const OpAttr* attribute = nullptr;
    int64_t integer = 0;
    float number = 0;
    size_t bytes = 0;
    Status* status = inferred_attribute(api, context, spec.name, &attribute);
    if (status == nullptr && attribute == nullptr) return false;
    if (status == nullptr) {
      status = spec.is_integer
                   ? read_attribute(api, attribute, kInt, &integer, sizeof integer, &bytes)
                   : read_attribute(api, attribute, kFloatAttribute, &number, sizeof number, &bytes);
    }
    value = spec.is_integer ? static_cast<double>(integer) : number;
    if (status != nullptr) release_status(api, status);
    return status == nullptr;
  });
  size_t count = 0;
  require(inferred_input_count(api, context, &count));
  std::vector<std::vector<int64_t>> shapes(count);
  std::vector<effattn_tensor> inputs;
  std::vector<const char*> names;
  for (size_t i = 0; i < count; ++i) {
    TensorInfo* info = nullptr;
    require(inferred_input(api, context, i, &info));
    shapes[i] = shape_of(api, info);
    if (shapes[i].empty()) return;  // of which nothing is known, not even how many dimensions it has
    inputs.push_back(
        {nullptr, EFFATTN_FLOAT32, static_cast<int32_t>(shapes[i].size()), shapes[i].data(), nullptr});
    if (i == 0) {
      names.resize(shapes[0].size(), "");
      require(symbolic_dimensions(api, info, names.data(), names.size()));
    }
  }
  if (count == 0) return;
  std::vector<int64_t> shape(shapes[0].size());
  require_text(effattn_shape(operation.get(), inputs.data(), static_cast<int32_t>(count), shape.data()));
  for (size_t i = 0; i < shape.size(); ++i)
    if (shape[i] >= 0 || shapes[0][i] >= 0) names[i] = "";
  TensorInfo* created = nullptr;
  require(create_tensor_info(api, &created));
  const Info info(created, {api});
  require(set_element_type(api, created, kFloat));
  require(set_dimensions(api, created, shape.data(), shape.size()));
  require(set_symbolic_dimensions(api, created, names.data(), names.size()));
  require(set_inferred_output(api, context, 0, created));
}

struct Op : CustomOp {
  Api api;
  const char* operation;

  Op(Api of, const char* of_operation) : api(of), operation(of_operation) {
    name = [](const CustomOp* op) { return static_cast<const Op*>(op)->operation; };
    execution_provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU's
    input_type = output_type = [](const CustomOp*, size_t) { return kFloat; };
    input_type_count = output_type_count = [](const CustomOp*) -> size_t { return 1; };
    destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    input_characteristic = [](const CustomOp*, size_t) { return kVariadic; };
    output_characteristic = [](const CustomOp*, size_t) { return kRequired; };
    input_memory_type = [](const CustomOp*, size_t) { return 0; };
    variadic_input_min_arity = variadic_input_homogeneity = [](const CustomOp*) { return 1; };
    variadic_output_min_arity = variadic_output_homogeneity = [](const CustomOp*) { return 1; };
    start_version = [](const CustomOp*) { return 1; };
    end_version = [](const CustomOp*) { return INT_MAX; };
    create_kernel_v2 = [](const CustomOp* op, Api, const KernelInfo* info, void** kernel) {
      const Op& of = *static_cast<const Op*>(op);
      return status_of(of.api, [&] { *kernel = new Kernel(of.api, of.operation, info); });
    };
    compute_v2 = [](void* kernel, KernelContext* context) {
      const Kernel& of = *static_cast<const Kernel*>(kernel);
      return status_of(of.api(), [&] { of.compute(context); });
    };
    infer_shape = [](const CustomOp* op, ShapeInferContext* context) {
      const Op& of = *static_cast<const Op*>(op);
      return status_of(of.api, [&] { infer(of.api, of.operation, context); });
    };
  }
};

// One for all sessions of an onnxruntime, of which a process may have several; never released, as sessions
// may end when the process does.
CustomOpDomain* domain(Api api) {
  static std::mutex mutex;
  static std::map<Api, CustomOpDomain*> made;
  const std::lock_guard lock(mutex);
  CustomOpDomain*& of_api = made[api];
  if (of_api == nullptr) {
    CustomOpDomain* created = nullptr;
    require(create_domain(api, "effattn", &created));
    for (const char* const* operation = effattn_operations(); *operation != nullptr; ++operation)
      require(add_to_domain(api, created, new Op(api, *operation)));
    of_api = created;
  }
  return of_api;
}

}  // namespace
}  // namespace effattn::engines::ort

// The function that onnxruntime calls when the library is registered with a session's options.
extern "C" EFFATTN_API effattn::engines::ort::Status* RegisterCustomOps(
    effattn::engines::ort::SessionOptions* options, const effattn::engines::ort::ApiBase* base) {
  using namespace effattn::engines::ort;
  const Api api = base->get_api(kVersion);
  if (api == nullptr) {
    const std::string text = std::string("effattn ") + effattn_version() +
                             " needs onnxruntime 1.17 or later, this is " + base->version();
    const Api oldest = base->get_api(kOldestVersion);
    return oldest == nullptr ? nullptr : create_status(oldest, kFail, text.c_str());
  }
  return status_of(api, [&] {
    if (effattn_interface() != EFFATTN_INTERFACE)
      throw std::runtime_error(
          std::string("effattn: libeffattn_onnxruntime does not fit the libeffattn_kernels of effattn ") +
          effattn_version() + " beside it");
    require(add_domain(api, options, domain(api)));
  });
}
