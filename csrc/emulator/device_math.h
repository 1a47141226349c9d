// CUDA's intrinsics for arithmetic on one thread's values. The fast forms (__expf) are exact here, and no multiply-add is
// fused unless the compiler does: compare with a GPU's results within a tolerance.
#pragma once

#include <math.h>
#include <stdint.h>

#include "small_floats.h"

#pragma GCC visibility push(hidden)

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float rcbrtf(float x) { return 1 / cbrtf(x); }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }
inline float sinpif(float x) { return float(sin(3.14159265358979323846 * x)); }
inline float cospif(float x) { return float(cos(3.14159265358979323846 * x)); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f ? a * copysignf(0, b) : a / b; }  // as CUDA's: 0
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return float(1 / sqrt(double(a))); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

inline int __float_as_int(float f) { return minidiff::emulator::bit_cast<int>(f); }
inline unsigned __float_as_uint(float f) { return minidiff::emulator::bit_cast<unsigned>(f); }
inline float __int_as_float(int i) { return minidiff::emulator::bit_cast<float>(i); }
inline float __uint_as_float(unsigned u) { return minidiff::emulator::bit_cast<float>(u); }
inline long long __double_as_longlong(double d) { return minidiff::emulator::bit_cast<long long>(d); }
inline double __longlong_as_double(long long i) { return minidiff::emulator::bit_cast<double>(i); }
inline int __float2int_rn(float f) { return int(rintf(f)); }
inline int __float2int_rz(float f) { return int(f); }
inline int __float2int_rd(float f) { return int(floorf(f)); }
inline int __float2int_ru(float f) { return int(ceilf(f)); }
inline unsigned __float2uint_rn(float f) { return unsigned(rintf(f)); }
inline unsigned __float2uint_rz(float f) { return unsigned(f); }
inline float __int2float_rn(int i) { return float(i); }
inline float __uint2float_rn(unsigned u) { return float(u); }
inline float __ull2float_rn(unsigned long long u) { return float(u); }

inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t both = uint64_t(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    unsigned s = selector >> (4 * i) & 0xf, byte = unsigned(both >> (8 * (s & 7)) & 0xff);
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, spread
    r |= byte << (8 * i);
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return unsigned((uint64_t(hi) << 32 | lo) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return unsigned((uint64_t(hi) << 32 | lo) >> (n & 31));
}

namespace minidiff::emulator {
template <class T>
struct Same {
  using type = T;  // a parameter that takes no part in deduction
};
}  // namespace minidiff::emulator
#define MINIDIFF_MIN_MAX(T)                                         \
  inline T min(T a, T b) { return b < a ? b : a; }                  \
  inline T max(T a, T b) { return a < b ? b : a; }
MINIDIFF_MIN_MAX(int)
MINIDIFF_MIN_MAX(unsigned)
MINIDIFF_MIN_MAX(long)
MINIDIFF_MIN_MAX(unsigned long)
MINIDIFF_MIN_MAX(long long)
MINIDIFF_MIN_MAX(unsigned long long)
#undef MINIDIFF_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline double min(float a, double b) { return fmin(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

#pragma GCC visibility pop
