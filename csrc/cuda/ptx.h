// All PTX of the project: each instruction is a small function, and beside it stands what the emulator does instead.
//
// mma.sync multiplies small matrices, d = a b + c, held by the 32 lanes of a warp together. With g = lane / 4 and
// t = lane % 4, lane's registers hold (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "... mma.m16n8k8"):
//
//                  m16n8k16, two 16-bit numbers a register:          m16n8k8, one tf32 number a register:
//   a (16 x K)     a[0]: row g,     columns 2t, 2t + 1               a[0]: row g,     column t
//                  a[1]: row g + 8, columns 2t, 2t + 1               a[1]: row g + 8, column t
//                  a[2]: row g,     columns 2t + 8, 2t + 9           a[2]: row g,     column t + 4
//                  a[3]: row g + 8, columns 2t + 8, 2t + 9           a[3]: row g + 8, column t + 4
//   b (K x 8)      b[0]: rows 2t, 2t + 1,     column g               b[0]: row t,     column g
//                  b[1]: rows 2t + 8, 2t + 9, column g               b[1]: row t + 4, column g
//   c, d (16 x 8)  [0], [1]: row g,     columns 2t, 2t + 1           the same
//                  [2], [3]: row g + 8, columns 2t, 2t + 1
//
// Of two numbers in a register the one with the smaller index is in the lower half. c and d may be the same array.
//
// ldmatrix fills such registers from shared memory: 8 x 8 matrices of 16-bit numbers, whose rows of 16 bytes may lie
// anywhere on multiples of 16. Lane 8 i + r gives the address of row r of matrix i, and register i of lane 4 r + k receives
// row r, columns 2k and 2k + 1; with trans column r, rows 2k and 2k + 1. So x4 on the quarters of a 16 x 16 tile,
//
//   ┌───────┬───────┐
//   │ 0 (a0)│ 2 (a2)│     loads a from rows of K numbers; for b stored as (K x 8) rows, x2 with trans.
//   ├───────┼───────┤
//   │ 1 (a1)│ 3 (a3)│
//   └───────┴───────┘
//
// cp.async copies from global to shared memory without passing through registers, while the thread goes on. What was
// copied may be touched only after the wait (and, by other threads, after a barrier that follows the wait):
//
//   cp_async<16>(to, from)   x many      start copies
//   cp_async_commit()                    closes a group of them
//   cp_async_wait<1>()                   until at most 1 of the groups this thread committed is under way
//
// tf32 and bf16 products, and cp.async, exist from sm_80 on. For sm_75 cp_async copies at once and the products trap: no
// rung that uses them may be chosen there.
#pragma once

#include "portable.h"

#ifndef __CUDACC__
#include "../emulator/tensor.h"
#endif

namespace minidiff::cuda {

#ifdef __CUDACC__

#define MINIDIFF_PTX __device__ __forceinline__

MINIDIFF_PTX unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

#if __CUDA_ARCH__ >= 800
#define MINIDIFF_MMA_16816(type)                                                                                       \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "      \
               "{%8, %9}, {%10, %11, %12, %13};"                                                                       \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),    \
                 "f"(c[3]))
#define MINIDIFF_MMA_1688                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "     \
               "{%10, %11, %12, %13};"                                                                                 \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),    \
                 "f"(c[3]))
#else
#define MINIDIFF_MMA_16816(type) __trap()
#define MINIDIFF_MMA_1688 __trap()
#endif

MINIDIFF_PTX void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
  MINIDIFF_MMA_16816("bf16");
}
MINIDIFF_PTX void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
  MINIDIFF_MMA_16816("f16");
}
MINIDIFF_PTX void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
  MINIDIFF_MMA_1688;
}
#undef MINIDIFF_MMA_16816
#undef MINIDIFF_MMA_1688

#define MINIDIFF_LDMATRIX(name, trans)                                                                                 \
  MINIDIFF_PTX void name(unsigned (&r)[1], const void* row) {                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 {%0}, [%1];"                                       \
                 : "=r"(r[0]) : "r"(shared_address(row)) : "memory");                                                  \
  }                                                                                                                    \
  MINIDIFF_PTX void name(unsigned (&r)[2], const void* row) {                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];"                                   \
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");                                      \
  }                                                                                                                    \
  MINIDIFF_PTX void name(unsigned (&r)[4], const void* row) {                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];"                           \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");              \
  }
MINIDIFF_LDMATRIX(ldmatrix, "")
MINIDIFF_LDMATRIX(ldmatrix_trans, ".trans")
#undef MINIDIFF_LDMATRIX

template <int BYTES>
MINIDIFF_PTX void cp_async(void* shared, const void* global, int source_bytes = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  if constexpr (BYTES == 16)  // .cg: past L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(source_bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(shared_address(shared)), "l"(global), "n"(BYTES), "r"(source_bytes) : "memory");
#else
  for (int i = 0; i < BYTES; i++)
    static_cast<char*>(shared)[i] = i < source_bytes ? static_cast<const char*>(global)[i] : char(0);
#endif
}
// All of them, or zeros; cheaper than a number of bytes that the compiler does not know.
template <int BYTES>
MINIDIFF_PTX void cp_async_if(void* shared, const void* global, bool there) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  if constexpr (BYTES == 16)
    asm volatile("{.reg .pred ignore; setp.eq.u32 ignore, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, ignore;}"
                 :: "r"(shared_address(shared)), "l"(global), "r"(unsigned(there)) : "memory");
  else
    asm volatile("{.reg .pred ignore; setp.eq.u32 ignore, %3, 0; cp.async.ca.shared.global [%0], [%1], %2, ignore;}"
                 :: "r"(shared_address(shared)), "l"(global), "n"(BYTES), "r"(unsigned(there)) : "memory");
#else
  cp_async<BYTES>(shared, global, there ? BYTES : 0);
#endif
}
MINIDIFF_PTX void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int GROUPS_LEFT>
MINIDIFF_PTX void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" :: "n"(GROUPS_LEFT) : "memory");
#endif
}
MINIDIFF_PTX void cp_async_wait_all() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

MINIDIFF_PTX float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MINIDIFF_PTX unsigned round_to_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  return (__float_as_uint(x) + 0x1000) & ~0x1fffu;
#endif
}
MINIDIFF_PTX unsigned pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return unsigned(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16 |
         __bfloat16_as_ushort(__float2bfloat16_rn(low));
#endif
}
MINIDIFF_PTX unsigned pack_f16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return unsigned(__half_as_ushort(__float2half_rn(high))) << 16 | __half_as_ushort(__float2half_rn(low));
#endif
}

MINIDIFF_PTX float load_once(const float* p) {
  float v;
  asm volatile("ld.global.nc.L1::no_allocate.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
MINIDIFF_PTX float2 load_once(const float2* p) {
  float2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
  return v;
}
MINIDIFF_PTX float4 load_once(const float4* p) {
  float4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
  return v;
}
MINIDIFF_PTX void store_once(float* p, float v) { asm volatile("st.global.cs.f32 [%0], %1;" :: "l"(p), "f"(v) : "memory"); }
MINIDIFF_PTX void store_once(float2* p, float2 v) {
  asm volatile("st.global.cs.v2.f32 [%0], {%1, %2};" :: "l"(p), "f"(v.x), "f"(v.y) : "memory");
}
MINIDIFF_PTX void store_once(float4* p, float4 v) {
  asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
MINIDIFF_PTX void add_to(float* p, float v) { asm volatile("red.global.add.f32 [%0], %1;" :: "l"(p), "f"(v) : "memory"); }

#undef MINIDIFF_PTX

#else

#define MINIDIFF_MMA(name, operand)                                                                                    \
  inline void name(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4], MINIDIFF_WHERE) { \
    emulator::multiply_fragments(MINIDIFF_SITE(#name), emulator::Operand::operand, d, a, b, c);                        \
  }
MINIDIFF_MMA(mma_m16n8k16_bf16, bf16)
MINIDIFF_MMA(mma_m16n8k16_f16, f16)
MINIDIFF_MMA(mma_m16n8k8_tf32, tf32)  // the lower 13 bits of a and b are not looked at
#undef MINIDIFF_MMA

template <int COUNT>
inline void ldmatrix(unsigned (&r)[COUNT], const void* row, MINIDIFF_WHERE) {
  static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4, "ldmatrix loads 1, 2 or 4 matrices");
  emulator::load_matrices(MINIDIFF_SITE("ldmatrix"), COUNT, false, r, row);
}
template <int COUNT>
inline void ldmatrix_trans(unsigned (&r)[COUNT], const void* row, MINIDIFF_WHERE) {
  static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4, "ldmatrix loads 1, 2 or 4 matrices");
  emulator::load_matrices(MINIDIFF_SITE("ldmatrix.trans"), COUNT, true, r, row);
}

template <int BYTES>
inline void cp_async(void* shared, const void* global, int source_bytes = BYTES, MINIDIFF_WHERE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::copy_async(shared, global, BYTES, source_bytes, MINIDIFF_SITE("cp.async"));
}
template <int BYTES>
inline void cp_async_if(void* shared, const void* global, bool there, MINIDIFF_WHERE) {
  cp_async<BYTES>(shared, global, there ? BYTES : 0, file, line);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int GROUPS_LEFT>
inline void cp_async_wait(MINIDIFF_WHERE) {
  emulator::wait_copies(GROUPS_LEFT, MINIDIFF_SITE("cp.async.wait_group"));
}
inline void cp_async_wait_all(MINIDIFF_WHERE) { emulator::wait_all_copies(MINIDIFF_SITE("cp.async.wait_all")); }

inline float fast_exp2(float x) { return exp2f(x); }
inline unsigned round_to_tf32(float x) { return x != x ? 0x7fffffff : (__float_as_uint(x) + 0x1000) & ~0x1fffu; }
inline unsigned pack_bf16(float low, float high) {
  return unsigned(emulator::bf16_bits(high)) << 16 | emulator::bf16_bits(low);
}
inline unsigned pack_f16(float low, float high) {
  return unsigned(emulator::f16_bits(high)) << 16 | emulator::f16_bits(low);
}

template <class T>
inline T load_once(const T* p, MINIDIFF_WHERE) {
  return emulator::load(p, MINIDIFF_SITE("ld.global.nc"));
}
template <class T>
inline void store_once(T* p, T v, MINIDIFF_WHERE) {
  emulator::store(p, v, MINIDIFF_SITE("st.global.cs"));
}
inline void add_to(float* p, float v, MINIDIFF_WHERE) { atomicAdd(p, v, file, line); }

#endif

}  // namespace minidiff::cuda
