// Pieces of matrices in the registers of a warp, as products take them (multiply_tf32 of device.h).
//
// Of a matrix, 8 lanes share the rows and 4 the columns. What index a register stands for is free wherever a
// product sums over it or its result keeps it, so that a lane holds neighbours, and loads and stores them as
// vectors, straight from global memory.
#pragma once

#include <type_traits>

#include "device.h"

namespace effattn::cuda {

// The most that a lane loads at once.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

EFFATTN_INLINE constexpr int least(int a, int b) { return a < b ? a : b; }
EFFATTN_INLINE constexpr int most(int a, int b) { return a < b ? b : a; }

// The index that a register of a lane stands for, if the lane holds kVector neighbours of each kLanes *
// kVector.
template <int kVector, int kLanes>
EFFATTN_DEVICE int position(int reg, int lane) {
  return reg / kVector * (kVector * kLanes) + lane * kVector + reg % kVector;
}

EFFATTN_DEVICE int row_lane() { return lane_index() / 4; }
EFFATTN_DEVICE int col_lane() { return lane_index() % 4; }

// Of NaN, NaN.
EFFATTN_DEVICE float relu(float x) { return x <= 0 ? 0.0f : x; }

// Subnormal ones, whose inverse a float may not hold, count as 2^-126: zero times infinity would be NaN.
EFFATTN_DEVICE float divisible(float denominator) {
  return denominator > 0 && denominator < 0x1p-126f ? 0x1p-126f : denominator;
}

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t words[kWords];
};

// Neighbours in memory; T may be narrower than a word.
template <class T, int kCount>
struct Packed {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static constexpr int kInWord = 4 / static_cast<int>(sizeof(T));
  uint32_t words[kBytes / 4];

  // In accesses of kAccess bytes.
  template <int kAccess>
  EFFATTN_DEVICE void load(const T* from) {
    using Access = Words<least(kAccess, kBytes) / 4>;
    constexpr int step = sizeof(Access) / 4;
    EFFATTN_UNROLL
    for (int i = 0; i < kBytes / 4; i += step) {
      const Access x = load_words<Access>(reinterpret_cast<const char*>(from) + 4 * i);
      EFFATTN_UNROLL
      for (int j = 0; j < step; ++j) words[i + j] = x.words[j];
    }
  }
  template <int kAccess>
  EFFATTN_DEVICE void store(T* to) const {
    using Access = Words<least(kAccess, kBytes) / 4>;
    constexpr int step = sizeof(Access) / 4;
    EFFATTN_UNROLL
    for (int i = 0; i < kBytes / 4; i += step) {
      Access x;
      EFFATTN_UNROLL
      for (int j = 0; j < step; ++j) x.words[j] = words[i + j];
      store_words(reinterpret_cast<char*>(to) + 4 * i, x);
    }
  }
  EFFATTN_DEVICE float get(int i) const {
    if constexpr (kInWord == 1) {
      return float_of(words[i]);
    } else {
      return widened(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
    }
  }
  EFFATTN_DEVICE void set(int i, float x) {
    if constexpr (kInWord == 1) {
      words[i] = bits_of(x);
    } else {
      set_bits(i, narrowed<T>(x).bits);
    }
  }
  // In ascending order.
  EFFATTN_DEVICE void set_bits(int i, uint32_t half) {
    words[i / 2] = i % 2 == 0 ? half : words[i / 2] | half << 16;
  }
};

// Where a matrix lies: strides in elements; `access` bytes can be read at once along the dimension whose
// elements are neighbours (16, 4, or 0 for one element).
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, col_stride;
  int rows, cols;
  int access;
};

// f(row register, column register, address, inside) for each vector of a fragment that lies in a matrix, from
// a row and a column on. The stride along vectors is 1, and a vector is inside as a whole or not at all.
template <int kRows, int kCols, int kRowVector, int kColVector, bool kAlongRows, class U, class F>
EFFATTN_DEVICE void each_vector(const Matrix<U>& m, int first_row, int first_col, F f) {
  const int row = first_row + position<kRowVector, 8>(0, row_lane());
  const int col = first_col + position<kColVector, 4>(0, col_lane());
  U* const begin = m.data + (kAlongRows ? row + col * m.col_stride : row * m.row_stride + col);
  const int64_t stride = kAlongRows ? m.col_stride : m.row_stride;
  constexpr int others = kAlongRows ? kCols : kRows, along = kAlongRows ? kRows : kCols;
  constexpr int vector = kAlongRows ? kRowVector : kColVector;
  const auto place = [](int reg, bool is_along) {
    return is_along == kAlongRows ? position<kRowVector, 8>(reg, 0) : position<kColVector, 4>(reg, 0);
  };
  const auto each = [&](auto is_inside) {
    U* at = begin;  // goes from line to line: its offset from the first one would be a product in 64 bits
    EFFATTN_UNROLL
    for (int other = 0; other < others; ++other) {
      if (other > 0) at += (place(other, false) - place(other - 1, false)) * stride;
      EFFATTN_UNROLL
      for (int i = 0; i < along; i += vector) {
        const int down = kAlongRows ? place(i, true) : place(other, false);
        const int right = kAlongRows ? place(other, false) : place(i, true);
        const bool inside = is_inside() || (row + down < m.rows && col + right < m.cols);
        f(kAlongRows ? i : other, kAlongRows ? other : i, at + place(i, true), inside);
      }
    }
  };
  if (first_row + 8 * kRows <= m.rows && first_col + 4 * kCols <= m.cols) {
    each(std::true_type{});
  } else {
    each(std::false_type{});
  }
}

// Registers of 8 kRows rows and 4 kCols columns. Lanes hold kRowVector rows and kColVector columns that are
// neighbours; those along rows if kAlongRows, else along columns, are so in memory too.
template <class T, int kRows, int kCols, int kRowVector, int kColVector, bool kAlongRows>
struct Fragment {
  static constexpr int kRowRegisters = kRows, kColRegisters = kCols;
  static constexpr int kAllRows = 8 * kRows, kAllCols = 4 * kCols;
  static constexpr bool kExact = sizeof(T) == 2;  // TF32 holds it

  float x[kRows][kCols];

  EFFATTN_DEVICE static int row(int reg) { return position<kRowVector, 8>(reg, row_lane()); }
  EFFATTN_DEVICE static int col(int reg) { return col_of(reg, col_lane()); }
  EFFATTN_DEVICE static int col_of(int reg, int lane) { return position<kColVector, 4>(reg, lane); }

  EFFATTN_DEVICE void clear() {
    each([](float& value, int, int) { value = 0; });
  }
  EFFATTN_DEVICE void relu() {
    each([](float& value, int, int) { value = cuda::relu(value); });
  }
  EFFATTN_DEVICE float get(int row, int col) const { return x[row][col]; }
  // f(value, row register, column register)
  template <class F>
  EFFATTN_DEVICE void each(F f) {
    EFFATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      EFFATTN_UNROLL
      for (int c = 0; c < kCols; ++c) f(x[r][c], r, c);
    }
  }

  // From a row and a column on; zeros outside.
  EFFATTN_DEVICE void load(const Matrix<const T>& from, int first_row, int first_col) {
    const int access = accessible(from, first_row, first_col);
    if (access == 16) {
      load_vectors<16>(from, first_row, first_col);
    } else if (sizeof(T) < 4 && access == 4) {
      load_vectors<4>(from, first_row, first_col);
    } else {
      each([&](float& value, int r, int c) {
        const int at_row = first_row + row(r), at_col = first_col + col(c);
        const bool inside = at_row < from.rows && at_col < from.cols;
        value = inside ? widened(from.data[at_row * from.row_stride + at_col * from.col_stride]) : 0.0f;
      });
    }
  }
  // kVectors: every vector can be stored at once, and is inside as a whole or not at all.
  template <bool kVectors = false>
  EFFATTN_DEVICE void store(const Matrix<T>& to, int first_row, int first_col) {
    if constexpr (kVectors) return store_vectors<16>(to, first_row, first_col);
    const int access = accessible(to, first_row, first_col);
    if (access == 16) {
      store_vectors<16>(to, first_row, first_col);
    } else if (sizeof(T) < 4 && access == 4) {
      store_vectors<4>(to, first_row, first_col);
    } else {
      each([&](float& value, int r, int c) {
        const int at_row = first_row + row(r), at_col = first_col + col(c);
        if (at_row < to.rows && at_col < to.cols) {
          to.data[at_row * to.row_stride + at_col * to.col_stride] = narrowed<T>(value);
        }
      });
    }
  }

 private:
  static constexpr int kAlong = kAlongRows ? kRowVector : kColVector;

  // Whole vectors are inside or outside; the same for all lanes.
  template <class U>
  EFFATTN_DEVICE static int accessible(const Matrix<U>& m, int first_row, int first_col) {
    const int end = kAlongRows ? m.rows : m.cols;
    const int last = kAlongRows ? first_row + kAllRows : first_col + kAllCols;
    if (kAlong * sizeof(T) < 4) return 0;
    return end % kAlong == 0 || last <= end ? m.access : 0;
  }
  template <int kAccess>
  EFFATTN_DEVICE void load_vectors(const Matrix<const T>& from, int first_row, int first_col) {
    if constexpr (kAlong * sizeof(T) >= 4 && kAccess >= sizeof(T)) {
      each_vector<kRows, kCols, kRowVector, kColVector, kAlongRows>(
          from, first_row, first_col, [&](int r, int c, const T* at, bool inside) {
            Packed<T, kAlong> packed{};
            if (inside) packed.template load<kAccess>(at);
            EFFATTN_UNROLL
            for (int i = 0; i < kAlong; ++i)
              x[kAlongRows ? r + i : r][kAlongRows ? c : c + i] = packed.get(i);
          });
    }
  }
  template <int kAccess>
  EFFATTN_DEVICE void store_vectors(const Matrix<T>& to, int first_row, int first_col) const {
    if constexpr (kAlong * sizeof(T) >= 4) {
      each_vector<kRows, kCols, kRowVector, kColVector, kAlongRows>(
          to, first_row, first_col, [&](int r, int c, T* at, bool inside) {
            Packed<T, kAlong> packed;
            EFFATTN_UNROLL
            for (int i = 0; i < kAlong; ++i) packed.set(i, x[kAlongRows ? r + i : r][kAlongRows ? c : c + i]);
            if (inside) packed.template store<kAccess>(at);
          });
    }
  }
};

// --- products ---------------------------------------------------------------------------------------

// The nearest number of TF32, away from zero between two. Of NaN it may be anything: the rest is NaN. In
// integers, since with the conversion's own instruction the assembler splits far ahead, and spills.
EFFATTN_DEVICE float high(float x) { return float_of((bits_of(x) + 0x1000u) & 0xffffe000u); }
// The same of the rest. Nothing is left of infinity.
EFFATTN_DEVICE float low(float x) {
  const float rest = x - high(x);
  return x == high(x) ? 0.0f : rest == rest ? high(rest) : rest;
}
// For the product with a rest, which is no part of infinity times anything.
EFFATTN_DEVICE float finite(float high) { return (bits_of(high) & 0x7f800000u) == 0x7f800000u ? 0.0f : high; }

// c += a b, as exact as float32, of b in two parts. The product of two rests is below the last place.
EFFATTN_DEVICE void multiply_parts(float (&c)[4], const float (&a)[4], const float (&high_b)[2],
                                   const float (&low_b)[2]) {
  const float high_a[4] = {high(a[0]), high(a[1]), high(a[2]), high(a[3])};
  const float finite_a[4] = {finite(high_a[0]), finite(high_a[1]), finite(high_a[2]), finite(high_a[3])};
  const float low_a[4] = {low(a[0]), low(a[1]), low(a[2]), low(a[3])};
  const float finite_b[2] = {finite(high_b[0]), finite(high_b[1])};
  multiply_tf32(c, finite_a, low_b);
  multiply_tf32(c, low_a, finite_b);
  multiply_tf32(c, high_a, high_b);
}

// The same: operands that are not exact in TF32 are taken in two parts.
template <bool kExactA, bool kExactB>
EFFATTN_DEVICE void multiply(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  if constexpr (!kExactA && !kExactB) {
    multiply_parts(c, a, {high(b[0]), high(b[1])}, {low(b[0]), low(b[1])});
  } else if constexpr (!kExactA) {
    multiply_tf32(c, {low(a[0]), low(a[1]), low(a[2]), low(a[3])}, {finite(b[0]), finite(b[1])});
    multiply_tf32(c, {high(a[0]), high(a[1]), high(a[2]), high(a[3])}, b);
  } else if constexpr (!kExactB) {
    multiply_tf32(c, {finite(a[0]), finite(a[1]), finite(a[2]), finite(a[3])}, {low(b[0]), low(b[1])});
    multiply_tf32(c, a, {high(b[0]), high(b[1])});
  } else {
    multiply_tf32(c, a, b);
  }
}

// The sum over the four lanes that share rows.
EFFATTN_DEVICE float sum_of_cols(float x) {
  x += exchange(x, 1);
  return x + exchange(x, 2);
}
// The sum over the eight lanes that share columns.
EFFATTN_DEVICE float sum_of_rows(float x) {
  x += exchange(x, 4);
  x += exchange(x, 8);
  return x + exchange(x, 16);
}

}  // namespace effattn::cuda
