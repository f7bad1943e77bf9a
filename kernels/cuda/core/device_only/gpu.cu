// What CUDA says of GPUs, and launches on them.
#include <cxxabi.h>

#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../launch.h"

namespace effattn::cuda {
namespace {

EFFATTN_KERNEL(kLanes, 1) nothing(EFFATTN_PARAMETERS(int) p) { static_cast<void>(p); }

// As its author wrote it; empty if CUDA does not tell any more.
std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
#if CUDART_VERSION >= 12030
  if (kernel != nullptr && cudaFuncGetName(&mangled, kernel) != cudaSuccess) cudaGetLastError();
#endif
  if (mangled == nullptr) return "";
  int status = 0;
  char* const readable = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  const std::string name = status == 0 ? readable : mangled;
  std::free(readable);
  return name;
}

void check_launch(cudaError_t error, const LaunchRecord& launch) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which would be the next call's otherwise
  const LaunchRecord before = last_launches().before();
  throw std::runtime_error(failed_launch(std::string("launch of a kernel: ") + cudaGetErrorString(error),
                                         launches_are_waited_for(), launch, kernel_name(launch.kernel),
                                         before, kernel_name(before.kernel)));
}

// Of a call that launches nothing: an error may be that of an earlier launch all the same.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which would be the next call's otherwise
  const LaunchRecord last = last_launches().last();
  throw std::runtime_error(failed_call(std::string(what) + ": " + cudaGetErrorString(error),
                                       launches_are_waited_for(), current_call(), last,
                                       kernel_name(last.kernel)));
}

// Waits for what was launched; not while a graph is captured, where nothing runs.
cudaError_t waited_for(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  return error != cudaSuccess || status != cudaStreamCaptureStatusNone ? error
                                                                       : cudaStreamSynchronize(stream);
}

// Of a kernel on the current device, once: always to the most, since another thread may launch it with more.
cudaError_t allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes);
  if (error == cudaSuccess) allowed.emplace(kernel, device);
  return error;
}

}  // namespace

const char* unfit_driver() {
  static const std::string found = [] {
    int driver = 0, runtime = 0;
    for (const cudaError_t error : {cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime)}) {
      if (error == cudaSuccess) continue;
      cudaGetLastError();  // which would be the next call's otherwise
      return std::string("cannot ask for the driver: ") +
             cudaGetErrorString(error);  // callers know no exceptions
    }
    // Of one major version, every driver runs every library.
    if (driver / 1000 >= runtime / 1000) return std::string();
    return "is compiled with CUDA " + std::to_string(runtime / 1000) + ", the driver knows CUDA " +
           std::to_string(driver / 1000);
  }();
  return found.c_str();
}

void make_current(int device) { check(cudaSetDevice(device), "a device"); }

Gpu gpu(int device) {
  static std::mutex mutex;
  static std::vector<Gpu> gpus;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(device) >= gpus.size()) gpus.resize(device + 1, Gpu{0, 0});
  Gpu& found = gpus[device];
  if (found.capability == 0) {
    const auto attribute = [device](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), "attributes of a device");
      return value;
    };
    // A GPU may run what was translated from code for older ones, which knows no clusters.
    cudaFuncAttributes compiled{};
    check(cudaFuncGetAttributes(&compiled, nothing), "attributes of a kernel");
    found = {10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
             attribute(cudaDevAttrMultiProcessorCount)};
    found.capability = min(found.capability, compiled.ptxVersion);
  }
  return found;
}

void launch(const LaunchRecord& launched, const Grid& grid, const Execution& execution, void* parameters) {
  if (grid.shared_bytes > 48 * 1024) check_launch(allow_shared_memory(launched.kernel), launched);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(execution.stream);
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  if (grid.is_dependent && execution.gpu.has_dependent_launches()) {
    cudaLaunchAttribute& dependent = attributes[config.numAttrs++];
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
  }
  check_launch(cudaLaunchKernelExC(&config, launched.kernel, &parameters), launched);
  if (launches_are_waited_for()) check_launch(waited_for(config.stream), launched);
}

}  // namespace effattn::cuda
