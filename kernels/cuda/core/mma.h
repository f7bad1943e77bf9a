// Products of a warp on tensor cores whose operands are float32, which none of them takes: each number is the
// sum of two, of TF32 or of bfloat16, and the products of the parts are added up in float32.
#pragma once

#include "device.h"

namespace effattn::cuda {

// --- TF32, rounded ----------------------------------------------------------------------------------

// The nearest number of TF32, away from zero between two. Of NaN it may be anything: the rest is NaN. In
// integers, since with the conversion's own instruction the assembler splits far ahead, and spills.
EFFATTN_DEVICE float tf32_high(float x) { return float_of((bits_of(x) + 0x1000u) & 0xffffe000u); }
// The same of the rest. Nothing is left of infinity.
EFFATTN_DEVICE float tf32_low(float x) {
  const float high = tf32_high(x), rest = x - high;
  return x == high ? 0.0f : rest == rest ? tf32_high(rest) : rest;
}
// For the product with a rest: infinity is in the high part's product alone.
EFFATTN_DEVICE float finite(float high) { return (bits_of(high) & 0x7f800000u) == 0x7f800000u ? 0.0f : high; }

// c += a b, as exact as float32, of b in two parts. The product of two rests is below the last place.
EFFATTN_DEVICE void mma_m16n8k8_3xtf32(float (&c)[4], const float (&a)[4], const float (&high_b)[2],
                                       const float (&low_b)[2]) {
  const float high_a[4] = {tf32_high(a[0]), tf32_high(a[1]), tf32_high(a[2]), tf32_high(a[3])};
  const float finite_a[4] = {finite(high_a[0]), finite(high_a[1]), finite(high_a[2]), finite(high_a[3])};
  const float low_a[4] = {tf32_low(a[0]), tf32_low(a[1]), tf32_low(a[2]), tf32_low(a[3])};
  const float finite_b[2] = {finite(high_b[0]), finite(high_b[1])};
  mma_m16n8k8_tf32(c, finite_a, low_b);
  mma_m16n8k8_tf32(c, low_a, finite_b);
  mma_m16n8k8_tf32(c, high_a, high_b);
}

// The same of b as it is. kExactA: TF32 holds a, as it does every number of 16 bits.
template <bool kExactA>
EFFATTN_DEVICE void mma_m16n8k8_float(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  const float high_b[2] = {tf32_high(b[0]), tf32_high(b[1])}, low_b[2] = {tf32_low(b[0]), tf32_low(b[1])};
  if constexpr (kExactA) {
    mma_m16n8k8_tf32(c, {finite(a[0]), finite(a[1]), finite(a[2]), finite(a[3])}, low_b);
    mma_m16n8k8_tf32(c, a, high_b);
  } else {
    mma_m16n8k8_3xtf32(c, a, high_b, low_b);
  }
}

// --- bfloat16 or TF32, truncated --------------------------------------------------------------------

// The rest of x behind its truncated part. It has the sign of x and is zero only if x is, so that infinity
// times both parts of x is infinity, never 0 times infinity or a difference of infinities: that takes 2^-22
// of x, far below what the parts hold.
EFFATTN_DEVICE float rest_behind(float x, float truncated) {
  const float rest = fma_rn(x, 1 + 0x1p-22f, -truncated);
  // Of infinity and NaN the truncated part says it all.
  return rest == rest ? rest : float_of((bits_of(x) & 0x80000000u) | bits_of(0x1p-100f));
}

// Two numbers, each as the sum of two of bfloat16, to 2^-16.
struct BFloat16Parts {
  uint32_t high, low;
};
EFFATTN_DEVICE BFloat16Parts split_bf16(float first, float second) {
  const uint32_t mask = 0xffff0000u;
  const float rest = rest_behind(first, float_of(bits_of(first) & mask));
  const float other = rest_behind(second, float_of(bits_of(second) & mask));
  return {high_halves(bits_of(first), bits_of(second)), pack<BFloat16>(rest, other)};
}
// One number's parts in one word, the high one in the upper half.
EFFATTN_DEVICE float split_word(float x) {
  const uint32_t mask = 0xffff0000u;
  const float rest = rest_behind(x, float_of(bits_of(x) & mask));
  return float_of((bits_of(x) & mask) | from_float<BFloat16>(rest).bits);
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

// An operand of a product of depth 16 by 16 rows or columns: both parts, the high one first.
struct SplitOperand {
  uint32_t parts[2][4];

  EFFATTN_DEVICE void set(int i, float first, float second) {
    const BFloat16Parts pair = split_bf16(first, second);
    parts[0][i] = pair.high;
    parts[1][i] = pair.low;
  }
};

// c += a b, 16 x 16 by 16. The low parts' product is 2^-17 of the whole on average, at most 2^-14, and of one
// sign with it: left out, it would be a bias.
EFFATTN_DEVICE void mma_m16n16k16_split(float (&c)[2][4], const SplitOperand& a, const SplitOperand& b) {
  EFFATTN_UNROLL
  for (int j = 0; j < 2; ++j) {
    EFFATTN_UNROLL
    for (int product = 3; product >= 0; --product) {
      const uint32_t (&of_b)[4] = b.parts[product % 2];
      mma_m16n8k16<BFloat16>(c[j], a.parts[product / 2], {of_b[2 * j], of_b[2 * j + 1]});
    }
  }
}

}  // namespace effattn::cuda
