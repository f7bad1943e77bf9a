// Activations of vectors.
#pragma once

#include "activation.h"
#include "simd.h"

namespace effattn::cpu::EFFATTN_ISA {

// x times a step from 0 to 1 that is 1/2 + x p(x^2), p a polynomial in w = 2 x^2 / reach^2 - 1, which goes
// from -1 to 1; beyond `reach` the step is 0 or 1. The coefficients are those of a Chebyshev series fitted to
// the step, highest power first: errors are below 8e-7, without an exponential or a division.
template <int N>
EFFATTN_INLINE Vec times_step(Vec x, float reach, const float (&coefficients)[N]) {
  const Vec w = x * x * (2.0f / (reach * reach)) - 1.0f;
  Vec p = broadcast(coefficients[0]);
  EFFATTN_UNROLL
  for (int i = 1; i < N; ++i) p = p * w + coefficients[i];
  Vec step = x * p + 0.5f;
  step = x > reach ? broadcast(1.0f) : step;
  step = x < -reach ? Vec{} : step;  // times -infinity it is NaN, as torch has it
  return x * step;
}

// x Phi(x), Phi the normal distribution's integral up to x.
EFFATTN_INLINE Vec gelu(Vec x) {
  constexpr float kCoefficients[] = {2.590473450e-04f, -6.699030055e-04f, 6.054984406e-04f, -1.000344055e-03f,
                                     2.963596722e-03f, -5.492474418e-03f, 8.376075886e-03f, -1.275184005e-02f,
                                     1.855097897e-02f, -2.504791506e-02f, 3.202975541e-02f, -3.976276889e-02f,
                                     4.964586720e-02f, -6.712683290e-02f, 1.346593499e-01f};
  return times_step(x, 5.25f, kCoefficients);
}

// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
EFFATTN_INLINE Vec gelu_tanh(Vec x) {
  constexpr float kCoefficients[] = {
      -5.189661752e-04f, 6.661035586e-04f,  1.457572565e-03f,  -2.207075479e-03f, -7.195257349e-04f,
      8.218166186e-04f,  2.946685301e-03f,  -4.892583936e-03f, 6.001018453e-03f,  -9.832654148e-03f,
      1.589481533e-02f,  -2.312791720e-02f, 3.137564659e-02f,  -4.053283483e-02f, 5.165538192e-02f,
      -7.036602497e-02f, 1.413785368e-01f};
  return times_step(x, 5.0f, kCoefficients);
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
