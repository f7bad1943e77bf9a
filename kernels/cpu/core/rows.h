// Matrices of floats: tokens or channels in rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../params/sizes.h"

namespace effattn::cpu {

constexpr int64_t kWholeVectors = 16;  // floats, a multiple of every instruction set's vector

template <class Float>
struct Rows {
  Float* data;
  int64_t stride;

  EFFATTN_INLINE Float* row(int64_t r) const { return data + r * stride; }
  EFFATTN_INLINE Rows from(int64_t row, int64_t column = 0) const {
    return {data + row * stride + column, stride};
  }
  EFFATTN_INLINE operator Rows<const Float>() const
    requires(!std::is_const_v<Float>)
  {
    return {data, stride};
  }
};

inline void add(float* total, const float* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += part[i];
}

inline void copy(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

inline void clear(float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
}

}  // namespace effattn::cpu
