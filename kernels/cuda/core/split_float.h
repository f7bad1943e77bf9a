// Narrow operands of products, as pairs in registers: tiles from memory, and float32 numbers in two parts.
#pragma once

#include "fragment.h"

namespace effattn::cuda {

template <class T>
constexpr bool kIsNarrow = sizeof(T) == 2;

// --- float32 in two parts ---------------------------------------------------------------------------

// The rest of x behind its truncated part. It has the sign of x and is zero only if x is, so that infinity
// times both parts of x is infinity, never 0 times infinity or a difference of infinities: that takes 2^-22
// of x, far below what the parts hold.
EFFATTN_DEVICE float rest_behind(float x, float truncated) {
  const float rest = fused_multiply_add(x, 1 + 0x1p-22f, -truncated);
  // Of infinity and NaN the truncated part says it all.
  return rest == rest ? rest : float_of((bits_of(x) & 0x80000000u) | bits_of(0x1p-100f));
}

// Two numbers, each as the sum of two of bfloat16, to 2^-16.
struct BFloat16Parts {
  uint32_t high, low;
};
EFFATTN_DEVICE BFloat16Parts split(float first, float second) {
  const uint32_t mask = 0xffff0000u;
  const float rest = rest_behind(first, float_of(bits_of(first) & mask));
  const float other = rest_behind(second, float_of(bits_of(second) & mask));
  return {high_halves(bits_of(first), bits_of(second)), pack<BFloat16>(rest, other)};
}
// One number's parts in one word, the high one in the upper half.
EFFATTN_DEVICE float split_word(float x) {
  const uint32_t mask = 0xffff0000u;
  const float rest = rest_behind(x, float_of(bits_of(x) & mask));
  return float_of((bits_of(x) & mask) | narrowed<BFloat16>(rest).bits);
}

// A number as the sum of two of TF32, to 2^-20.
struct Tf32Parts {
  float high, low;
};
EFFATTN_DEVICE Tf32Parts split_tf32(float x) {
  const uint32_t mask = 0xffffe000u;
  const float truncated = float_of(bits_of(x) & mask);
  return {truncated, float_of(bits_of(rest_behind(x, truncated)) & mask)};
}

// --- tiles ------------------------------------------------------------------------------------------

// Half `which` of a pair.
template <class T>
EFFATTN_DEVICE float half_of(uint32_t pair, int which) {
  return widened(T{static_cast<uint16_t>(which == 0 ? pair & 0xffff : pair >> 16)});
}

// A Fragment of a narrow type as it lies in memory: what is converted, or turned to pairs along columns, is
// so where it is used, and nothing waits for a load before.
template <class T, int kRows, int kCols, int kRowVector, int kColVector, bool kAlongRows>
struct PairFragment {
  using Place = Fragment<T, kRows, kCols, kRowVector, kColVector, kAlongRows>;
  static constexpr int kRowRegisters = kRows, kColRegisters = kCols;
  static constexpr int kAllRows = Place::kAllRows, kAllCols = Place::kAllCols;
  static constexpr bool kExact = true;
  static constexpr int kAlong = kAlongRows ? kRowVector : kColVector;
  static_assert(kAlong % 2 == 0);

  // Neighbours along the contiguous dimension.
  uint32_t x[kAlongRows ? kRows / 2 : kRows][kAlongRows ? kCols : kCols / 2];

  EFFATTN_DEVICE static int row(int reg) { return Place::row(reg); }
  EFFATTN_DEVICE static int col(int reg) { return Place::col(reg); }
  EFFATTN_DEVICE static int col_of(int reg, int lane) { return Place::col_of(reg, lane); }

  // Elements (row, 2 i) and (row, 2 i + 1), of registers.
  EFFATTN_DEVICE uint32_t pair(int row, int i) const {
    if constexpr (kAlongRows) {
      const uint32_t a = x[row / 2][2 * i], b = x[row / 2][2 * i + 1];
      return row % 2 == 0 ? low_halves(a, b) : high_halves(a, b);
    } else {
      return x[row][i];
    }
  }
  EFFATTN_DEVICE float get(int row, int col) const {
    return kAlongRows ? half_of<T>(x[row / 2][col], row % 2) : half_of<T>(x[row][col / 2], col % 2);
  }
  EFFATTN_DEVICE void relu() {
    EFFATTN_UNROLL
    for (auto& of_row : x) {
      EFFATTN_UNROLL
      for (uint32_t& pair : of_row) pair = relu_pair<T>(pair);
    }
  }
  // f(value, row register, column register)
  template <class F>
  EFFATTN_DEVICE void each(F f) const {
    EFFATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      EFFATTN_UNROLL
      for (int c = 0; c < kCols; ++c) f(get(r, c), r, c);
    }
  }

  // The bytes of one access, for all of a matrix.
  EFFATTN_DEVICE static int access(const Matrix<const T>& from) {
    return (kAlongRows ? from.rows : from.cols) % kAlong == 0 ? from.access : 0;
  }
  // From a row and a column on; zeros outside. kAccess: at most that of the matrix.
  template <int kAccess>
  EFFATTN_DEVICE void load_by(const Matrix<const T>& from, int first_row, int first_col) {
    if constexpr (kAccess > 0) {
      each_vector<kRows, kCols, kRowVector, kColVector, kAlongRows>(
          from, first_row, first_col, [&](int r, int c, const T* at, bool inside) {
            Packed<T, kAlong> packed{};
            if (inside) packed.template load<kAccess>(at);
            put(r, c, packed);
          });
    } else {
      EFFATTN_UNROLL
      for (int r = 0; r < kRows; r += kAlongRows ? kAlong : 1) {
        EFFATTN_UNROLL
        for (int c = 0; c < kCols; c += kAlongRows ? 1 : kAlong) {
          Packed<T, kAlong> packed;
          EFFATTN_UNROLL
          for (int i = 0; i < kAlong; ++i) {
            const int at_row = first_row + row(kAlongRows ? r + i : r),
                      at_col = first_col + col(kAlongRows ? c : c + i);
            const bool inside = at_row < from.rows && at_col < from.cols;
            packed.set_bits(i,
                            inside ? from.data[at_row * from.row_stride + at_col * from.col_stride].bits : 0);
          }
          put(r, c, packed);
        }
      }
    }
  }
  // kVectors: every vector can be loaded at once, and is inside as a whole or not at all.
  template <bool kVectors = false>
  EFFATTN_DEVICE void load(const Matrix<const T>& from, int first_row, int first_col) {
    if constexpr (kVectors) return load_by<16>(from, first_row, first_col);
    const int bytes = access(from);
    if (bytes == 16) {
      load_by<16>(from, first_row, first_col);
    } else if (bytes == 4) {
      load_by<4>(from, first_row, first_col);
    } else {
      load_by<0>(from, first_row, first_col);
    }
  }

 private:
  EFFATTN_DEVICE void put(int r, int c, const Packed<T, kAlong>& packed) {
    EFFATTN_UNROLL
    for (int i = 0; i < kAlong / 2; ++i) {
      x[kAlongRows ? r / 2 + i : r][kAlongRows ? c : c / 2 + i] = packed.words[i];
    }
  }
};

}  // namespace effattn::cuda
