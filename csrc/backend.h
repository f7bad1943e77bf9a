// The backend that the glue of an operator is compiled for: that of the five functions is the same for all.
#pragma once

#ifdef EFFATTN_CUDA
#include "cuda/backend.h"
#else
#include "cpu/backend.h"
#endif
