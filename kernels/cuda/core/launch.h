// How kernels are launched.
#pragma once

#include <sstream>
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

constexpr int64_t kMaxBlocks = INT32_MAX;
// Of shared memory: the least that a GPU since 8.0 lets a block have, less what it keeps.
constexpr int kMaxSharedBytes = 98 * 1024;

// Fails with the rest streamed together, unless the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  text << "effattn: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline void check(const Grid& grid) {
  if (grid.blocks > kMaxBlocks) {
    throw std::runtime_error("effattn: too large for one launch, " + std::to_string(grid.blocks) + " blocks");
  }
  if (grid.shared_bytes > kMaxSharedBytes || grid.blocks % grid.cluster != 0) {
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

#ifndef EFFATTN_EMULATED
// device_only/gpu.cu
void launch(const LaunchRecord& launched, const Grid& grid, const Execution& execution, void* parameters);
#endif

template <class Kernel, class Parameters>
void launch(Kernel* kernel, const Grid& grid, const Execution& execution, Parameters parameters) {
  static_assert(sizeof(Parameters) <= 4096);
  check(grid);
  if (grid.blocks == 0) return;
  [[maybe_unused]] const LaunchRecord launched =
      record<Parameters>(reinterpret_cast<const void*>(kernel), grid);
#ifdef EFFATTN_EMULATED
  static_cast<void>(execution);
  emulate({grid.blocks, grid.threads, grid.shared_bytes, grid.cluster, grid.is_dependent,
           [kernel, parameters] { kernel(parameters); }});
#else
  launch(launched, grid, execution, &parameters);
#endif
}

}  // namespace effattn::cuda
