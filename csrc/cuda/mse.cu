// The mean of (a - b)^2, one number from many: a sum in two passes, so that it does not depend on who comes first.
//
//   a, b  ├──block 0──┼──block 1──┼── ... ──┼──block 0──┼──block 1──┼── ...     every block takes many pieces,
//             │            │                                                     its threads sum in registers
//             ▼            ▼
//         ┌───────┬───────┬─────┬───────┐   in the workspace: a sum a block, at most BLOCKS of them
//         │   0   │   1   │ ... │       │
//         └───────┴───────┴─────┴───────┘
//             └───────┴──┬──┴───────┘       a second kernel of one block sums those, in double
//                        ▼
//                      y = sum / n
//
// Floor: 8 bytes a number of a, against 3 operations. Backward, 12 bytes, is one of elementwise.cuh's:
// da = dy 2 / n (a - b), with dy in the device's memory.
#include "../kernels.h"
#include "elementwise.cuh"
#include "reduce.cuh"

namespace minidiff::cuda {
namespace {

Ladder forward_ladder("mse", {
    {"naive", "one thread sums all"},
    {"tree", "many blocks; each halves its sums in shared memory, a barrier a step; a second kernel sums the blocks"},
    {"shuffles", "a warp's lanes add by shuffles, one barrier is left"},
    {"vectors", "loads of four numbers"},
});
Ladder backward_ladder("mse_backward", ELEMENTWISE_RUNGS);

constexpr int BLOCKS = 1024;  // fixed: the sum is the same on every chip

__device__ float squared_difference(float a, float b) { return (a - b) * (a - b); }

// In double: a float that has grown large does not notice small numbers any more, and this one meets all of them.
__global__ void mse_naive(float* y, const float* a, const float* b, long n) {
  double total = 0;
  for (long i = 0; i < n; i++) total += squared_difference(a[i], b[i]);
  *y = float(total / n);
}

// Of the numbers that this thread comes by with steps as long as the grid.
__device__ float strided_sum(const float* a, const float* b, long n) {
  float sum = 0;
  long step = long(gridDim.x) * blockDim.x;
  for (long i = long(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) sum += squared_difference(a[i], b[i]);
  return sum;
}

// v2: 128 threads add their neighbour's sum 128 places on, then 64, and so on
__global__ void mse_tree(float* partial, const float* a, const float* b, long n) {
  __shared__ float sums[THREADS];
  int t = threadIdx.x;
  sums[t] = strided_sum(a, b, n);
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) sums[t] += sums[t + half];
  }
  if (t == 0) partial[blockIdx.x] = sums[0];
}

// v3: sums pass from register to register
__global__ void mse_shuffles(float* partial, const float* a, const float* b, long n) {
  float sum = block_sum(strided_sum(a, b, n));
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// v4: a float4 of a and of b at a time. Unrolled it would take the registers of two blocks of eight on a multiprocessor, and
// the last of the 1024 would have to wait for others; 64 warps keep enough in flight without.
__global__ void mse_vectors(float* partial, const float* a, const float* b, long n) {
  long first = long(blockIdx.x) * blockDim.x + threadIdx.x, step = long(gridDim.x) * blockDim.x;
  float sum = 0;
#pragma unroll 1
  for (long i = first; i < n / 4; i += step) {
    float4 p = load<float4>(a, i), q = load<float4>(b, i);
    each([&](float p, float q) { sum += squared_difference(p, q); }, p, q);
  }
  if (first < n % 4) sum += squared_difference(a[n / 4 * 4 + first], b[n / 4 * 4 + first]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block of BLOCKS threads.
__global__ void mean_of_partials(float* y, const float* partial, int partials, long n) {
  double total = block_sum(int(threadIdx.x) < partials ? double(partial[threadIdx.x]) : 0.0);
  if (threadIdx.x == 0) *y = float(total / n);
}

struct Backward {
  float* da;
  const float *dy, *a, *b;
  float two_over_n;

  bool vectors() const { return aligned(da, a, b); }
  template <class V>
  __device__ void at(long i) const {
    float factor = *dy * two_over_n;
    V p = load<V>(a, i), q = load<V>(b, i);
    each([=](float& p, float q) { p = factor * (p - q); }, p, q);
    store(da, i, p);
  }
};

}  // namespace

void mse_forward(float* y, const float* a, const float* b, long n) {
  int rung = forward_ladder.rung();
  if (rung == 1) {
    LAUNCH(mse_naive, 1, 1, 0, stream(), y, a, b, n);
    return;
  }
  bool vectors = rung == 4 && aligned(a, b);
  int blocks = std::min<unsigned>(blocks_for(vectors ? (n + 3) / 4 : n, THREADS), BLOCKS);
  float* partial = workspace(blocks);
  if (rung == 2)
    LAUNCH(mse_tree, blocks, THREADS, 0, stream(), partial, a, b, n);
  else if (vectors)
    LAUNCH(mse_vectors, blocks, THREADS, 0, stream(), partial, a, b, n);
  else
    LAUNCH(mse_shuffles, blocks, THREADS, 0, stream(), partial, a, b, n);
  LAUNCH(mean_of_partials, 1, BLOCKS, 0, stream(), y, partial, blocks, n);
}

void mse_backward(float* da, const float* dy, const float* a, const float* b, long n) {
  elementwise(backward_ladder, Backward{da, dy, a, b, float(2.0 / n)}, n);
}

}  // namespace minidiff::cuda
