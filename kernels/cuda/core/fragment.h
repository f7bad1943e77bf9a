// Fragments of matrices in the registers of a warp, as mma.sync takes them (device.h).
//
// Of a matrix, 8 lanes share the rows and 4 the columns. What index a register stands for is free wherever a
// product sums over it or its result keeps it, so that a lane holds neighbours, and loads and stores them as
// vectors, straight from global memory.
#pragma once

#include <type_traits>

#include "device.h"

namespace effattn::cuda {

template <class T>
constexpr bool kIsNarrow = sizeof(T) == 2;

// The most that a lane loads at once.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// The index that a register of a lane stands for, if the lane holds kVector neighbours of each kLanes *
// kVector.
template <int kVector, int kLanes>
EFFATTN_DEVICE int position(int reg, int lane) {
  return reg / kVector * (kVector * kLanes) + lane * kVector + reg % kVector;
}

// f(x) for each register of nested arrays.
template <class F>
EFFATTN_DEVICE void each_register(float& x, F f) {
  f(x);
}
template <class Array, int kCount, class F>
EFFATTN_DEVICE void each_register(Array (&arrays)[kCount], F f) {
  EFFATTN_UNROLL
  for (Array& x : arrays) each_register(x, f);
}
// to += from, register by register.
EFFATTN_DEVICE void add_registers(float& to, const float& from) { to += from; }
template <class Array, int kCount>
EFFATTN_DEVICE void add_registers(Array (&to)[kCount], const Array (&from)[kCount]) {
  EFFATTN_UNROLL
  for (int i = 0; i < kCount; ++i) add_registers(to[i], from[i]);
}

EFFATTN_DEVICE int row_lane() { return lane_index() / 4; }
EFFATTN_DEVICE int col_lane() { return lane_index() % 4; }

// Of NaN, NaN.
EFFATTN_DEVICE float relu(float x) { return x <= 0 ? 0.0f : x; }

// Subnormal ones, whose inverse a float may not hold, count as 2^-126: zero times infinity would be NaN.
EFFATTN_DEVICE float clamp_subnormal(float denominator) {
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
    using Access = Words<min(kAccess, kBytes) / 4>;
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
    using Access = Words<min(kAccess, kBytes) / 4>;
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
      return to_float(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
    }
  }
  EFFATTN_DEVICE void set(int i, float x) {
    if constexpr (kInWord == 1) {
      words[i] = bits_of(x);
    } else {
      set_bits(i, from_float<T>(x).bits);
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

// f with the bytes of one access, 16, 4 or 0, as a type.
template <class F>
EFFATTN_DEVICE void with_access(int bytes, F f) {
  if (bytes == 16) {
    f(std::integral_constant<int, 16>{});
  } else if (bytes == 4) {
    f(std::integral_constant<int, 4>{});
  } else {
    f(std::integral_constant<int, 0>{});
  }
}

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
        value = inside ? to_float(from.data[at_row * from.row_stride + at_col * from.col_stride]) : 0.0f;
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
          to.data[at_row * to.row_stride + at_col * to.col_stride] = from_float<T>(value);
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

// Half `which` of a pair.
template <class T>
EFFATTN_DEVICE float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(which == 0 ? pair & 0xffff : pair >> 16)});
}

// A Fragment of a narrow type as it lies in memory: what is converted, or turned to pairs along columns, is
// so where it is used, and nothing waits for a load before.
template <class T, int kRows, int kCols, int kRowVector, int kColVector, bool kAlongRows>
struct PackedFragment {
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
    with_access(access(from), [&](auto bytes) { load_by<bytes()>(from, first_row, first_col); });
  }

 private:
  EFFATTN_DEVICE void put(int r, int c, const Packed<T, kAlong>& packed) {
    EFFATTN_UNROLL
    for (int i = 0; i < kAlong / 2; ++i) {
      x[kAlongRows ? r / 2 + i : r][kAlongRows ? c : c / 2 + i] = packed.words[i];
    }
  }
};

// The sum over the four lanes that share rows.
EFFATTN_DEVICE float sum_of_cols(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}
// The sum over the eight lanes that share columns.
EFFATTN_DEVICE float sum_of_rows(float x) {
  x += shfl_xor(x, 4);
  x += shfl_xor(x, 8);
  return x + shfl_xor(x, 16);
}

}  // namespace effattn::cuda
