// How kernels are launched.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"
#include "execution.h"

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

#ifdef EFFATTN_EMULATED

template <class Parameters>
void launch(void (*kernel)(const Parameters&), const Grid& grid, const Execution&,
            const Parameters& parameters) {
  check(grid);
  struct Call {
    void (*kernel)(const Parameters&);
    const Parameters& parameters;
  } call{kernel, parameters};
  const auto body = [](const void* context) {
    const Call& c = *static_cast<const Call*>(context);
    c.kernel(c.parameters);
  };
  emulate(grid.blocks, grid.threads, grid.shared_bytes, grid.cluster, grid.is_dependent, body, &call);
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which would be the next call's otherwise
  throw std::runtime_error(std::string("effattn: ") + what + ": " + cudaGetErrorString(error));
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
  check(cudaLaunchKernelEx(&config, kernel, parameters), "launch of a kernel");
}

#endif

}  // namespace effattn::cuda
