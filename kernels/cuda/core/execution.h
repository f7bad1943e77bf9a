// What a call runs on, without knowing whose stream and whose memory it is given.
#pragma once

#include <cstdint>

namespace effattn::cuda {

// What a plan depends on beside the sizes of a params.
struct Gpu {
  int capability;  // 90 for 9.0; of what the kernels are compiled for, if that is less
  int multiprocessors;

  bool has_clusters() const { return capability >= 90; }
  bool has_dependent_launches() const { return capability >= 90; }
};

// Of the device with this number, which is the current one; asked for once.
Gpu gpu(int device);
// Why the driver cannot run what this was compiled with, or nothing.
const char* unfit_driver();
// For the runtime that this library is linked with, which may be another copy than torch's.
void make_current(int device);

struct Execution {
  void* stream;
  Gpu gpu;
  void* owner;
  float* (*allocate)(void* owner, int64_t floats);

  // Workspace, which lasts as long as the launches that follow on the stream. Its size is that of the plan.
  float* workspace(int64_t floats) const { return floats > 0 ? allocate(owner, floats) : nullptr; }
};

}  // namespace effattn::cuda
