// What a product multiplies: scalars on the left, vectors on the right, and how its loop walks over them.
#pragma once

#include "tile.h"

namespace effattn::cpu::EFFATTN_ISA {

// The register block: kRows x 3 sums (kRowsIfOneVector x 1, to have enough sums under way), 3 vectors of b
// and one scalar of a must fit the register file (32 registers with AVX-512 and NEON, 16 before).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kRowsIfOneVector = 16;
#else
constexpr int kRows = 4, kRowsIfOneVector = 8;
#endif

// a(r, p) = data[r + p * stride]: the scalars of a step are neighbours.
struct RowsAdjacent {
  const float* data;
  int64_t stride;

  static constexpr int kMaxRows = kRowsIfOneVector;
  template <int R>
  struct Cursor {
    static constexpr int kSteps = 1;
    const float* at;
    int64_t stride;
    EFFATTN_INLINE Cursor(const RowsAdjacent& a, int64_t row) : at(a.data + row), stride(a.stride) {}
    EFFATTN_INLINE float operator()(int r, int) const { return at[r]; }
    EFFATTN_INLINE void advance(int steps) { at += steps * stride; }
  };
};

// a(r, p) = data[r * stride + p]: the scalars of a row are neighbours. With many steps it pays to give every
// row a pointer of its own and to take several steps at once: an address is a register and a constant then,
// which is what a processor multiplies with straight from memory. With few, every fourth row has a pointer.
template <bool ManySteps>
struct StepsAdjacent {
  const float* data;
  int64_t stride;

  static constexpr int kMaxRows = ManySteps ? 8 : kRowsIfOneVector;
  template <int R>
  struct Cursor {
    static constexpr int kSteps = ManySteps ? 8 : 1, kRowsPerPointer = ManySteps ? 1 : 4;
    static constexpr int kPointers = (R + kRowsPerPointer - 1) / kRowsPerPointer;
    const float* rows[kPointers];
    int64_t stride;
    EFFATTN_INLINE Cursor(const StepsAdjacent& a, int64_t row) : stride(a.stride) {
      EFFATTN_UNROLL
      for (int i = 0; i < kPointers; ++i) rows[i] = a.data + (row + i * kRowsPerPointer) * a.stride;
    }
    EFFATTN_INLINE float operator()(int r, int step) const {
      return rows[r / kRowsPerPointer][r % kRowsPerPointer * stride + step];
    }
    EFFATTN_INLINE void advance(int steps) {
      EFFATTN_UNROLL
      for (int i = 0; i < kPointers; ++i) {
        rows[i] += steps;
        if (ManySteps) asm("" : "+r"(rows[i]));
      }
    }
  };
};

// b[p][c] = data[p * row_stride + c], converted to float and relu'd if asked.
template <class T = float, bool Relu = false>
struct Vectors {
  const T* data;
  int64_t row_stride;

  static EFFATTN_INLINE Vec at(const T* p) { return activate<Relu>(load(p)); }
};

// Relu'd vectors are relu'd again for every block of rows; up to so many rows that is cheaper than a copy.
constexpr int64_t kRowsWithoutCopy = 4 * kRows;

}  // namespace effattn::cpu::EFFATTN_ISA
