// What the glue of the operators has of CUDA: the same glue as the CPU's, in a library of its own. With
// EFFATTN_EMULATED it takes tensors of the CPU, for tests.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../kernels/cuda/core/execution.h"
#include "../../kernels/cuda/core/launch_record.h"

#ifdef EFFATTN_EMULATED
#define EFFATTN_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(effattn, CPU, m)
#else
#define EFFATTN_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(effattn, CUDA, m)
#endif

namespace effattn {

using torch::stable::Tensor;
namespace kernels = cuda;

#ifdef EFFATTN_EMULATED

constexpr const char* kHere = "the CPU";
inline bool is_here(const Tensor& t) { return t.is_cpu(); }
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }

class OnDevice {
 public:
  explicit OnDevice(int32_t) {}
  void* stream() const { return nullptr; }
  cuda::Gpu gpu() const;  // emulated/device.cpp, as are the others: as tests ask for it
  // Of a call: workspace is full of NaN, and what was launched is done at its end.
  void poison(float* workspace, int64_t floats) const;
  void end() const;
};

#else

constexpr const char* kHere = "a CUDA device";
inline bool is_here(const Tensor& t) { return t.is_cuda(); }
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }

// aoti_torch_get_current_cuda_stream, looked up when it is needed: a torch without CUDA lacks it, and loads
// this library all the same, to say what it is for; and one build serves every torch.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** ret_stream);
inline CurrentStream current_stream() {
  static const CurrentStream found = [] {
    const char* const name = "aoti_torch_get_current_cuda_stream";
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* const symbol = dlsym(torch_cuda != nullptr ? torch_cuda : RTLD_DEFAULT, name);
    if (symbol == nullptr) throw std::runtime_error(std::string("effattn: this torch has no ") + name);
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

// Makes a device the current one, for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int32_t index) : index_(index), guard_(index) { cuda::make_current(index); }
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(index_, &stream));
    return stream;
  }
  cuda::Gpu gpu() const { return cuda::gpu(index_); }
  void poison(float*, int64_t) const {}
  void end() const {}

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#endif

// A tensor that a call is named after, and the function of the glue that makes the call.
struct Called {
  const Tensor& tensor;
  std::source_location from;
  Called(const Tensor& t, std::source_location f = std::source_location::current()) : tensor(t), from(f) {}
};

inline cuda::CallRecord describe(const Called& called) {
  cuda::CallRecord call;
  call.file = called.from.file_name();
  call.function = called.from.function_name();
  const auto type = called.tensor.scalar_type();
  using torch::headeronly::ScalarType;
  call.dtype = type == ScalarType::Float      ? "float32"
               : type == ScalarType::BFloat16 ? "bfloat16"
               : type == ScalarType::Half     ? "float16"
                                              : "another type";
  call.rank = static_cast<int>(called.tensor.dim());
  for (int i = 0; i < call.rank && i < cuda::CallRecord::kMaxSizes; ++i)
    call.sizes[i] = called.tensor.size(i);
  return call;
}

// How a call on tensors is run: on their device, on torch's current stream, with workspace from torch's
// allocator, which hands it to the next call on the stream.
class Execution {
 public:
  explicit Execution(const Called& of)
      : device_(named(of).tensor.get_device_index()), index_(of.tensor.get_device_index()) {}
  Execution(const Execution&) = delete;
  ~Execution() { device_.end(); }

  operator cuda::Execution() {
    return {device_.stream(), device_.gpu(), this, [](void* self, int64_t floats) {
              Execution& e = *static_cast<Execution*>(self);
              const int64_t stride = 1;
              AtenTensorHandle handle = nullptr;
              TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &floats, &stride, aoti_torch_dtype_float32(),
                                                              device_type(), e.index_, &handle));
              e.workspace_.emplace_back(handle);
              float* const workspace = static_cast<float*>(e.workspace_.back().mutable_data_ptr());
              e.device_.poison(workspace, floats);
              return workspace;
            }};
  }

 private:
  // Before anything asks CUDA, whose errors name the call.
  static const Called& named(const Called& of) {
    cuda::current_call() = describe(of);
    return of;
  }

  OnDevice device_;
  int32_t index_;
  std::vector<Tensor> workspace_;
};

inline Execution execution(const Called& of) { return Execution(of); }

}  // namespace effattn
