// How kernels are launched.
#pragma once

#ifndef EFFATTN_EMULATED
#include <cxxabi.h>
#endif

#include <stdexcept>
#include <string>

#include "device.h"
#include "execution.h"
#include "launch_record.h"

namespace effattn::cuda {

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;  // blocks that run at the same time, and divide all blocks
  // Whether blocks may begin before the launch in front of this one is done (programmatic dependent launch):
  // the kernel calls grid_dependency_wait() before it reads what that one writes, and before it writes
  // anything.
  bool is_dependent = false;
};

constexpr int64_t kMostBlocks = INT32_MAX;
// Of shared memory: the least that a card since 8.0 lets a block have, less what it keeps.
constexpr int kMostSharedBytes = 98 * 1024;

inline void check(const Grid& grid) {
  if (grid.blocks > kMostBlocks) {
    throw std::runtime_error("effattn: too large for one launch, " + std::to_string(grid.blocks) + " blocks");
  }
  if (grid.shared_bytes > kMostSharedBytes || grid.blocks % grid.cluster != 0) {
    throw std::logic_error("effattn: a launch of " + std::to_string(grid.blocks) + " blocks in clusters of " +
                           std::to_string(grid.cluster) + ", with " + std::to_string(grid.shared_bytes) +
                           " bytes of shared memory");
  }
}

// Written down before the launch, which may be the last thing that a process does.
template <class Parameters>
LaunchRecord record(const void* kernel, const Grid& grid) {
  const LaunchRecord launch{current_call(),    kernel,       __PRETTY_FUNCTION__, grid.blocks,
                            grid.shared_bytes, grid.threads, grid.cluster};
  last_launches().add(launch);
  return launch;
}

#ifdef EFFATTN_EMULATED

template <class Parameters>
void launch(void (*kernel)(const Parameters&), const Grid& grid, const Execution&,
            const Parameters& parameters) {
  check(grid);
  if (grid.blocks == 0) return;
  record<Parameters>(reinterpret_cast<const void*>(kernel), grid);
  emulate({grid.blocks, grid.threads, grid.shared_bytes, grid.cluster, grid.is_dependent,
           [kernel, parameters] { kernel(parameters); }});
}

#else

// As its author wrote it; empty if CUDA does not tell any more.
inline std::string kernel_name(const void* kernel) {
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

inline void check_launch(cudaError_t error, const LaunchRecord& launch) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which would be the next call's otherwise
  const LaunchRecord before = last_launches().before();
  throw std::runtime_error(failed_launch(std::string("launch of a kernel: ") + cudaGetErrorString(error),
                                         launches_are_waited_for(), launch, kernel_name(launch.kernel),
                                         before, kernel_name(before.kernel)));
}

// Of a call that launches nothing: an error may be that of an earlier launch all the same.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which would be the next call's otherwise
  const LaunchRecord last = last_launches().last();
  throw std::runtime_error(failed_call(std::string(what) + ": " + cudaGetErrorString(error),
                                       launches_are_waited_for(), current_call(), last,
                                       kernel_name(last.kernel)));
}

// Waits for what was launched; not while a graph is recorded, where nothing runs.
inline cudaError_t waited_for(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  return error != cudaSuccess || status != cudaStreamCaptureStatusNone ? error
                                                                       : cudaStreamSynchronize(stream);
}

template <class Parameters>
void launch(void (*kernel)(const Parameters), const Grid& grid, const Execution& execution,
            const Parameters& parameters) {
  static_assert(sizeof(Parameters) <= 4096);
  check(grid);
  if (grid.blocks == 0) return;
  if (grid.shared_bytes > 48 * 1024) {  // always to the same: another thread may launch the kernel too
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes),
          "shared memory of a kernel");
  }
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
  if (grid.is_dependent && execution.card.has_dependent_launches()) {
    cudaLaunchAttribute& dependent = attributes[config.numAttrs++];
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
  }
  const LaunchRecord launched = record<Parameters>(reinterpret_cast<const void*>(kernel), grid);
  check_launch(cudaLaunchKernelEx(&config, kernel, parameters), launched);
  if (launches_are_waited_for()) check_launch(waited_for(config.stream), launched);
}

#endif

}  // namespace effattn::cuda
