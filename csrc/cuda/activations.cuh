// SiLU and the GELUs, x phi(x) with phi between 0 and 1, for passes of their own and behind a product.
#pragma once

#include "../kernels.h"
#include "portable.h"

namespace minidiff::cuda {
namespace {

// 1 / (1 + e^-x). Where e^-x overflows the quotient is the right limit, 0. __fdividef is within 2 units of the last place.
__device__ inline float sigmoid(float x) { return __fdividef(1, 1 + expf(-x)); }

// The normal distribution function, by erfc(z) = t exp(-z^2 + polynomial of t), t = 1 / (1 + z / 2), z >= 0, a Chebyshev
// fit with a relative error below 1.2e-7: Press et al., Numerical Recipes, section 6.2. Right in both tails, where 1 + erf
// cancels, at a third of the operations of normcdff.
__device__ inline float normal_cdf(float x) {
  float z = fabsf(x) * 0.70710678f, t = __fdividef(1, 1 + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  float half_erfc = 0.5f * t * expf(p - z * z);
  return x < 0 ? half_erfc : 1 - half_erfc;
}

// phi(x), and its derivative.
template <int KIND>
__device__ inline void gate(float x, float& phi, float& slope) {
  if constexpr (KIND == GELU_EXACT) {
    phi = normal_cdf(x);
    slope = 0.39894228f * expf(-0.5f * x * x);
  } else if constexpr (KIND == GELU_TANH) {  // (1 + tanh u) / 2 = sigmoid(2 u)
    phi = sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    slope = phi * (1 - phi) * 1.59576912f * (1 + 0.134145f * x * x);
  } else {
    constexpr float k = KIND == GELU_QUICK ? 1.702f : 1.0f;
    phi = sigmoid(k * x);
    slope = k * phi * (1 - phi);
  }
}

template <int KIND>
__device__ inline float activated(float x) {
  float phi, slope;
  gate<KIND>(x, phi, slope);
  return x * phi;
}
template <int KIND>
__device__ inline float derivative(float x) {
  float phi, slope;
  gate<KIND>(x, phi, slope);
  return phi + x * slope;
}

// a gelu(g), and from its gradient d those of a and g.
__device__ inline float geglu(float a, float g) { return a * activated<GELU_EXACT>(g); }
__device__ inline void geglu_gradient(float d, float a, float g, float& da, float& dg) {
  float phi, slope;
  gate<GELU_EXACT>(g, phi, slope);
  da = d * g * phi;
  dg = d * a * (phi + g * slope);
}

}  // namespace
}  // namespace minidiff::cuda
