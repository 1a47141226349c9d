// CUDA's short vectors, float4 and the like, with its sizes and alignments. A vector of 16 bytes must lie on a multiple of
// 16: on a GPU a float4 load from elsewhere is an error, here the checked build says so.
#pragma once

#pragma GCC visibility push(hidden)

#define MINIDIFF_VECTORS(T, name)                                                                           \
  struct name##1 { T x; };                                                                                  \
  struct __attribute__((aligned(2 * sizeof(T)))) name##2 { T x, y; };                                       \
  struct name##3 { T x, y, z; };                                                                            \
  struct __attribute__((aligned(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)))) name##4 { T x, y, z, w; };       \
  inline name##1 make_##name##1(T x) { return {x}; }                                                        \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                        \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

MINIDIFF_VECTORS(signed char, char)
MINIDIFF_VECTORS(unsigned char, uchar)
MINIDIFF_VECTORS(short, short)
MINIDIFF_VECTORS(unsigned short, ushort)
MINIDIFF_VECTORS(int, int)
MINIDIFF_VECTORS(unsigned, uint)
MINIDIFF_VECTORS(long long, longlong)
MINIDIFF_VECTORS(unsigned long long, ulonglong)
MINIDIFF_VECTORS(float, float)
MINIDIFF_VECTORS(double, double)
#undef MINIDIFF_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

#pragma GCC visibility pop
