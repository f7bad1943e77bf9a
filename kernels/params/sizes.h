// Arithmetic on sizes. Inlined everywhere: a copy that the linker shares between instruction sets could be
// the one that an older processor cannot run.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EFFATTN_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define EFFATTN_INLINE inline __attribute__((always_inline))
#endif

namespace effattn {

EFFATTN_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
EFFATTN_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
EFFATTN_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
EFFATTN_INLINE constexpr int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// The CPU's limit `channels`, of every operator: the largest head_dim and value_dim. The kv_state of a group
// then takes 16 GiB.
constexpr int64_t kMaxDim = 1 << 16;
// Above every side of a kernel or a window: products of a few are far from overflowing.
constexpr int64_t kMaxSide = 1 << 15;

}  // namespace effattn
