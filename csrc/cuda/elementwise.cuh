// The ladder of what is computed number by number: y[i] depends on the i-th number of every input and on nothing else.
//
//   v1  thread i takes number i                      v2  a few times the threads that the chip holds, each with many
//       t0 t1 t2 t3 t4 t5 ...                            t0 t1 t2 t3 t0 t1 t2 t3 t0 ...
//       ├┼─┼─┼─┼─┼─┤                                     ├───────────┼───────────┼──
//   v3  four numbers at a time: one instruction of a warp moves 512 bytes
//       ├──t0───┼──t1───┼──t2───┼──t3───┼──t0───┼ ...
//
// All of it is bound by memory. The floor is the bytes, each input read and each output written once, over the bandwidth of
// a copy. An H100 of 3.3 TB/s, 132 multiprocessors and 0.7 us from asking to having needs 18 KB under way on each; 2048
// threads with a float4 of one input are 32 KB.
//
// An op is a struct with
//   template <class V> __device__ void at(long i) const;   the i-th float, or the i-th float4: loads, `each`, stores
//   bool vectors() const;                                  whether float4 will do for its arrays
// An output may be one of the inputs: a number is read before it is written, and by nobody else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ladder.h"
#include "stream.h"

namespace minidiff::cuda {
namespace {

constexpr int THREADS = 256;

template <class V>
constexpr int LANES = sizeof(V) / sizeof(float);

template <class V>
__device__ V load(const float* p, long i) {
  return reinterpret_cast<const V*>(p)[i];
}
template <class V>
__device__ void store(float* p, long i, V v) {
  reinterpret_cast<V*>(p)[i] = v;
}

// f(a, b, ...) on floats, or on the four floats of each; f may take references, and change them.
template <class F, class... More>
__device__ void each(const F& f, float& a, More&... more) {
  f(a, more...);
}
template <class F, class... More>
__device__ void each(const F& f, float4& a, More&... more) {
  f(a.x, more.x...);
  f(a.y, more.y...);
  f(a.z, more.z...);
  f(a.w, more.w...);
}

// Whether all lie on multiples of 16 bytes, as float4 wants it; null does.
template <class... P>
__host__ __device__ bool aligned(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// v1
template <class Op>
__global__ void elementwise_naive(Op op, long n) {
  long i = long(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) op.template at<float>(i);
}

// v2: a thread takes many numbers; its steps are as long as the grid, so that neighbours still read neighbours
template <class Op>
__global__ void elementwise_strided(Op op, long n) {
  long step = long(gridDim.x) * blockDim.x;
  for (long i = long(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) op.template at<float>(i);
}

// v3: a float4 at a time; the up to three numbers behind the last of them go to the first threads
template <class Op>
__global__ void elementwise_vectors(Op op, long n) {
  long first = long(blockIdx.x) * blockDim.x + threadIdx.x, step = long(gridDim.x) * blockDim.x;
  for (long i = first; i < n / 4; i += step) op.template at<float4>(i);
  if (first < n % 4) op.template at<float>(n / 4 * 4 + first);
}

inline const std::vector<Rung> ELEMENTWISE_RUNGS = {
    {"naive", "one thread a number"},
    {"strided", "a thread takes many numbers, a grid's width apart: fewer blocks to start"},
    {"vectors", "loads and stores of four numbers"},
};

template <class Op>
void elementwise(const Ladder& ladder, const Op& op, long n) {
  if (n == 0) return;
  unsigned enough = 32 * multiprocessors();  // 4 times what runs at once, so that no slow block is waited for at the end
  if (ladder.rung() == 1)
    LAUNCH(elementwise_naive<Op>, blocks_for(n, THREADS), THREADS, 0, stream(), op, n);
  else if (ladder.rung() == 2 || !op.vectors())
    LAUNCH(elementwise_strided<Op>, std::min(blocks_for(n, THREADS), enough), THREADS, 0, stream(), op, n);
  else
    LAUNCH(elementwise_vectors<Op>, std::min(blocks_for((n + 3) / 4, THREADS), enough), THREADS, 0, stream(), op, n);
}

}  // namespace
}  // namespace minidiff::cuda
