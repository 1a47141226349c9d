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

// x phi(x): phi is the normal distribution function, or a sigmoid of steepness (x + bend x^3); tanh u = 2 sigmoid(2 u) - 1.
struct Gate {
  bool normal;
  float steepness, bend;
  __host__ __device__ constexpr explicit Gate(int kind)
      : normal(kind == GELU_EXACT || kind == GEGLU),
        steepness(kind == GELU_TANH ? 1.59576912f : kind == GELU_QUICK ? 1.702f : 1.0f),
        bend(kind == GELU_TANH ? 0.044715f : 0.0f) {}
  __device__ float phi(float x) const {
    if (normal) return normal_cdf(x);
    return sigmoid(steepness * (bend != 0 ? x + bend * x * x * x : x));
  }
  __device__ float slope(float x, float phi) const {  // of phi
    if (normal) return 0.39894228f * expf(-0.5f * x * x);
    float slope = phi * (1 - phi) * steepness;
    return bend != 0 ? slope * (1 + 3 * bend * x * x) : slope;
  }
};

template <int KIND>
__device__ inline float activated(float x) {
  return x * Gate(KIND).phi(x);
}
template <int KIND>
__device__ inline float derivative(float x) {
  constexpr Gate gate(KIND);
  float phi = gate.phi(x);
  return phi + x * gate.slope(x, phi);
}

// a gelu(g), and from its gradient d those of a and g.
__device__ inline float geglu(float a, float g) { return a * activated<GELU_EXACT>(g); }
__device__ inline void geglu_gradient(float d, float a, float g, float& da, float& dg) {
  constexpr Gate gate(GELU_EXACT);
  float phi = gate.phi(g);
  da = d * g * phi;
  dg = d * a * (phi + g * gate.slope(g, phi));
}

}  // namespace
}  // namespace minidiff::cuda
