// Kernels without mistakes, in which every barrier is needed: no report under any schedule, and one for each barrier that
// is taken out.
#include "export.h"

using namespace minidiff::cuda;

__device__ __forceinline__ float warp_sum(float v) {
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  for (int offset = 16; offset; offset /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, offset));
  return v;
}

__device__ float block_sum(float v) {  // every thread gets the total
  __shared__ float part[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  v = warp_sum(v);
  __syncthreads();  // the last call's part may still be read
  if (lane == 0) part[warp] = v;
  __syncthreads();
  return warp_sum(lane < int(blockDim.x) / 32 ? part[lane] : 0.f);
}

// y = silu(groupnorm(x)); a block is a group, x (groups, n)
__global__ void groupnorm_silu(float* y, const float* x, int n, float eps) {
  const float* in = x + size_t(blockIdx.x) * n;
  float sum = 0, squares = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[i];
  float mean = block_sum(sum) / n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) squares += (in[i] - mean) * (in[i] - mean);
  float rstd = rsqrtf(block_sum(squares) / n + eps);
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float z = (in[i] - mean) * rstd;
    y[size_t(blockIdx.x) * n + i] = z / (1 + __expf(-z));
  }
}
FUNCTION(groupnorm, (float* y, const float* x, int groups, int n, int threads),
         LAUNCH(groupnorm_silu, groups, threads, 0, 0, y, x, n, 1e-5f))

// C (M, N) = A (M, K) B (K, N), a tile of 64 x 64 for a block of 256 threads, 4 x 4 results a thread
template <int TILE, int DEPTH, int PART>
__global__ void __launch_bounds__((TILE / PART) * (TILE / PART))
    tiled(float* __restrict__ C, const float* __restrict__ A, const float* __restrict__ B, int M, int N, int K) {
  SHARED_DYNAMIC(float, As);            // (DEPTH, TILE + 4), transposed
  float* Bs = As + DEPTH * (TILE + 4);  // (DEPTH, TILE)
  int tid = threadIdx.x, tx = tid % (TILE / PART), ty = tid / (TILE / PART);
  int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
  float sums[PART][PART] = {};
  for (int k0 = 0; k0 < K; k0 += DEPTH) {
    for (int i = tid; i < TILE * DEPTH; i += blockDim.x) {
      int m = m0 + i / DEPTH, k = k0 + i % DEPTH;
      As[i % DEPTH * (TILE + 4) + i / DEPTH] = m < M && k < K ? A[size_t(m) * K + k] : 0.f;
    }
    for (int i = tid; i < DEPTH * TILE; i += blockDim.x) {
      int k = k0 + i / TILE, n = n0 + i % TILE;
      Bs[i] = k < K && n < N ? B[size_t(k) * N + n] : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
      float a[PART], b[PART];
      for (int i = 0; i < PART; i++) a[i] = As[k * (TILE + 4) + ty * PART + i];
      for (int j = 0; j < PART; j++) b[j] = Bs[k * TILE + tx * PART + j];
      for (int i = 0; i < PART; i++)
        for (int j = 0; j < PART; j++) sums[i][j] += a[i] * b[j];
    }
    __syncthreads();
  }
  for (int i = 0; i < PART; i++)
    for (int j = 0; j < PART; j++) {
      int m = m0 + ty * PART + i, n = n0 + tx * PART + j;
      if (m < M && n < N) C[size_t(m) * N + n] = sums[i][j];
    }
}
FUNCTION(product, (float* C, const float* A, const float* B, int M, int N, int K),
         LAUNCH((tiled<64, 16, 4>), dim3((N + 63) / 64, (M + 63) / 64), 256, 4 * 16 * (68 + 64), 0, C, A, B, M, N, K))

// Attention with an online softmax, 32 features. A block has 4 warps, 8 queries each; a lane is a key while scores are
// computed, and a feature while values are added up.
__global__ void flash(float* O, const float* Q, const float* K, const float* V, int N, float scale) {
  constexpr int D = 32, QUERIES = 32, KEYS = 32, WARPS = 4, ROWS = QUERIES / WARPS;
  __shared__ float Qs[QUERIES][D], Ks[KEYS][D + 1], Vs[KEYS][D], P[WARPS][KEYS];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q0 = blockIdx.x * QUERIES;
  size_t head = size_t(blockIdx.y) * N * D;
  for (int i = threadIdx.x; i < QUERIES * D; i += blockDim.x)
    Qs[i / D][i % D] = q0 + i / D < N ? Q[head + size_t(q0) * D + i] * scale : 0.f;
  float most[ROWS], total[ROWS], sum[ROWS];
  for (int r = 0; r < ROWS; r++) most[r] = -INFINITY, total[r] = sum[r] = 0;
  for (int k0 = 0; k0 < N; k0 += KEYS) {
    __syncthreads();
    for (int i = threadIdx.x; i < KEYS * D; i += blockDim.x) {
      bool inside = k0 + i / D < N;
      Ks[i / D][i % D] = inside ? K[head + size_t(k0) * D + i] : 0.f;
      Vs[i / D][i % D] = inside ? V[head + size_t(k0) * D + i] : 0.f;
    }
    __syncthreads();
    for (int r = 0; r < ROWS; r++) {
      float s = 0;
      for (int d = 0; d < D; d++) s += Qs[warp * ROWS + r][d] * Ks[lane][d];
      if (k0 + lane >= N) s = -INFINITY;
      float now = fmaxf(most[r], warp_max(s)), p = __expf(s - now), factor = __expf(most[r] - now);
      total[r] = total[r] * factor + warp_sum(p);
      most[r] = now;
      __syncwarp();  // the last row's P has been read
      P[warp][lane] = p;
      __syncwarp();
      sum[r] *= factor;
      for (int j = 0; j < KEYS; j++) sum[r] += P[warp][j] * Vs[j][lane];
    }
  }
  for (int r = 0; r < ROWS; r++) {
    int row = q0 + warp * ROWS + r;
    if (row < N) O[head + size_t(row) * D + lane] = sum[r] / total[r];
  }
}
FUNCTION(attention, (float* O, const float* Q, const float* K, const float* V, int heads, int N, float scale),
         LAUNCH(flash, dim3((N + 31) / 32, heads), 128, 0, 0, O, Q, K, V, N, scale))

// C (M, N) = A (M, K) B (K, N) in bf16 on tensor cores; while a tile is multiplied the next is copied. A block of 4 warps
// makes 32 x 16 results, a warp 16 x 8. N and K are multiples of 8.
__global__ void pipelined(float* C, const __nv_bfloat16* A, const __nv_bfloat16* B, int M, int N, int K) {
  __shared__ __align__(16) __nv_bfloat16 As[2][32][16], Bs[2][16][16];
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, m0 = blockIdx.y * 32, n0 = blockIdx.x * 16;
  auto copy = [&](int tile) {  // 64 + 32 pieces of 16 bytes
    if (tid < 64) {
      int row = tid / 2, k = tile * 16 + tid % 2 * 8;
      bool inside = m0 + row < M && k < K;
      cp_async<16>(&As[tile % 2][row][tid % 2 * 8], inside ? A + size_t(m0 + row) * K + k : A, inside ? 16 : 0);
    } else if (tid < 96) {
      int row = (tid - 64) / 2, k = tile * 16 + row, n = n0 + tid % 2 * 8;
      bool inside = k < K && n < N;
      cp_async<16>(&Bs[tile % 2][row][tid % 2 * 8], inside ? B + size_t(k) * N + n : B, inside ? 16 : 0);
    }
    cp_async_commit();
  };
  float sums[4] = {};
  int tiles = (K + 15) / 16;
  copy(0);
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) copy(tile + 1);
    else cp_async_commit();  // an empty group: the wait counts alike
    cp_async_wait<1>();
    __syncthreads();
    unsigned a[4], b[2];
    ldmatrix(a, &As[tile % 2][warp / 2 * 16 + lane % 16][lane / 16 * 8]);
    ldmatrix_trans(b, &Bs[tile % 2][lane % 16][warp % 2 * 8]);
    mma_m16n8k16_bf16(sums, a, b, sums);
    __syncthreads();
  }
  for (int i = 0; i < 4; i++) {
    int m = m0 + warp / 2 * 16 + lane / 4 + i / 2 * 8, n = n0 + warp % 2 * 8 + lane % 4 * 2 + i % 2;
    if (m < M && n < N) C[size_t(m) * N + n] = sums[i];
  }
}
FUNCTION(tensor_product, (float* C, const void* A, const void* B, int M, int N, int K),
         LAUNCH(pipelined, dim3((N + 15) / 16, (M + 31) / 32), 128, 0, 0, C, static_cast<const __nv_bfloat16*>(A),
                static_cast<const __nv_bfloat16*>(B), M, N, K))

// The sum of all x: every block leaves its part, and the last to finish adds them up.
enum class Fence { none, before, after };
template <Fence FENCE>
__global__ void sum_by_last(float* out, float* parts, unsigned* finished, const float* x, int n) {
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  v = block_sum(v);
  if (threadIdx.x == 0) {
    if (FENCE == Fence::before) __threadfence();  // too early to help
    parts[blockIdx.x] = v;
    if (FENCE == Fence::after) __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  v = threadIdx.x < gridDim.x ? parts[threadIdx.x] : 0.f;
  v = block_sum(v);
  if (threadIdx.x == 0) *out = v;
}
FUNCTION(last_block, (float* out, float* parts, unsigned* finished, const float* x, int n),
         LAUNCH((sum_by_last<Fence::after>), 5, 64, 0, 0, out, parts, finished, x, n))
FUNCTION(last_block_fenced_early, (float* out, float* parts, unsigned* finished, const float* x, int n),
         LAUNCH((sum_by_last<Fence::before>), 5, 64, 0, 0, out, parts, finished, x, n))
FUNCTION(last_block_unfenced, (float* out, float* parts, unsigned* finished, const float* x, int n),
         LAUNCH((sum_by_last<Fence::none>), 5, 64, 0, 0, out, parts, finished, x, n))

__global__ void locked(int* lock, float* total) {
  while (atomicCAS(lock, 0, 1)) {
  }
  __threadfence();
  *total += 1;
  __threadfence();
  atomicExch(lock, 0);
}
FUNCTION(spin_lock, (int* lock, float* total), LAUNCH(locked, 2, 64, 0, 0, lock, total))

// Half-warps that go their own ways, each with barriers of its own.
__global__ void halves(float* out, const float* in) {
  __shared__ float s[32];
  unsigned mask = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
  s[threadIdx.x] = in[threadIdx.x];
  __syncwarp(mask);
  float v = s[threadIdx.x ^ 5];
  if (threadIdx.x < 16) v += __shfl_xor_sync(0xffffu, v, 1);
  else v -= __shfl_xor_sync(0xffff0000u, v, 2);
  __syncwarp(mask);
  s[threadIdx.x] = v;
  __syncwarp();
  out[threadIdx.x] = s[31 - threadIdx.x];
}
FUNCTION(half_warps, (float* out, const float* in), LAUNCH(halves, 1, 32, 0, 0, out, in))

// For the profile: each pattern is one line.
__global__ void patterns(float* out, const float* in, int n) {
  __shared__ float s[33 * 32];
  int i = threadIdx.x;
  for (int k = i; k < 33 * 32; k += 32) s[k] = in[k];
  __syncwarp();
  float v = 0;
  v += in[i];                                          // coalesced
  v += in[8 * i];                                      // strided
  v += in[i + 1];                                      // shifted
  v += in[7];                                          // same
  float4 four = reinterpret_cast<const float4*>(in)[i];  // wide
  v += four.x + four.y + four.z + four.w;
  v += s[i];                                           // no conflict
  v += s[32 * i];                                      // all in one bank
  v += s[33 * i];                                      // padded
  v += s[2 * i];                                       // two in a bank
  v += s[5];                                           // broadcast
  out[i] = v;
  if (i < n) out[32 + i] = v;                          // some lanes
}
FUNCTION(run_patterns, (float* out, const float* in, int n), LAUNCH(patterns, 1, 32, 0, 0, out, in, n))
