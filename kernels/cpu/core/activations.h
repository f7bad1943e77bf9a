// Activations of vectors.
#pragma once

#include "activation.h"
#include "simd.h"

namespace effattn::cpu::EFFATTN_ISA {

// x Phi(x), Phi the normal distribution's integral up to x: half of erfc(-x / sqrt(2)). With Abramowitz and
// Stegun, Handbook of Mathematical Functions, 7.1.26, whose error is at most 1.5e-7; the left half, where the
// result is a small number, is computed and the right half follows from it, so that nothing is lost to
// cancellation.
EFFATTN_INLINE Vec gelu(Vec x) {
  constexpr float kSeries[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  const Vec z = (x < 0.0f ? -x : x) * 0.707106781f;
  const Vec t = 1.0f / (1.0f + 0.3275911f * z);
  Vec series = broadcast(1.061405429f);
  EFFATTN_UNROLL
  for (const float coefficient : kSeries) series = series * t + coefficient;
  const Vec tail = series * t * exp_of_negative(-z * z);
  const Vec left = 0.5f * x * tail;
  return x < 0.0f ? left : tail > 0.0f ? x - left : x;  // infinity stays
}

// e^-|x|, of which logistic functions are made without overflow.
EFFATTN_INLINE Vec exp_of_minus_abs(Vec x) { return exp_of_negative(x < 0.0f ? x : -x); }

// 1 / (1 + e^-x)
EFFATTN_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp_of_minus_abs(x);
  return (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

// x / (1 + e^-x)
EFFATTN_INLINE Vec silu(Vec x) {
  const Vec e = exp_of_minus_abs(x);
  return x * (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

// x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): what 0.5 x (1 + tanh(u)) is.
EFFATTN_INLINE Vec gelu_tanh(Vec x) {
  const Vec u = 1.595769122f * (x + 0.044715f * x * x * x);  // 2 sqrt(2 / pi)
  const Vec e = exp_of_minus_abs(u);
  return x * (u < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

// min(max(x, 0), 6) that lets NaN through.
EFFATTN_INLINE Vec relu6(Vec x) {
  const Vec at_least_0 = relu(x);
  return at_least_0 > 6.0f ? broadcast(6.0f) : at_least_0;
}

// x relu6(x + 3) / 6
EFFATTN_INLINE Vec hardswish(Vec x) { return x * relu6(x + 3.0f) * (1.0f / 6.0f); }

// The dispatch over activations: f(a function of a vector).
template <class F>
EFFATTN_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:
      return f([](Vec x) { return x; });
    case Activation::kRelu:
      return f([](Vec x) { return relu(x); });
    case Activation::kGelu:
      return f([](Vec x) { return gelu(x); });
    case Activation::kRelu6:
      return f([](Vec x) { return relu6(x); });
    case Activation::kHardswish:
      return f([](Vec x) { return hardswish(x); });
    case Activation::kSilu:
      return f([](Vec x) { return silu(x); });
    case Activation::kGeluTanh:
      return f([](Vec x) { return gelu_tanh(x); });
    case Activation::kSigmoid:
      return f([](Vec x) { return sigmoid(x); });
  }
}

}  // namespace effattn::cpu::EFFATTN_ISA
