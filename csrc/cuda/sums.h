// What the normalisations share: loads of one, two or four floats, and several sums at once over the threads of a block.
#pragma once

#include "ptx.h"
#include "reduce.cuh"

namespace minidiff::cuda {
namespace {

// V floats at once: 1, or 2 or 4 where the address is a multiple of their bytes.
template <int V>
__device__ __forceinline__ void load(float (&to)[V], const float* from) {
  static_assert(V == 1 || V == 2 || V == 4, "one float, two or four");
  if constexpr (V == 4) {
    float4 f = *reinterpret_cast<const float4*>(from);
    to[0] = f.x, to[1] = f.y, to[2] = f.z, to[3] = f.w;
  } else if constexpr (V == 2) {
    float2 f = *reinterpret_cast<const float2*>(from);
    to[0] = f.x, to[1] = f.y;
  } else {
    to[0] = *from;
  }
}
template <int V>
__device__ __forceinline__ void store(float* to, const float (&from)[V]) {
  if constexpr (V == 4)
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  else if constexpr (V == 2)
    *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
  else
    *to = from[0];
}
// The same for what is not read again soon: it is the first to leave the L2.
template <int V>
__device__ __forceinline__ void store_streaming(float* to, const float (&from)[V]) {
  if constexpr (V == 4)
    store_once(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
  else if constexpr (V == 2)
    store_once(reinterpret_cast<float2*>(to), make_float2(from[0], from[1]));
  else
    store_once(to, from[0]);
}

// The block's threads as `high` rows of `width`: row 0 gets what `join` makes of each column, by a tree over the rows.
//
//   rows 0 1 2 3 4      join(v, other): v <- v and other together
//        ├─┼─┼─┘ │
//        ├─┼─────┘      shared: K floats a thread, which no other thread is still reading
//        ├─┘
template <int K, class Join>
__device__ __forceinline__ void join_rows(float (&v)[K], float* shared, int width, int high, Join join) {
  int t = threadIdx.x, row = t / width, threads = blockDim.x;
#pragma unroll
  for (int k = 0; k < K; k++) shared[k * threads + t] = v[k];
  for (int n = high; n > 1;) {
    int half = (n + 1) / 2;
    __syncthreads();
    if (row < n - half) {
      float other[K];
#pragma unroll
      for (int k = 0; k < K; k++) other[k] = shared[k * threads + t + half * width];
      join(v, other);
#pragma unroll
      for (int k = 0; k < K; k++) shared[k * threads + t] = v[k];
    }
    n = half;
  }
}

template <int K>
__device__ __forceinline__ void sum_rows(float (&v)[K], float* shared, int width, int high) {
  join_rows(v, shared, width, high, [](float (&mine)[K], const float (&other)[K]) {
#pragma unroll
    for (int k = 0; k < K; k++) mine[k] += other[k];
  });
}

}  // namespace
}  // namespace minidiff::cuda
