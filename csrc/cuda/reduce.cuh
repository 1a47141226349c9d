// Sums over a warp and over a block, in a fixed order.
#pragma once

#include "portable.h"

namespace minidiff::cuda {
namespace {

// In every lane the sum over the warp: after step d each lane holds the sum of the 32 / d lanes it has heard of.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

// In every thread the sum over the block, of whole warps. A kernel's calls have each its own number, and so memory: there is
// no barrier behind.
template <int CALL = 0, class T>
__device__ T block_sum(T v) {
  __shared__ T sums[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  v = warp_sum(v);
  if (lane == 0) sums[warp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? sums[lane] : T(0));
}

}  // namespace
}  // namespace minidiff::cuda
