// The 16-bit floats of cuda_fp16.h and cuda_bf16.h. They are stored as bits and computed with as floats; every result is
// rounded back to the nearest, ties to even, as the hardware does.
//
//   __half          sign 1 | exponent 5 | fraction 10      largest 65504, steps of 2^-10
//   __nv_bfloat16   sign 1 | exponent 8 | fraction  7      a float32 without its lower half
#pragma once

#include <math.h>
#include <stdint.h>

#include <type_traits>

#include "vector_types.h"

#pragma GCC visibility push(hidden)

namespace minidiff::emulator {

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline uint16_t bf16_bits(float f) {
  if (f != f) return 0x7fff;
  uint32_t u = bit_cast<uint32_t>(f);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float bf16_value(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

// Adding 2^(e + 13), e the exponent of f or the least normal one, leaves a fraction of 10 bits: the adder rounds.
inline uint16_t f16_bits(float f) {
  uint32_t u = bit_cast<uint32_t>(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // from 65520 on the nearest is infinity
  if (magnitude < 0x38800000) {                                 // below 2^-14: steps of 2^-24
    float steps = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(steps) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}
inline float f16_value(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return bit_cast<float>(sign | rest | 0x70000000);  // infinity, NaN
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f));
}

}  // namespace minidiff::emulator

struct __attribute__((aligned(2))) __half {
  uint16_t bits;
  __half() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  __half(T f) : bits(minidiff::emulator::f16_bits(float(f))) {}
  operator float() const { return minidiff::emulator::f16_value(bits); }
};
struct __attribute__((aligned(2))) __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  __nv_bfloat16(T f) : bits(minidiff::emulator::bf16_bits(float(f))) {}
  operator float() const { return minidiff::emulator::bf16_value(bits); }
};
struct __attribute__((aligned(4))) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half x, __half y) : x(x), y(y) {}
};
struct __attribute__((aligned(4))) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

#define MINIDIFF_SMALL_FLOAT(H, H2)                                                                          \
  inline H operator+(const H& a, const H& b) { return float(a) + float(b); }                                 \
  inline H operator-(const H& a, const H& b) { return float(a) - float(b); }                                 \
  inline H operator*(const H& a, const H& b) { return float(a) * float(b); }                                 \
  inline H operator/(const H& a, const H& b) { return float(a) / float(b); }                                 \
  inline H operator-(const H& a) { return -float(a); }                                                       \
  inline H& operator+=(H& a, const H& b) { return a = a + b; }                                               \
  inline H& operator-=(H& a, const H& b) { return a = a - b; }                                               \
  inline H& operator*=(H& a, const H& b) { return a = a * b; }                                               \
  inline H& operator/=(H& a, const H& b) { return a = a / b; }                                               \
  inline bool operator==(const H& a, const H& b) { return float(a) == float(b); }                            \
  inline bool operator!=(const H& a, const H& b) { return float(a) != float(b); }                            \
  inline bool operator<(const H& a, const H& b) { return float(a) < float(b); }                              \
  inline bool operator>(const H& a, const H& b) { return float(a) > float(b); }                              \
  inline bool operator<=(const H& a, const H& b) { return float(a) <= float(b); }                            \
  inline bool operator>=(const H& a, const H& b) { return float(a) >= float(b); }                            \
  inline H __hadd(H a, H b) { return a + b; }                                                                \
  inline H __hsub(H a, H b) { return a - b; }                                                                \
  inline H __hmul(H a, H b) { return a * b; }                                                                \
  inline H __hdiv(H a, H b) { return a / b; }                                                                \
  inline H __hfma(H a, H b, H c) { return fmaf(a, b, c); }                                                   \
  inline H __hneg(H a) { return -a; }                                                                        \
  inline H __habs(H a) { return fabsf(a); }                                                                  \
  inline H __hmax(H a, H b) { return fmaxf(a, b); }                                                          \
  inline H __hmin(H a, H b) { return fminf(a, b); }                                                          \
  inline bool __heq(H a, H b) { return a == b; }                                                             \
  inline bool __hlt(H a, H b) { return a < b; }                                                              \
  inline bool __hgt(H a, H b) { return a > b; }                                                              \
  inline bool __hle(H a, H b) { return a <= b; }                                                             \
  inline bool __hge(H a, H b) { return a >= b; }                                                             \
  inline bool __hisnan(H a) { return float(a) != float(a); }                                                 \
  inline H hexp(H a) { return expf(a); }                                                                     \
  inline H hexp2(H a) { return exp2f(a); }                                                                   \
  inline H hlog(H a) { return logf(a); }                                                                     \
  inline H hsqrt(H a) { return sqrtf(a); }                                                                   \
  inline H hrsqrt(H a) { return 1 / sqrtf(a); }                                                              \
  inline H hrcp(H a) { return 1 / float(a); }                                                                \
  inline H2 operator+(const H2& a, const H2& b) { return {a.x + b.x, a.y + b.y}; }                           \
  inline H2 operator-(const H2& a, const H2& b) { return {a.x - b.x, a.y - b.y}; }                           \
  inline H2 operator*(const H2& a, const H2& b) { return {a.x * b.x, a.y * b.y}; }                           \
  inline H2 operator/(const H2& a, const H2& b) { return {a.x / b.x, a.y / b.y}; }                           \
  inline H2 operator-(const H2& a) { return {-a.x, -a.y}; }                                                  \
  inline H2& operator+=(H2& a, const H2& b) { return a = a + b; }                                            \
  inline H2& operator-=(H2& a, const H2& b) { return a = a - b; }                                            \
  inline H2& operator*=(H2& a, const H2& b) { return a = a * b; }                                            \
  inline H2 __hadd2(H2 a, H2 b) { return a + b; }                                                            \
  inline H2 __hsub2(H2 a, H2 b) { return a - b; }                                                            \
  inline H2 __hmul2(H2 a, H2 b) { return a * b; }                                                            \
  inline H2 __h2div(H2 a, H2 b) { return a / b; }                                                            \
  inline H2 __hfma2(H2 a, H2 b, H2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }             \
  inline H2 __hneg2(H2 a) { return -a; }                                                                     \
  inline H2 __habs2(H2 a) { return {__habs(a.x), __habs(a.y)}; }                                             \
  inline H2 __hmax2(H2 a, H2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                             \
  inline H2 __hmin2(H2 a, H2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                             \
  inline H2 h2exp(H2 a) { return {hexp(a.x), hexp(a.y)}; }                                                   \
  inline H2 h2exp2(H2 a) { return {hexp2(a.x), hexp2(a.y)}; }                                                \
  inline float __low2float(H2 a) { return a.x; }                                                             \
  inline float __high2float(H2 a) { return a.y; }

MINIDIFF_SMALL_FLOAT(__half, __half2)
MINIDIFF_SMALL_FLOAT(__nv_bfloat16, __nv_bfloat162)
#undef MINIDIFF_SMALL_FLOAT

inline __half __float2half(float f) { return f; }
inline __half __float2half_rn(float f) { return f; }
inline float __half2float(__half h) { return h; }
inline __half2 __float2half2_rn(float f) { return {f, f}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 f) { return {f.x, f.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half h) { return {h, h}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return minidiff::emulator::bit_cast<__half>(bits); }

inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {f, f}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {f.x, f.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 b) { return {b, b}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {b.x, b.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 b) { return b.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 b) { return b.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return minidiff::emulator::bit_cast<__nv_bfloat16>(bits);
}

#pragma GCC visibility pop
