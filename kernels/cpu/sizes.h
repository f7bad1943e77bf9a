// Arithmetic on sizes. Inlined everywhere: a copy that the linker shares between instruction sets could be
// the one that an older processor cannot run.
#pragma once

#include <cstdint>

#define EFFATTN_INLINE inline __attribute__((always_inline))

namespace effattn::cpu {

EFFATTN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
EFFATTN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
EFFATTN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
EFFATTN_INLINE int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

}  // namespace effattn::cpu
