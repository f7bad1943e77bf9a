// Selects the backend of this compilation: the glue of differentiable operators is one source for CPU and
// CUDA.
#pragma once

// The entry points of an operator's kernels, as its glue includes them: #include EFFATTN_KERNELS(operator).
#define EFFATTN_QUOTED(path) #path
// clang-format off
#ifdef EFFATTN_CUDA
#define EFFATTN_KERNELS(op) EFFATTN_QUOTED(../kernels/cuda/op/api.h)
#include "cuda/backend.h"
#else
#define EFFATTN_KERNELS(op) EFFATTN_QUOTED(../kernels/cpu/op/plan.h)
#include "cpu/backend.h"
#endif
// clang-format on
