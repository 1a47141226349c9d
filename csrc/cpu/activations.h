// SiLU and the GELUs, x phi(x) with phi between 0 and 1, on vectors: for passes of their own and behind a product.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace minidiff::MINIDIFF_ISA {

// The normal distribution function, by erfc(z) = t exp(-z^2 + polynomial of t), t = 1 / (1 + z / 2), z >= 0, a Chebyshev
// fit with a relative error below 1.2e-7: Press et al., Numerical Recipes, section 6.2.
INLINE vf normal_cdf(vf x) {
  vf z = (x < 0 ? -x : x) * 0.70710678f;
  vf t = 1.0f / (1.0f + 0.5f * z);
  vf p = all(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  vf half_erfc = 0.5f * t * vexp(p - z * z);
  return x < 0 ? half_erfc : 1.0f - half_erfc;
}

// Phi(x), by which a GELU multiplies x, and its derivative.
template <int KIND>
INLINE void gate(vf x, vf& phi, vf& slope) {
  if constexpr (KIND == GELU_EXACT) {
    phi = normal_cdf(x);
    slope = 0.39894228f * vexp(-0.5f * x * x);
  } else if constexpr (KIND == GELU_TANH) {  // (1 + tanh u) / 2 = sigmoid(2 u)
    phi = vsigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    slope = phi * (1.0f - phi) * 1.59576912f * (1.0f + 0.134145f * x * x);
  } else {
    constexpr float k = KIND == GELU_QUICK ? 1.702f : 1.0f;
    phi = vsigmoid(k * x);
    slope = k * phi * (1.0f - phi);
  }
}

template <int KIND>
INLINE vf activated(vf x) {
  vf phi, slope;
  gate<KIND>(x, phi, slope);
  return x * phi;
}
template <int KIND>
INLINE vf derivative(vf x) {
  vf phi, slope;
  gate<KIND>(x, phi, slope);
  return phi + x * slope;
}

// a gelu(g), and from its gradient d those of a and g.
INLINE vf geglu(vf a, vf g) { return a * activated<GELU_EXACT>(g); }
INLINE void geglu_gradient(vf d, vf a, vf g, vf& da, vf& dg) {
  vf phi, slope;
  gate<GELU_EXACT>(g, phi, slope);
  da = d * g * phi;
  dg = d * a * (phi + g * slope);
}

}  // namespace minidiff::MINIDIFF_ISA
