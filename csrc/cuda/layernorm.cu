// LayerNorm: every row of x (rows, D) to mean 0 and variance 1 over its D channels, then gamma and beta.
//
//   xhat = (x - mean) * rstd,   y = gamma * xhat + beta
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = gamma * dy;   dgamma = sum(dy * xhat), dbeta = sum(dy) over rows
//
//             D channels                 rungs 2, 3: a warp takes a row; its 32 lanes lie beside each other
//        ┌───────────────────┐ warp 0
//   rows │ l0 l1 ... l31 l0 ..│ warp 1    sums along a row: by shuffles, no barrier
//        │                   │ ...       sums down a column: partial sums of many rows in the workspace, which a second
//        └───────────────────┘           kernel adds up in fixed order
//
// The floor is the memory: forward x read and y written once, 8 bytes an element; backward x and dy read and dx written, 12.
// Rung 3 reaches it as it keeps the row in registers. The variance is taken in a second pass, around the mean.
#include <algorithm>

#include "ladder.h"
#include "stream.h"
#include "sums.h"

namespace minidiff::cuda {
namespace {

Ladder layer_norm("layer_norm",
                  {{"naive", "one thread a row; backward also one thread a column"},
                   {"warp", "one warp a row, sums by shuffles; column sums by blocks, in two steps"},
                   {"registers", "16-byte loads; a row is read once and kept in registers, also for the columns"}});

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Norm {
  float *y, *mean, *rstd;
  const float *x, *gamma, *beta;
  long rows;
  int D;
  float eps;
};
struct NormGradient {
  float *dx, *dgamma, *dbeta;
  const float *dy, *x, *gamma, *mean, *rstd;
  long rows;
  int D;
};

// v1: one thread a row.
__global__ void forward_naive(Norm n) {
  long r = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (r >= n.rows) return;
  const float* x = n.x + r * n.D;
  float sum = 0, squares = 0;
  for (int c = 0; c < n.D; c++) sum += x[c];
  float mean = sum / n.D;
  for (int c = 0; c < n.D; c++) squares += (x[c] - mean) * (x[c] - mean);
  float rstd = rsqrtf(squares / n.D + n.eps);
  n.mean[r] = mean;
  n.rstd[r] = rstd;
  for (int c = 0; c < n.D; c++) n.y[r * n.D + c] = (x[c] - mean) * rstd * n.gamma[c] + n.beta[c];
}

__global__ void backward_rows_naive(NormGradient n) {
  long r = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (r >= n.rows) return;
  const float *x = n.x + r * n.D, *dy = n.dy + r * n.D;
  float mean = n.mean[r], rstd = n.rstd[r], of_g = 0, of_g_xhat = 0;
  for (int c = 0; c < n.D; c++) {
    float g = dy[c] * n.gamma[c];
    of_g += g;
    of_g_xhat += g * (x[c] - mean) * rstd;
  }
  for (int c = 0; c < n.D; c++) {
    float xhat = (x[c] - mean) * rstd;
    n.dx[r * n.D + c] = rstd * (dy[c] * n.gamma[c] - of_g / n.D - xhat * (of_g_xhat / n.D));
  }
}

__global__ void backward_columns_naive(NormGradient n) {
  int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= n.D) return;
  float of_gamma = 0, of_beta = 0;
  for (long r = 0; r < n.rows; r++) {
    float dy = n.dy[r * n.D + c];
    of_gamma += dy * (n.x[r * n.D + c] - n.mean[r]) * n.rstd[r];
    of_beta += dy;
  }
  n.dgamma[c] = of_gamma;
  n.dbeta[c] = of_beta;
}

// v2: one warp a row: its lanes read neighbouring channels, and shuffles give all of them the sums.
__global__ void __launch_bounds__(THREADS) forward_warp(Norm n) {
  long r = blockIdx.x * (long)WARPS + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (r >= n.rows) return;
  const float* x = n.x + r * n.D;
  float sum = 0, squares = 0;
  for (int c = lane; c < n.D; c += 32) sum += x[c];
  float mean = warp_sum(sum) / n.D;
  for (int c = lane; c < n.D; c += 32) squares += (x[c] - mean) * (x[c] - mean);
  float rstd = rsqrtf(warp_sum(squares) / n.D + n.eps);
  if (lane == 0) n.mean[r] = mean, n.rstd[r] = rstd;
  for (int c = lane; c < n.D; c += 32) n.y[r * n.D + c] = (x[c] - mean) * rstd * n.gamma[c] + n.beta[c];
}

__global__ void __launch_bounds__(THREADS) backward_rows(NormGradient n) {
  long r = blockIdx.x * (long)WARPS + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (r >= n.rows) return;
  const float *x = n.x + r * n.D, *dy = n.dy + r * n.D;
  float mean = n.mean[r], rstd = n.rstd[r], of_g = 0, of_g_xhat = 0;
  for (int c = lane; c < n.D; c += 32) {
    float g = dy[c] * n.gamma[c];
    of_g += g;
    of_g_xhat += g * (x[c] - mean) * rstd;
  }
  float mean_g = warp_sum(of_g) / n.D, mean_g_xhat = warp_sum(of_g_xhat) / n.D;
  for (int c = lane; c < n.D; c += 32) {
    float xhat = (x[c] - mean) * rstd;
    n.dx[r * n.D + c] = rstd * (dy[c] * n.gamma[c] - mean_g - xhat * mean_g_xhat);
  }
}

// A block takes 32 columns of some rows, a warp every WARPS-th of these: partial (parts, 2, D).
__global__ void __launch_bounds__(THREADS) backward_columns(NormGradient n, int parts, float* partial) {
  __shared__ float shared[2 * THREADS];
  int tiles = (n.D + 31) / 32, part = blockIdx.x / tiles, c = blockIdx.x % tiles * 32 + threadIdx.x % 32;
  float sums[2] = {0, 0};
  if (c < n.D)
    for (long r = n.rows * part / parts + threadIdx.x / 32; r < n.rows * (part + 1) / parts; r += WARPS) {
      float dy = n.dy[r * n.D + c];
      sums[0] += dy * (n.x[r * n.D + c] - n.mean[r]) * n.rstd[r];
      sums[1] += dy;
    }
  sum_rows(sums, shared, 32, WARPS);
  if (threadIdx.x / 32 || c >= n.D) return;
  partial[(2L * part) * n.D + c] = sums[0];
  partial[(2L * part + 1) * n.D + c] = sums[1];
}

__global__ void __launch_bounds__(THREADS) finish_columns(NormGradient n, int parts, const float* partial) {
  __shared__ float shared[THREADS];
  int c = blockIdx.x * 32 + threadIdx.x % 32;  // of dgamma and dbeta beside each other
  float sum[1] = {0};
  if (c < 2 * n.D)
    for (int part = threadIdx.x / 32; part < parts; part += WARPS) sum[0] += partial[2L * part * n.D + c];
  sum_rows(sum, shared, 32, WARPS);
  if (threadIdx.x / 32 || c >= 2 * n.D) return;
  (c < n.D ? n.dgamma[c] : n.dbeta[c - n.D]) = sum[0];
}

// v3: lane l keeps the channels [V (32 k + l), + V), k < K, of its warp's row in registers.
template <int V, int K>
__global__ void __launch_bounds__(THREADS) forward_registers(Norm n) {
  long r = blockIdx.x * (long)WARPS + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (r >= n.rows) return;
  float x[K][V] = {}, sum = 0, squares = 0;
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = V * (32 * k + lane);
    if (c < n.D) load(x[k], n.x + r * n.D + c);
  }
#pragma unroll
  for (int k = 0; k < K; k++)
    for (int v = 0; v < V; v++) sum += x[k][v];
  float mean = warp_sum(sum) / n.D;
#pragma unroll
  for (int k = 0; k < K; k++)
    for (int v = 0; v < V; v++)
      if (V * (32 * k + lane) < n.D) squares += (x[k][v] - mean) * (x[k][v] - mean);
  float rstd = rsqrtf(warp_sum(squares) / n.D + n.eps);
  if (lane == 0) n.mean[r] = mean, n.rstd[r] = rstd;
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = V * (32 * k + lane);
    if (c >= n.D) break;
    float gamma[V], beta[V];
    load(gamma, n.gamma + c);
    load(beta, n.beta + c);
    for (int v = 0; v < V; v++) x[k][v] = (x[k][v] - mean) * rstd * gamma[v] + beta[v];
    store_streaming(n.y + r * n.D + c, x[k]);
  }
}

// How many blocks run on a multiprocessor, whose lanes keep so many channels: the compiler keeps to the registers.
template <int CHANNELS>
constexpr int FITS = CHANNELS <= 10 ? 4 : CHANNELS <= 12 ? 3 : CHANNELS <= 20 ? 2 : 1;

// A warp goes over many rows and keeps the sums for its lanes' columns too. The block's warps then add theirs up in turn:
// partial (blocks, 2, D).
template <int V, int K>
__global__ void __launch_bounds__(THREADS, FITS<V * K>) backward_registers(NormGradient n, float* partial) {
  SHARED_DYNAMIC(float, sums);  // (2, D)
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float of_gamma[K][V] = {}, of_beta[K][V] = {};
  for (long r = blockIdx.x * (long)WARPS + warp; r < n.rows; r += (long)gridDim.x * WARPS) {
    float xhat[K][V] = {}, dy[K][V] = {}, mean = n.mean[r], rstd = n.rstd[r], of_g = 0, of_g_xhat = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = V * (32 * k + lane);
      if (c >= n.D) break;
      load(xhat[k], n.x + r * n.D + c);
      load(dy[k], n.dy + r * n.D + c);
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = V * (32 * k + lane);
      if (c >= n.D) break;
      float gamma[V];
      load(gamma, n.gamma + c);
      for (int v = 0; v < V; v++) {
        xhat[k][v] = (xhat[k][v] - mean) * rstd;
        of_gamma[k][v] += dy[k][v] * xhat[k][v];
        of_beta[k][v] += dy[k][v];
        dy[k][v] *= gamma[v];
        of_g += dy[k][v];
        of_g_xhat += dy[k][v] * xhat[k][v];
      }
    }
    float mean_g = warp_sum(of_g) / n.D, mean_g_xhat = warp_sum(of_g_xhat) / n.D;
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = V * (32 * k + lane);
      if (c >= n.D) break;
      for (int v = 0; v < V; v++) xhat[k][v] = rstd * (dy[k][v] - mean_g - xhat[k][v] * mean_g_xhat);
      store_streaming(n.dx + r * n.D + c, xhat[k]);
    }
  }
  for (int turn = 0; turn < WARPS; turn++) {
    if (turn) __syncthreads();
    if (warp != turn) continue;
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = V * (32 * k + lane);
      if (c >= n.D) break;
      if (turn) {
        float before[V];
        load(before, sums + c);
        for (int v = 0; v < V; v++) of_gamma[k][v] += before[v];
        load(before, sums + n.D + c);
        for (int v = 0; v < V; v++) of_beta[k][v] += before[v];
      }
      if (turn == WARPS - 1) {
        store(partial + 2L * blockIdx.x * n.D + c, of_gamma[k]);
        store(partial + (2L * blockIdx.x + 1) * n.D + c, of_beta[k]);
      } else {
        store(sums + c, of_gamma[k]);
        store(sums + n.D + c, of_beta[k]);
      }
    }
  }
}

template <class... P>
bool aligned(const P*... p) {
  return ((reinterpret_cast<size_t>(p) | ...)) % 16 == 0;
}

// Calls f with V and K, as types, of the smallest registers rung that holds a row of D; false: none does.
template <int V, int K>
struct Held {};
template <int V, class F>
bool with_registers(int D, const F& f) {
  int k = (D + 32 * V - 1) / (32 * V);
  if (k <= 1) f(Held<V, 1>());
  else if (k <= 2) f(Held<V, 2>());
  else if (k <= 3) f(Held<V, 3>());
  else if (k <= 5) f(Held<V, 5>());
  else if (k <= 7) f(Held<V, 7>());
  else if (k <= 10) f(Held<V, 10>());
  else return false;
  return true;
}

template <int V, int K>
void launch(Held<V, K>, const Norm& n) {
  LAUNCH((forward_registers<V, K>), blocks_for(n.rows, WARPS), THREADS, 0, stream(), n);
}

void finish(const NormGradient& n, int parts, const float* partial) {
  LAUNCH(finish_columns, blocks_for(2L * n.D, 32), THREADS, 0, stream(), n, parts, partial);
}

// As many blocks as run at a time.
template <int V, int K>
void launch(Held<V, K>, const NormGradient& n) {
  int blocks = int(std::min<long>(blocks_for(n.rows, WARPS), FITS<V * K> * multiprocessors()));
  float* partial = workspace(2L * blocks * n.D);
  LAUNCH((backward_registers<V, K>), blocks, THREADS, 2 * n.D * sizeof(float), stream(), n, partial);
  finish(n, blocks, partial);
}

}  // namespace

void layer_norm_forward(float* y, float* mean, float* rstd, const float* x, const float* gamma, const float* beta, long rows,
                        int D, double eps) {
  if (rows == 0) return;
  Norm n{y, mean, rstd, x, gamma, beta, rows, D, float(eps)};
  int rung = layer_norm.rung();
  if (rung == 1) {
    LAUNCH(forward_naive, blocks_for(rows, 64), 64, 0, stream(), n);
    return;
  }
  auto launched = [&](auto held) { launch(held, n); };
  bool vectors = D % 4 == 0 && aligned(y, x, gamma, beta);
  if (rung == 3 && (vectors ? with_registers<4>(D, launched) : with_registers<1>(D, launched))) return;
  LAUNCH(forward_warp, blocks_for(rows, WARPS), THREADS, 0, stream(), n);
}

void layer_norm_backward(float* dx, float* dgamma, float* dbeta, const float* dy, const float* x, const float* gamma,
                         const float* mean, const float* rstd, long rows, int D) {
  NormGradient n{dx, dgamma, dbeta, dy, x, gamma, mean, rstd, rows, D};
  int rung = layer_norm.rung();
  if (rung == 1) {
    if (rows) LAUNCH(backward_rows_naive, blocks_for(rows, 64), 64, 0, stream(), n);
    LAUNCH(backward_columns_naive, blocks_for(D, 64), 64, 0, stream(), n);
    return;
  }
  auto launched = [&](auto held) { launch(held, n); };
  bool vectors = D % 4 == 0 && aligned(dx, dy, x, gamma);
  if (rung == 3 && rows && (vectors ? with_registers<4>(D, launched) : with_registers<1>(D, launched))) return;
  if (rows) LAUNCH(backward_rows, blocks_for(rows, WARPS), THREADS, 0, stream(), n);
  int tiles = int(blocks_for(D, 32));
  int parts = int(std::max(1L, std::min<long>(rows / (4 * WARPS), 4L * multiprocessors() / tiles)));
  float* partial = workspace(2L * parts * D);
  LAUNCH(backward_columns, tiles * parts, THREADS, 0, stream(), n, parts, partial);
  finish(n, parts, partial);
}

}  // namespace minidiff::cuda
