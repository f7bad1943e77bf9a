// The narrow SIMD layer: one vector type of kLanes floats, its loads and stores in every storage
// type, and the few operations whose exact semantics matter. Written with compiler vector types, so
// that the same source serves every instruction set, and a wide source also builds for a narrow one
// (the compiler then splits each vector); intrinsics stand only where they are much better.
//
// Included once per instruction set with EFFATTN_ISA (a name) and EFFATTN_LANES (floats per vector)
// defined. Everything lives in a namespace of that name and nothing here uses the standard library's
// code: an inline function shared between instruction sets would be merged by the linker, and the
// baseline could end up executing AVX-512.
#pragma once

#include <cstdint>
#include <utility>  // index_sequence: types only, no code

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../../params/dtype.h"
#include "../../params/sizes.h"

// Before loops over vectors of a register block: their bounds are constants, and only an unrolled block
// stays in registers.
#ifndef EFFATTN_UNROLL
#define EFFATTN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace effattn::cpu::EFFATTN_ISA {

constexpr int kLanes = EFFATTN_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
// The same types as they may lie in memory: aligned to an element only, aliasing anything.
typedef float VecMem __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t VecHMem __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

EFFATTN_INLINE Vec broadcast(float x) {
#if defined(__AVX512F__) && EFFATTN_LANES == 16
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__) && EFFATTN_LANES == 8
  return (Vec)_mm256_set1_ps(x);
#elif defined(__aarch64__) && EFFATTN_LANES == 4
  return (Vec)vdupq_n_f32(x);
#else
  Vec v;
  EFFATTN_UNROLL
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
#endif
}

// Keeps the compiler from loading a vector anew for each of its uses: unaligned, it may lie across two lines.
EFFATTN_INLINE Vec in_register(Vec x) {
#if defined(__AVX512F__) && EFFATTN_LANES == 16
  asm("" : "+v"(x));
#elif defined(__AVX2__) && EFFATTN_LANES == 8
  asm("" : "+x"(x));
#elif defined(__aarch64__) && EFFATTN_LANES == 4
  asm("" : "+w"(x));
#endif
  return x;
}

// max(x, 0) that lets NaN through, as torch.relu does: a NaN in the input must not be hidden.
EFFATTN_INLINE Vec relu(Vec x) {
#if defined(__AVX512F__) && EFFATTN_LANES == 16
  return (Vec)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x);
#elif defined(__AVX2__) && EFFATTN_LANES == 8
  return (Vec)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x);
#elif defined(__SSE2__) && EFFATTN_LANES == 4
  return (Vec)_mm_max_ps(_mm_setzero_ps(), (__m128)x);
#elif defined(__aarch64__) && EFFATTN_LANES == 4
  return (Vec)vmaxq_f32((float32x4_t)x, vdupq_n_f32(0.0f));
#else
  return x < 0.0f ? Vec{} : x;
#endif
}

// grad where relu'd > 0 or NaN, else 0: what PyTorch's threshold_backward computes. A select, never
// a product, so that an infinite gradient of a dead unit is dropped.
EFFATTN_INLINE Vec relu_gate(Vec relu_x, Vec grad) { return relu_x <= 0.0f ? Vec{} : grad; }

// e^x for x <= 0, within two units of rounding; NaN stays NaN, below -87 it is 0. With n = round(x / ln 2)
// and r = x - n ln 2, which lies in -0.35 to 0.35, e^x = 2^n e^r, and the series of e^r ends where float
// does.
EFFATTN_INLINE Vec exp_of_negative(Vec x) {
  constexpr float kLowest = -87.0f;    // 2^n is a normal number down to here
  constexpr float kMagic = 0x1.8p23f;  // added, it leaves the nearest integer in the lowest bits
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the high part times n is exact
  constexpr float kSeries[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
  const Vec clamped = x < kLowest ? broadcast(kLowest) : x;
  const Vec shifted = clamped * 1.44269504f + kMagic;
  const Vec n = shifted - kMagic;
  const Vec r = (clamped - n * kLn2High) - n * kLn2Low;
  Vec series = broadcast(1.0f / 5040.0f);
  EFFATTN_UNROLL
  for (const float coefficient : kSeries) series = series * r + coefficient;
  const Vec power = (Vec)(((VecI)shifted + 127) << 23);  // 2^n: only the exponent's bits stay
  return x < kLowest ? Vec{} : series * power;
}

// The number of each lane.
EFFATTN_INLINE Vec lane_numbers() {
  Vec numbers;
  EFFATTN_UNROLL
  for (int i = 0; i < kLanes; ++i) numbers[i] = static_cast<float>(i);
  return numbers;
}

// --- storage types -------------------------------------------------------------------------------

EFFATTN_INLINE Vec half_to_float(VecH h) {
#if defined(__AVX512F__) && EFFATTN_LANES == 16
  return (Vec)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__) && EFFATTN_LANES == 8
  return (Vec)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__) && EFFATTN_LANES == 4
  return (Vec)vcvt_f32_f16((float16x4_t)h);
#else
  // Integer arithmetic only, so that it holds with denormals flushed too.
  VecU bits = __builtin_convertvector(h, VecU);
  VecU magnitude = bits & 0x7fffu;
  VecU normal = (magnitude << 13) + (112u << 23);
  normal = magnitude >= 0x7c00u ? normal + (112u << 23) : normal;
  Vec tiny = __builtin_convertvector((VecI)magnitude, Vec) * 0x1p-24f;
  VecU out = magnitude < 0x400u ? (VecU)tiny : normal;
  return (Vec)(out | ((bits & 0x8000u) << 16));
#endif
}

EFFATTN_INLINE VecH float_to_half(Vec x) {
#if defined(__AVX512F__) && EFFATTN_LANES == 16
  return (VecH)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && EFFATTN_LANES == 8
  return (VecH)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__) && EFFATTN_LANES == 4
  return (VecH)vcvt_f16_f32((float32x4_t)x);
#else
  VecU bits = (VecU)x;
  VecU magnitude = bits & 0x7fffffffu;
  VecU normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 lets the adder round to multiples of 2^-24, the spacing of half's subnormals.
  VecU tiny = (VecU)((Vec)magnitude + 0.5f) - 0x3f000000u;
  VecU out = magnitude < 0x38800000u ? tiny : normal;
  out = magnitude >= 0x477ff000u ? VecU{} + 0x7c00u : out;
  out = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : out;
  return __builtin_convertvector(out | ((bits >> 16) & 0x8000u), VecH);
#endif
}

EFFATTN_INLINE Vec bfloat_to_float(VecH h) { return (Vec)(__builtin_convertvector(h, VecU) << 16); }

EFFATTN_INLINE VecH float_to_bfloat(Vec x) {
  VecU bits = (VecU)x;
  VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  rounded = x != x ? VecU{} + 0x7fc0u : rounded;                // rounding could carry NaN into Inf
  return __builtin_convertvector(rounded, VecH);
}

EFFATTN_INLINE Vec load(const float* p) { return (Vec)(*reinterpret_cast<const VecMem*>(p)); }
EFFATTN_INLINE Vec load(const Float16* p) {
  return half_to_float((VecH)(*reinterpret_cast<const VecHMem*>(p)));
}
EFFATTN_INLINE Vec load(const BFloat16* p) {
  return bfloat_to_float((VecH)(*reinterpret_cast<const VecHMem*>(p)));
}

EFFATTN_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecMem*>(p) = (VecMem)x; }
EFFATTN_INLINE void store(Float16* p, Vec x) { *reinterpret_cast<VecHMem*>(p) = (VecHMem)float_to_half(x); }
EFFATTN_INLINE void store(BFloat16* p, Vec x) {
  *reinterpret_cast<VecHMem*>(p) = (VecHMem)float_to_bfloat(x);
}

#if defined(__AVX2__) && EFFATTN_LANES == 8
// All ones in the first n lanes.
EFFATTN_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first n lanes; lanes behind them read as 0 and are not written. n may be 0 to kLanes.
template <class T>
EFFATTN_INLINE Vec load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
#if defined(__AVX512F__) && EFFATTN_LANES == 16
  const __mmask16 mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) {
    return (Vec)_mm512_maskz_loadu_ps(mask, p);
  } else {
    T whole[kLanes];
    _mm256_storeu_si256((__m256i*)whole, _mm256_maskz_loadu_epi16(mask, p));
    return load(whole);
  }
#elif defined(__AVX2__) && EFFATTN_LANES == 8
  if constexpr (sizeof(T) == 4) return (Vec)_mm256_maskload_ps(p, first_lanes(n));
#endif
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
EFFATTN_INLINE void store_first(T* p, Vec x, int64_t n) {
  if (n >= kLanes) return store(p, x);
#if defined(__AVX512F__) && EFFATTN_LANES == 16
  const __mmask16 mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_storeu_ps(p, mask, (__m512)x);
  } else {
    T whole[kLanes];
    store(whole, x);
    return _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256((const __m256i*)whole));
  }
#elif defined(__AVX2__) && EFFATTN_LANES == 8
  if constexpr (sizeof(T) == 4) return _mm256_maskstore_ps(p, first_lanes(n), (__m256)x);
#endif
  T lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// One element, through the same conversions.
template <class T>
EFFATTN_INLINE float load_one(const T* p) {
  if constexpr (sizeof(T) == 4) return *p;
  return load_first(p, 1)[0];
}

template <class T>
EFFATTN_INLINE void store_one(T* p, float x) {
  if constexpr (sizeof(T) == 4) {
    *p = x;
  } else {
    store_first(p, broadcast(x), 1);
  }
}

// --- transposition -------------------------------------------------------------------------------

// A vector is kLanes / 4 quads of four floats; shuffles inside quads and of whole quads are what every
// instruction set has. A transposition moves quads first, then floats inside them.

#define EFFATTN_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, (index)...)

template <int... J>
EFFATTN_INLINE void move_quads(Vec (&rows)[kLanes], std::integer_sequence<int, J...>) {
  // The even or the odd quads of two vectors, one vector's behind the other's.
  const auto even = [](Vec a, Vec b) { return EFFATTN_SHUFFLE(a, b, J / 4 * 8 + J % 4); };
  const auto odd = [](Vec a, Vec b) { return EFFATTN_SHUFFLE(a, b, J / 4 * 8 + J % 4 + 4); };
  EFFATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (kLanes == 8) {
      const Vec a = rows[i], b = rows[i + 4];
      rows[i] = even(a, b);
      rows[i + 4] = odd(a, b);
    }
    if constexpr (kLanes == 16) {
      const Vec low_even = even(rows[i], rows[i + 4]), low_odd = odd(rows[i], rows[i + 4]);
      const Vec high_even = even(rows[i + 8], rows[i + 12]), high_odd = odd(rows[i + 8], rows[i + 12]);
      rows[i] = even(low_even, high_even);
      rows[i + 4] = even(low_odd, high_odd);
      rows[i + 8] = odd(low_even, high_even);
      rows[i + 12] = odd(low_odd, high_odd);
    }
  }
}

template <int... J>
EFFATTN_INLINE void transpose_quads(Vec (&rows)[kLanes], std::integer_sequence<int, J...>) {
  EFFATTN_UNROLL
  for (int i = 0; i < kLanes; i += 4) {
    const Vec a = rows[i], b = rows[i + 1], c = rows[i + 2], d = rows[i + 3];
    // unpack: a0 b0 a1 b1 and a2 b2 a3 b3 of each quad
    const Vec ab_low = EFFATTN_SHUFFLE(a, b, J - J % 4 + J % 4 / 2 + J % 2 * kLanes);
    const Vec ab_high = EFFATTN_SHUFFLE(a, b, J - J % 4 + J % 4 / 2 + J % 2 * kLanes + 2);
    const Vec cd_low = EFFATTN_SHUFFLE(c, d, J - J % 4 + J % 4 / 2 + J % 2 * kLanes);
    const Vec cd_high = EFFATTN_SHUFFLE(c, d, J - J % 4 + J % 4 / 2 + J % 2 * kLanes + 2);
    // pairs: the first, then the second two elements of each quad
    rows[i] = EFFATTN_SHUFFLE(ab_low, cd_low, J % 4 < 2 ? J : J - 2 + kLanes);
    rows[i + 1] = EFFATTN_SHUFFLE(ab_low, cd_low, J % 4 < 2 ? J + 2 : J + kLanes);
    rows[i + 2] = EFFATTN_SHUFFLE(ab_high, cd_high, J % 4 < 2 ? J : J - 2 + kLanes);
    rows[i + 3] = EFFATTN_SHUFFLE(ab_high, cd_high, J % 4 < 2 ? J + 2 : J + kLanes);
  }
}

constexpr std::make_integer_sequence<int, kLanes> kEachLane{};

EFFATTN_INLINE void transpose(Vec (&rows)[kLanes]) {
  static_assert(kLanes == 4 || kLanes == 8 || kLanes == 16);
  move_quads(rows, kEachLane);
  transpose_quads(rows, kEachLane);
}

// rows[j][i] = p[i * stride + j]: kLanes x kLanes elements, transposed on their way in.
template <class T>
EFFATTN_INLINE void load_transposed(Vec (&rows)[kLanes], const T* p, int64_t stride) {
#if defined(__AVX512F__) && EFFATTN_LANES == 16
  if constexpr (sizeof(T) == 4) {
    // Quads find their place by loading, which leaves the one shuffle port to the rest.
    EFFATTN_UNROLL
    for (int j = 0; j < 4; ++j, p += stride) {
      const float *const second = p + 4 * stride, *const third = p + 8 * stride,
                         *const fourth = second + 8 * stride;
      EFFATTN_UNROLL
      for (int q = 0; q < 4; ++q) {
        __m512 row = _mm512_castps128_ps512(_mm_loadu_ps(p + 4 * q));
        row = _mm512_insertf32x4(row, _mm_loadu_ps(second + 4 * q), 1);
        row = _mm512_insertf32x4(row, _mm_loadu_ps(third + 4 * q), 2);
        rows[4 * q + j] = (Vec)_mm512_insertf32x4(row, _mm_loadu_ps(fourth + 4 * q), 3);
      }
    }
    return transpose_quads(rows, kEachLane);
  }
#endif
  EFFATTN_UNROLL
  for (int i = 0; i < kLanes; ++i) rows[i] = load(p + i * stride);
  transpose(rows);
}

// Of each group of (up to) four units of `Unit` floats: (a0 + a1, a2 + a3, b0 + b1, b2 + b3).
template <int Unit, int... J>
EFFATTN_INLINE Vec add_pairs(Vec a, Vec b, std::integer_sequence<int, J...>) {
  // (a0, a2, b0, b2) + (a1, a3, b1, b3), of units
  constexpr int kUnits = Unit == 1 ? 4 : kLanes / 4;
  constexpr int kGroup = Unit * kUnits;
  return EFFATTN_SHUFFLE(a, b,
                         J / kGroup * kGroup + J % kGroup / Unit % (kUnits / 2) * 2 * Unit + J % Unit +
                             J % kGroup / (kGroup / 2) * kLanes) +
         EFFATTN_SHUFFLE(a, b,
                         J / kGroup * kGroup + (J % kGroup / Unit % (kUnits / 2) * 2 + 1) * Unit + J % Unit +
                             J % kGroup / (kGroup / 2) * kLanes);
}

// Lane i of the result is the sum over the lanes of rows[i], always in the same order.
EFFATTN_INLINE Vec sum_lanes(Vec (&rows)[kLanes]) {
  if constexpr (kLanes == 16) {
    EFFATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      rows[i] = add_pairs<4>(add_pairs<4>(rows[i], rows[i + 4], kEachLane),
                             add_pairs<4>(rows[i + 8], rows[i + 12], kEachLane), kEachLane);
    }
  }
  if constexpr (kLanes == 8) {
    EFFATTN_UNROLL
    for (int i = 0; i < 4; ++i) rows[i] = add_pairs<4>(rows[i], rows[i + 4], kEachLane);
  }
  return add_pairs<1>(add_pairs<1>(rows[0], rows[1], kEachLane), add_pairs<1>(rows[2], rows[3], kEachLane),
                      kEachLane);
}

}  // namespace effattn::cpu::EFFATTN_ISA
