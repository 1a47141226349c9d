// Vectors of the instruction set that a file is compiled for.
//
// Every kernel is compiled once for each instruction set, with MINIDIFF_ISA naming the namespace (avx512, avx2,
// portable) and the compiler's flags choosing the width. Kernels include nothing from the C++ library: an inline
// function of std:: compiled for AVX-512 could be the copy that the linker keeps for all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef MINIDIFF_ISA
#define MINIDIFF_ISA portable
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace minidiff::MINIDIFF_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;     // floats in a vector
constexpr int ROWS = 14;   // rows of a product's micro-tile: 14 x 2 sums + 2 weights + 1 broadcast of 32 registers
constexpr int WROWS = 8;   // rows of the weight gradient's micro-tile; divides BLOCK
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int ROWS = 6;  // 6 x 2 + 2 + 1 of 16 registers
constexpr int WROWS = 4;
#else
constexpr int VL = 4;
constexpr int ROWS = 6;
constexpr int WROWS = 4;
#endif
constexpr int BLOCK = 16;       // channels that lie together in packed activations: a cache line
constexpr int PANEL = 2 * VL;   // output channels of a micro-tile
static_assert(BLOCK % VL == 0);

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vf_anywhere __attribute__((vector_size(VL * 4), aligned(4), may_alias));

INLINE vf load(const float* p) { return *(const vf_anywhere*)p; }
INLINE void store(float* p, vf v) { *(vf_anywhere*)p = v; }
INLINE vf all(float s) { return s - (vf){}; }

// The first n floats, the rest zero; n in 0..VL. Nothing behind them is read.
INLINE vf load_first(const float* p, int n) {
  if (n >= VL) return load(p);
  if (n <= 0) return (vf){};
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  vf v = {};
  memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}
INLINE void store_first(float* p, vf v, int n) {
  if (n >= VL) return store(p, v);
  if (n <= 0) return;
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
#else
  memcpy(p, &v, n * sizeof(float));
#endif
}

INLINE vf vmax(vf a, vf b) {  // b where one of them is NaN
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // the plain one warns of an uninitialised value in GCC 12
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
INLINE vf vmin(vf a, vf b) {  // b where one of them is NaN
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
// v with its halves, quarters, ... exchanged: lane i holds lane i ^ S.
template <int S>
INLINE vf exchanged(vf v) {
  vf r;
#if defined(__clang__)
  UNROLL for (int i = 0; i < VL; i++) r[i] = v[i ^ S];
#else
  vi from;
  for (int i = 0; i < VL; i++) from[i] = i ^ S;
  r = __builtin_shuffle(v, from);
#endif
  return r;
}
INLINE float sum(vf v) {
  if constexpr (VL == 16) v += exchanged<8>(v);
  if constexpr (VL >= 8) v += exchanged<4>(v);
  v += exchanged<2>(v);
  return v[0] + v[1];
}
INLINE float highest(vf v) {
  if constexpr (VL == 16) v = vmax(v, exchanged<8>(v));
  if constexpr (VL >= 8) v = vmax(v, exchanged<4>(v));
  v = vmax(v, exchanged<2>(v));
  return v[0] > v[1] ? v[0] : v[1];
}
INLINE vf vsqrt(vf v) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  UNROLL for (int i = 0; i < VL; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// e^x to 2 units in the last place: x = n log 2 + r, |r| <= log(2)/2, e^x = 2^n e^r, e^r by its Taylor series to r^7.
// Below -87.3 (the last normal number) the result is 0, above 88.7 infinity; NaN stays NaN.
INLINE vf vexp(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
#if defined(__AVX512F__)
  x = vmin(all(200.0f), x);
#endif
  vf t = x * 1.44269504f + magic;
  vf n = t - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = all(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, all(-87.3f), _CMP_NLT_UQ), p, n);
#else
  vi i = (vi)t - (vi)all(magic), half = i >> 1;  // 2^n in two factors, so that n = 128 does not overflow on the way
  vf y = p * (vf)((half + 127) << 23) * (vf)((i - half + 127) << 23);
  y = x < -87.3f ? (vf){} : y;
  return x > 88.7228f ? all(__builtin_inff()) : y;
#endif
}
INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

INLINE int least(long a, long b) { return (int)(a < b ? a : b); }
INLINE int most(long a, long b) { return (int)(a > b ? a : b); }
INLINE long round_up(long n, long m) { return (n + m - 1) / m * m; }

}  // namespace minidiff::MINIDIFF_ISA
