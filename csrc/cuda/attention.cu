// Attention, softmax(Q K^T * scale + bias) V in several heads, by blocks of queries and tiles of keys:
//
//                    keys ──►                     for a block of queries, over the tiles of keys:
//              ┌──────┬──────┬──────┐               S = scale Q K^T + bias
//              │      │      │      │               m' = max(m, rows of S),  P = exp(S - m')
//    queries   │  S   │      │      │ a block       l = l exp(m - m') + rows of P
//              │      │      │      │               O = O exp(m - m') + P V
//              ├──────┼──────┼──────┤             in the end  y = O / l,  lse = m + log(l)
//              └──────┴──────┴──────┘
//                tile                             S and P stay on the chip: this is the online softmax.
//
// Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135. Exponents are taken to the base 2, which
// is what the chip has: scale * log2(e) goes into Q as it is loaded.
//
// Backward, with P = exp(S - lse) computed again and delta = rows of dY . Y:
//   dV = P^T dY,  dS = P (dY V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q
// One kernel holds a block of queries and goes over the keys for dQ, another holds a block of keys and goes over the queries
// for dK and dV, so nothing is added up by several blocks: no atomics, and the same sums every time.
//
// The floor is arithmetic: 2 Lq Lk (d + dv) operations a head forward, 2 Lq Lk (3 d + 2 dv) backward, where S and dY V^T are
// computed by both kernels: 4 d + 3 dv. The memory moved is that of the arrays, and K and V again for every block of
// queries, which come from the L2. v5 rounds K and V beforehand (backward Q and dY as well): 6 bytes a number once, and then
// 2 instead of 4 each time they are read. With few keys, as in cross-attention, memory is the floor: 4 bytes for each number
// of Q and y.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "../kernels.h"
#include "ladder.h"
#include "stream.h"
#include "sums.h"

// cp.async and the tensor cores' bf16: for older devices these kernels are empty, and the ladder never takes them.
#if __CUDA_ARCH__ >= 800 || !defined(__CUDACC__)
#define SM_80 1
#endif

namespace minidiff::cuda {
namespace {

Ladder ladder("attention",
              {{"naive", "one thread a number; all scores in memory; any size of heads"},
               {"flash", "online softmax over tiles of keys in shared memory; one warp a query, heads up to 256"},
               {"registers", "a block of 64 queries; each thread computes 4 x 4 scores and 4 rows of y in registers"},
               {"tensor cores", "bf16 factors, products by mma.sync; the scores' registers are the next product's factor",
                80, Operands::bf16},
               {"pipelined", "rounded beforehand; the next tile is copied past the registers while this one is multiplied",
                80, Operands::bf16}});

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// The rows of one head: row r begins at first + r * step.
template <class T>
struct Rows {
  T* first;
  long step;
  __device__ Rows(T* x, long b, int L, int heads, int h, int d)
      : first(x + (b * L * heads + h) * d), step((long)heads * d) {}
  __device__ T* operator[](long r) const { return first + r * step; }
};
struct Head {
  Rows<const float> q, k, v, dy;
  Rows<float> y, dq, dk, dv;
  __device__ Head(const Attention& a, long b, int h)
      : q(a.q, b, a.Lq, a.heads, h, a.d),
        k(a.k, b, a.Lk, a.heads, h, a.d),
        v(a.v, b, a.Lk, a.heads, h, a.dv),
        dy(a.dy, b, a.Lq, a.heads, h, a.dv),
        y(a.y, b, a.Lq, a.heads, h, a.dv),
        dq(a.dq, b, a.Lq, a.heads, h, a.d),
        dk(a.dk, b, a.Lk, a.heads, h, a.d),
        dv(a.dv_out, b, a.Lk, a.heads, h, a.dv) {}
};

// A score in units of 1 / unit, with its bias; minus infinity where there is no such query or key, or it is hidden.
__device__ __forceinline__ float masked(const Attention& a, long b, int h, int i, int j, float score, float unit) {
  if (i >= a.Lq || j >= a.Lk || (a.causal && j > i)) return -INFINITY;
  if (!a.bias) return score;
  long row = b * a.bias_strides[0] + h * a.bias_strides[1] + i * a.bias_strides[2];
  return score + unit * a.bias[row + j * a.bias_strides[3]];
}

// v1: the scores S, and backward P and dS, are arrays (B, heads, Lq, Lk); every thread computes one number.
__global__ void scores_naive(Attention a, float* S) {
  long n = blockIdx.x * (long)blockDim.x + threadIdx.x, bh = n / a.Lk / a.Lq;
  if (bh >= (long)a.B * a.heads) return;
  int j = int(n % a.Lk), i = int(n / a.Lk % a.Lq), h = int(bh % a.heads);
  Head head(a, bh / a.heads, h);
  float sum = 0;
  for (int c = 0; c < a.d; c++) sum += head.q[i][c] * head.k[j][c];
  S[n] = masked(a, bh / a.heads, h, i, j, sum * a.scale, 1);
}

__global__ void softmax_naive(Attention a, float* S) {
  long row = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (row >= (long)a.B * a.heads * a.Lq) return;
  float* s = S + row * a.Lk;
  float top = -INFINITY, sum = 0;
  for (int j = 0; j < a.Lk; j++) top = fmaxf(top, s[j]);
  for (int j = 0; j < a.Lk; j++) sum += s[j] = expf(s[j] - top);
  for (int j = 0; j < a.Lk; j++) s[j] /= sum;
  if (a.lse) a.lse[row] = top + logf(sum);
}

__global__ void y_naive(Attention a, const float* P) {
  long n = blockIdx.x * (long)blockDim.x + threadIdx.x, row = n / a.dv, bh = row / a.Lq;
  if (bh >= (long)a.B * a.heads) return;
  Head head(a, bh / a.heads, int(bh % a.heads));
  float sum = 0;
  for (int j = 0; j < a.Lk; j++) sum += P[row * a.Lk + j] * head.v[j][n % a.dv];
  head.y[row % a.Lq][n % a.dv] = sum;
}

// S becomes P; dS beside it.
__global__ void ds_naive(Attention a, float* S, float* dS) {
  long n = blockIdx.x * (long)blockDim.x + threadIdx.x, row = n / a.Lk, bh = row / a.Lq;
  if (bh >= (long)a.B * a.heads) return;
  int j = int(n % a.Lk), i = int(row % a.Lq);
  Head head(a, bh / a.heads, int(bh % a.heads));
  float dp = 0, delta = 0;
  for (int c = 0; c < a.dv; c++) dp += head.dy[i][c] * head.v[j][c];
  for (int c = 0; c < a.dv; c++) delta += head.dy[i][c] * head.y[i][c];
  S[n] = expf(S[n] - a.lse[row]);
  dS[n] = S[n] * (dp - delta);
}

__global__ void dq_naive(Attention a, const float* dS) {
  long n = blockIdx.x * (long)blockDim.x + threadIdx.x, row = n / a.d, bh = row / a.Lq;
  if (bh >= (long)a.B * a.heads) return;
  Head head(a, bh / a.heads, int(bh % a.heads));
  float sum = 0;
  for (int j = 0; j < a.Lk; j++) sum += dS[row * a.Lk + j] * head.k[j][n % a.d];
  head.dq[row % a.Lq][n % a.d] = sum * a.scale;
}

__global__ void dk_naive(Attention a, const float* dS) {
  long n = blockIdx.x * (long)blockDim.x + threadIdx.x, row = n / a.d, bh = row / a.Lk;
  if (bh >= (long)a.B * a.heads) return;
  Head head(a, bh / a.heads, int(bh % a.heads));
  float sum = 0;
  for (int i = 0; i < a.Lq; i++) sum += dS[(bh * a.Lq + i) * a.Lk + row % a.Lk] * head.q[i][n % a.d];
  head.dk[row % a.Lk][n % a.d] = sum * a.scale;
}

__global__ void dv_naive(Attention a, const float* P) {
  long n = blockIdx.x * (long)blockDim.x + threadIdx.x, row = n / a.dv, bh = row / a.Lk;
  if (bh >= (long)a.B * a.heads) return;
  Head head(a, bh / a.heads, int(bh % a.heads));
  float sum = 0;
  for (int i = 0; i < a.Lq; i++) sum += P[(bh * a.Lq + i) * a.Lk + row % a.Lk] * head.dy[i][n % a.dv];
  head.dv[row % a.Lk][n % a.dv] = sum;
}

// Which head, and which rows of it, are this block's: `rows` of L for every block.
struct Share {
  long b;
  int h, first;
  __device__ Share(const Attention& a, int L, int rows) {
    int blocks = (L + rows - 1) / rows;
    first = int(blockIdx.x % blocks) * rows;
    h = int(blockIdx.x / blocks % a.heads);
    b = blockIdx.x / blocks / a.heads;
  }
  __device__ long row(const Attention& a, long i) const { return (b * a.heads + h) * a.Lq + i; }  // of lse and delta
};

// Copies `rows` rows of `width` numbers from row `first` on, times `factor`, by all of the block; zeros from row L on and
// up to `padded` columns. V = 4: addresses and widths are multiples of 16 bytes.
template <int V>
__device__ __forceinline__ void load_tile(float* to, int stride, int rows, int padded, const Rows<const float>& from,
                                          int first, int L, int width, float factor) {
  int columns = padded / V, threads = blockDim.x;
  int r = threadIdx.x / columns, c = threadIdx.x % columns, r_step = threads / columns, c_step = threads % columns;
#pragma unroll 4
  while (r < rows) {
    float x[V] = {};
    if (first + r < L && c * V < width) load(x, from[first + r] + c * V);
    for (int v = 0; v < V; v++) x[v] *= factor;
    store(to + r * stride + c * V, x);
    r += r_step;
    c += c_step;
    if (c >= columns) c -= columns, r++;
  }
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
  return v;
}
__device__ __forceinline__ float dot(const float* x, const float* y, int n) {
  float sum = 0;
  for (int c = 0; c < n; c++) sum += x[c] * y[c];
  return sum;
}
__device__ __forceinline__ float lse_of(float m, float l) { return l > 0 ? (m + log2f(l)) * LN_2 : NAN; }

// v2: one warp a row, WARPS of them share a tile of 32 columns. For products along the channels lane l computes column l;
// for sums over the columns it computes the channels l, l + 32, ... The tile holds one matrix at a time: its stride is odd,
// so that both ways to read it touch all banks.
constexpr int WARPS = 8, TILE = 32, WIDEST = 256;

struct Flash {  // the shared memory of a block
  float *tile, *row1, *row2;  // row1, row2: this warp's own rows, of width d and dv
  int stride;
  __device__ Flash(const Attention& a, float* shared) : tile(shared), stride(max(a.d, a.dv) | 1) {
    row1 = shared + TILE * stride + threadIdx.x / 32 * (a.d + a.dv);
    row2 = row1 + a.d;
  }
  static size_t bytes(const Attention& a) {
    return sizeof(float) * (TILE * (std::max(a.d, a.dv) | 1) + WARPS * (a.d + a.dv));
  }
  // Fills the tile with rows [first, first + TILE) once all have read what it holds.
  __device__ void fill(const Rows<const float>& from, int first, int L, int width, float factor) {
    __syncthreads();
    load_tile<1>(tile, stride, TILE, width, from, first, L, width, factor);
    __syncthreads();
  }
  __device__ const float* column() const { return tile + threadIdx.x % 32 * stride; }
  // sum += weight of each column times the column
  __device__ void add(float (&sum)[WIDEST / 32], float weight, int width) const {
    int lane = threadIdx.x % 32;
    for (int j = 0; j < TILE; j++) {
      float w = __shfl_sync(~0u, weight, j);
#pragma unroll
      for (int k = 0; k < WIDEST / 32; k++)
        if (lane + 32 * k < width) sum[k] += w * tile[j * stride + lane + 32 * k];
    }
  }
};
// A warp's row, to and from the lanes.
__device__ __forceinline__ void fetch(float* to, const float* from, int width, float factor, bool there) {
  for (int c = threadIdx.x % 32; c < width; c += 32) to[c] = there ? from[c] * factor : 0;
}
__device__ __forceinline__ void put(float* to, const float (&from)[WIDEST / 32], int width, float factor) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < WIDEST / 32; k++)
    if (lane + 32 * k < width) to[lane + 32 * k] = from[k] * factor;
}

__global__ void __launch_bounds__(32 * WARPS) forward_flash(Attention a) {
  SHARED_DYNAMIC(float, shared);
  Flash f(a, shared);
  Share s(a, a.Lq, WARPS);
  Head head(a, s.b, s.h);
  int i = s.first + threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum[WIDEST / 32] = {}, m = -INFINITY, l = 0;
  fetch(f.row1, head.q[i], a.d, a.scale * LOG2_E, i < a.Lq);
  int keys = a.causal ? min(a.Lk, s.first + WARPS) : a.Lk;
  for (int j = 0; j < keys; j += TILE) {
    f.fill(head.k, j, a.Lk, a.d, 1);
    float score = masked(a, s.b, s.h, i, j + lane, dot(f.row1, f.column(), a.d), LOG2_E);
    float next = fmaxf(m, warp_max(score)), base = next == -INFINITY ? 0 : next;
    float p = fast_exp2(score - base), shrink = fast_exp2(m - base);
    l = l * shrink + warp_sum(p);
    m = next;
    for (float& x : sum) x *= shrink;
    f.fill(head.v, j, a.Lk, a.dv, 1);
    f.add(sum, p, a.dv);
  }
  if (i >= a.Lq) return;
  put(head.y[i], sum, a.dv, 1 / l);
  if (a.lse && lane == 0) a.lse[s.row(a, i)] = lse_of(m, l);
}

// delta (B, heads, Lq), one warp a row
__global__ void __launch_bounds__(32 * WARPS) deltas(Attention a, float* delta) {
  Share s(a, a.Lq, WARPS);
  Head head(a, s.b, s.h);
  int i = s.first + threadIdx.x / 32;
  if (i >= a.Lq) return;
  float sum = 0;
  for (int c = threadIdx.x % 32; c < a.dv; c += 32) sum += head.dy[i][c] * head.y[i][c];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[s.row(a, i)] = sum;
}

__global__ void __launch_bounds__(32 * WARPS) dq_flash(Attention a, const float* delta) {
  SHARED_DYNAMIC(float, shared);
  Flash f(a, shared);
  Share s(a, a.Lq, WARPS);
  Head head(a, s.b, s.h);
  int i = s.first + threadIdx.x / 32, lane = threadIdx.x % 32;
  bool there = i < a.Lq;
  float dq[WIDEST / 32] = {}, lse = there ? a.lse[s.row(a, i)] * LOG2_E : 0, of_row = there ? delta[s.row(a, i)] : 0;
  fetch(f.row1, head.q[i], a.d, a.scale * LOG2_E, there);
  fetch(f.row2, head.dy[i], a.dv, 1, there);
  int keys = a.causal ? min(a.Lk, s.first + WARPS) : a.Lk;
  for (int j = 0; j < keys; j += TILE) {
    f.fill(head.v, j, a.Lk, a.dv, 1);
    float dp = dot(f.row2, f.column(), a.dv);
    f.fill(head.k, j, a.Lk, a.d, 1);
    float p = fast_exp2(masked(a, s.b, s.h, i, j + lane, dot(f.row1, f.column(), a.d), LOG2_E) - lse);
    f.add(dq, p * (dp - of_row), a.d);
  }
  if (there) put(head.dq[i], dq, a.d, a.scale);
}

__global__ void __launch_bounds__(32 * WARPS) dk_dv_flash(Attention a, const float* delta) {
  SHARED_DYNAMIC(float, shared);
  Flash f(a, shared);
  Share s(a, a.Lk, WARPS);
  Head head(a, s.b, s.h);
  int j = s.first + threadIdx.x / 32, lane = threadIdx.x % 32;
  float dk[WIDEST / 32] = {}, dv[WIDEST / 32] = {};
  fetch(f.row1, head.k[j], a.d, 1, j < a.Lk);
  fetch(f.row2, head.v[j], a.dv, 1, j < a.Lk);
  for (int i0 = a.causal ? s.first / TILE * TILE : 0; i0 < a.Lq; i0 += TILE) {
    int i = i0 + lane;
    float lse = i < a.Lq ? a.lse[s.row(a, i)] * LOG2_E : 0, of_row = i < a.Lq ? delta[s.row(a, i)] : 0;
    f.fill(head.q, i0, a.Lq, a.d, a.scale * LOG2_E);
    float p = fast_exp2(masked(a, s.b, s.h, i, j, dot(f.row1, f.column(), a.d), LOG2_E) - lse);
    f.fill(head.dy, i0, a.Lq, a.dv, 1);
    float ds = p * (dot(f.row2, f.column(), a.dv) - of_row);
    f.add(dv, p, a.dv);
    f.fill(head.q, i0, a.Lq, a.d, a.scale);
    f.add(dk, ds, a.d);
  }
  if (j >= a.Lk) return;
  put(head.dk[j], dk, a.d, 1);
  put(head.dv[j], dv, a.dv, 1);
}

// v3: 128 threads take a block of 64 rows and tiles of 32 columns. Thread (ty, tx) of 16 x 8 computes the scores of rows
// ty + 16 k and columns tx + 8 n, and the channels [4 tx + 32 n, + 4) of the same rows. Heads are padded to CHUNKS * 32
// channels; 4 more to a row keep neighbouring rows in different banks.
constexpr int THREADS = 128, BLOCK = 64, COLUMNS = 32, P_STRIDE = 40;

template <int CHUNKS>
struct Tiles {
  static constexpr int STRIDE = 32 * CHUNKS + 4;
  static constexpr int ROWS = BLOCK * STRIDE, COLS = COLUMNS * STRIDE, P = BLOCK * P_STRIDE;  // floats

  static __device__ void load(float* to, int rows, const Rows<const float>& from, int first, int L, int width, float factor,
                              bool vectors) {
    if (vectors)
      load_tile<4>(to, STRIDE, rows, 32 * CHUNKS, from, first, L, width, factor);
    else
      load_tile<1>(to, STRIDE, rows, 32 * CHUNKS, from, first, L, width, factor);
  }
  // s = rows . columns
  static __device__ void scores(float (&s)[4][4], const float* rows, const float* columns, int width) {
    rows += threadIdx.x / 8 * STRIDE;
    columns += threadIdx.x % 8 * STRIDE;
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int n = 0; n < 4; n++) s[k][n] = 0;
#pragma unroll 1
    for (int c = 0; c < width; c += 4) {
      float4 x[4];
#pragma unroll
      for (int k = 0; k < 4; k++) x[k] = *reinterpret_cast<const float4*>(rows + 16 * k * STRIDE + c);
#pragma unroll
      for (int n = 0; n < 4; n++) {
        float4 y = *reinterpret_cast<const float4*>(columns + 8 * n * STRIDE + c);
#pragma unroll
        for (int k = 0; k < 4; k++) s[k][n] += x[k].x * y.x + x[k].y * y.y + x[k].z * y.z + x[k].w * y.w;
      }
    }
  }
  // sum += P . columns; P goes through shared memory, from and to the threads of one row, which are of one warp.
  static __device__ void add(float (&sum)[4][CHUNKS][4], const float (&p)[4][4], float* P, const float* columns) {
    int tx = threadIdx.x % 8;
    P += threadIdx.x / 8 * P_STRIDE;
    __syncwarp();  // what was there before has been read
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int n = 0; n < 4; n++) P[16 * k * P_STRIDE + tx + 8 * n] = p[k][n];
    __syncwarp();
#pragma unroll 1
    for (int j = 0; j < COLUMNS; j += 4) {
      float4 row[4];
#pragma unroll
      for (int k = 0; k < 4; k++) row[k] = *reinterpret_cast<const float4*>(P + 16 * k * P_STRIDE + j);
#pragma unroll
      for (int n = 0; n < CHUNKS; n++)
#pragma unroll
        for (int jj = 0; jj < 4; jj++) {
          float4 y = *reinterpret_cast<const float4*>(columns + (j + jj) * STRIDE + 4 * tx + 32 * n);
#pragma unroll
          for (int k = 0; k < 4; k++) {
            float w = jj == 0 ? row[k].x : jj == 1 ? row[k].y : jj == 2 ? row[k].z : row[k].w;
            sum[k][n][0] += w * y.x;
            sum[k][n][1] += w * y.y;
            sum[k][n][2] += w * y.z;
            sum[k][n][3] += w * y.w;
          }
        }
    }
  }
  // The P that this thread brought to add().
  static __device__ void recall(float (&p)[4][4], const float* P) {
    P += threadIdx.x / 8 * P_STRIDE + threadIdx.x % 8;
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int n = 0; n < 4; n++) p[k][n] = P[16 * k * P_STRIDE + 8 * n];
  }
  static __device__ void put(const Rows<float>& to, int first, int L, int width, const float (&sum)[4][CHUNKS][4],
                             const float (&factor)[4], bool vectors) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      int r = first + threadIdx.x / 8 + 16 * k;
      if (r >= L) continue;
#pragma unroll
      for (int n = 0; n < CHUNKS; n++) {
        int c = threadIdx.x % 8 * 4 + 32 * n;
        float x[4];
#pragma unroll
        for (int v = 0; v < 4; v++) x[v] = sum[k][n][v] * factor[k];
        if (vectors && c < width) store(to[r] + c, x);
        if (vectors) continue;
#pragma unroll
        for (int v = 0; v < 4; v++)
          if (c + v < width) to[r][c + v] = x[v];
      }
    }
  }
};

// One step of the online softmax for a row, whose scores lie in LANES neighbouring lanes: s becomes P.
template <int LANES, int N>
__device__ __forceinline__ float online_softmax(float (&s)[N], float& m, float& l) {
  float next = m, sum = 0;
#pragma unroll
  for (int n = 0; n < N; n++) next = fmaxf(next, s[n]);
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) next = fmaxf(next, __shfl_xor_sync(~0u, next, step));
  float base = next == -INFINITY ? 0 : next, shrink = fast_exp2(m - base);
#pragma unroll
  for (int n = 0; n < N; n++) sum += s[n] = fast_exp2(s[n] - base);
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  l = l * shrink + sum;
  m = next;
  return shrink;
}

template <int CHUNKS>
__global__ void __launch_bounds__(THREADS) forward_registers(Attention a, bool vectors) {
  using T = Tiles<CHUNKS>;
  SHARED_DYNAMIC(float, shared);
  float *q = shared, *k = q + T::ROWS, *v = k + T::COLS, *P = v + T::COLS;
  Share s(a, a.Lq, BLOCK);
  Head head(a, s.b, s.h);
  int tx = threadIdx.x % 8, ty = threadIdx.x / 8;
  float y[4][CHUNKS][4] = {}, m[4], l[4] = {};
#pragma unroll
  for (int r = 0; r < 4; r++) m[r] = -INFINITY;
  T::load(q, BLOCK, head.q, s.first, a.Lq, a.d, a.scale * LOG2_E, vectors);
  int keys = a.causal ? min(a.Lk, s.first + BLOCK) : a.Lk;
  for (int j = 0; j < keys; j += COLUMNS) {
    __syncthreads();
    T::load(k, COLUMNS, head.k, j, a.Lk, a.d, 1, vectors);
    T::load(v, COLUMNS, head.v, j, a.Lk, a.dv, 1, vectors);
    __syncthreads();
    float p[4][4];
    T::scores(p, q, k, a.d);
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
      for (int n = 0; n < 4; n++)
        p[r][n] = masked(a, s.b, s.h, s.first + ty + 16 * r, j + tx + 8 * n, p[r][n], LOG2_E);
      float shrink = online_softmax<8>(p[r], m[r], l[r]);
#pragma unroll
      for (int n = 0; n < 4 * CHUNKS; n++) y[r][n / 4][n % 4] *= shrink;
    }
    T::add(y, p, P, v);
  }
  float factor[4];
#pragma unroll
  for (int r = 0; r < 4; r++) factor[r] = 1 / l[r];
  T::put(head.y, s.first, a.Lq, a.dv, y, factor, vectors);
#pragma unroll
  for (int r = 0; r < 4; r++) {
    int i = s.first + ty + 16 * r;
    if (a.lse && tx == 0 && i < a.Lq) a.lse[s.row(a, i)] = lse_of(m[r], l[r]);
  }
}

// On a multiprocessor, by their shared memory.
constexpr int blocks_that_fit(int chunks) { return chunks == 1 ? 4 : chunks == 2 ? 3 : chunks == 5 ? 1 : 2; }

// The block's rows are queries, for dQ, or with BY_KEYS keys, for dK and dV; the tiles' columns are the others.
template <int CHUNKS, bool BY_KEYS>
__global__ void __launch_bounds__(THREADS, blocks_that_fit(CHUNKS))
    gradient_registers(Attention a, const float* delta, bool vectors) {
  using T = Tiles<CHUNKS>;
  SHARED_DYNAMIC(float, shared);
  float *rows1 = shared, *rows2 = rows1 + T::ROWS, *cols1 = rows2 + T::ROWS, *cols2 = cols1 + T::COLS;
  float *P = cols2 + T::COLS, *lse = P + T::P, *of_row = lse + BLOCK;
  int L = BY_KEYS ? a.Lk : a.Lq, L2 = BY_KEYS ? a.Lq : a.Lk;
  Share s(a, L, BLOCK);
  Head head(a, s.b, s.h);
  int tx = threadIdx.x % 8, ty = threadIdx.x / 8;
  float d1[4][CHUNKS][4] = {}, d2[BY_KEYS ? 4 : 1][CHUNKS][4] = {};
  auto fetch_queries = [&](int first, int n) {  // what belongs to their rows
    int t = threadIdx.x, i = first + t;
    if (t >= n) return;
    lse[t] = i < a.Lq ? a.lse[s.row(a, i)] * LOG2_E : 0;
    of_row[t] = i < a.Lq ? delta[s.row(a, i)] : 0;
  };
  T::load(rows1, BLOCK, BY_KEYS ? head.k : head.q, s.first, L, a.d, BY_KEYS ? 1 : a.scale * LOG2_E, vectors);
  T::load(rows2, BLOCK, BY_KEYS ? head.v : head.dy, s.first, L, a.dv, 1, vectors);
  if (!BY_KEYS) fetch_queries(s.first, BLOCK);
  int begin = BY_KEYS && a.causal ? s.first : 0, end = !BY_KEYS && a.causal ? min(L2, s.first + BLOCK) : L2;
  for (int c0 = begin; c0 < end; c0 += COLUMNS) {
    __syncthreads();
    T::load(cols1, COLUMNS, BY_KEYS ? head.q : head.k, c0, L2, a.d, BY_KEYS ? a.scale * LOG2_E : 1, vectors);
    T::load(cols2, COLUMNS, BY_KEYS ? head.dy : head.v, c0, L2, a.dv, 1, vectors);
    if (BY_KEYS) fetch_queries(c0, COLUMNS);
    __syncthreads();
    float p[4][4], ds[4][4];
    T::scores(p, rows1, cols1, a.d);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int n = 0; n < 4; n++) {
        int r = ty + 16 * k, c = tx + 8 * n, i = BY_KEYS ? c0 + c : s.first + r, j = BY_KEYS ? s.first + r : c0 + c;
        p[k][n] = fast_exp2(masked(a, s.b, s.h, i, j, p[k][n], LOG2_E) - lse[BY_KEYS ? c : r]);
      }
    if constexpr (BY_KEYS) {
      T::add(d2, p, P, cols2);
      T::recall(p, P);  // it has not been in registers all the while
    }
    T::scores(ds, rows2, cols2, a.dv);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int n = 0; n < 4; n++) ds[k][n] = p[k][n] * (ds[k][n] - of_row[BY_KEYS ? tx + 8 * n : ty + 16 * k]);
    T::add(d1, ds, P, cols1);
  }
  const float of_d1 = BY_KEYS ? LN_2 : a.scale, factor1[4] = {of_d1, of_d1, of_d1, of_d1}, factor2[4] = {1, 1, 1, 1};
  T::put(BY_KEYS ? head.dk : head.dq, s.first, L, a.d, d1, factor1, vectors);
  if constexpr (BY_KEYS) T::put(head.dv, s.first, L, a.dv, d2, factor2, vectors);
}

// v4: the same blocks on tensor cores, for heads up to 64. A warp has 16 R of the block's rows; lane 4 g + t computes rows g
// and g + 8 of every 16, and of every 8 columns those at 2 t and 2 t + 1 (see ptx.h). The block's rows are left factors from
// beginning to end and stay in registers. Scores come out so that, rounded to bf16, they are the next product's left factor
// as they are. Heads are padded to 16 N channels. A tile has rows of K and V, or of Q and dY, side by side; 8 numbers more
// keep the rows that ldmatrix reads in different banks.
using Bf16 = unsigned short;

// x = V numbers of a row from column c on; with VECTORS they are all there or none is, and are loaded at once.
template <bool VECTORS, int V>
__device__ __forceinline__ void load_some(float (&x)[V], const float* row, int c, int width) {
  if constexpr (!VECTORS) {
#pragma unroll
    for (int v = 0; v < V; v++) x[v] = c + v < width ? row[c + v] : 0;
  } else if (c < width) {
    if constexpr (V == 2) {
      float2 two = *reinterpret_cast<const float2*>(row + c);
      x[0] = two.x, x[1] = two.y;
    } else {
      load(x, row + c);
    }
  }
}
template <int V>
__device__ __forceinline__ void load_some(float (&x)[V], const float* row, int c, int width, bool vectors) {
  vectors ? load_some<true>(x, row, c, width) : load_some<false>(x, row, c, width);
}
__device__ __forceinline__ void store_rounded(Bf16* to, const float (&x)[4], float factor) {
  *reinterpret_cast<uint2*>(to) =
      make_uint2(pack_bf16(x[0] * factor, x[1] * factor), pack_bf16(x[2] * factor, x[3] * factor));
}

// f(r, n, e) for each number that a lane has of R x N fragments: row 8 * (e / 2) of the 16, column e % 2 of the 8.
template <int R, int N, class F>
__device__ __forceinline__ void each(F f) {
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) f(r, n, e);
}

template <int N, int R>
struct Fragments {
  static constexpr int STRIDE = 32 * N + 8;
  using Factors = unsigned[R][N][4];
  using Sums = float[R][2 * N][4];

  // The warp's rows, which begin at row `first`, times `factor`.
  template <bool VECTORS>
  static __device__ void load(Factors& x, const Rows<const float>& from, int first, int L, int width, float factor) {
    int row = first + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    each<R, N>([&](int r, int c, int e) {
      int i = row + 16 * r + e % 2 * 8;
      float v[2] = {};
      if (i < L) load_some<VECTORS>(v, from[i], column + 16 * c + e / 2 * 8, width);
      x[r][c][e] = pack_bf16(v[0] * factor, v[1] * factor);
    });
  }
  static __device__ void load(Factors& x, const Rows<const float>& from, int first, int L, int width, float factor,
                              bool vectors) {
    vectors ? load<true>(x, from, first, L, width, factor) : load<false>(x, from, first, L, width, factor);
  }
  // The same of rows that v5 has rounded; the first is at `rows`.
  static __device__ void load(Factors& x, const Bf16* rows) {
    rows += threadIdx.x % 32 / 4 * STRIDE + threadIdx.x % 4 * 2;
    each<R, N>([&](int r, int c, int e) {
      x[r][c][e] = *reinterpret_cast<const unsigned*>(rows + (16 * r + e % 2 * 8) * STRIDE + 16 * c + e / 2 * 8);
    });
  }
  // What stands behind its channels.
  static __device__ const float* tail(const Bf16* rows, int row) {
    return reinterpret_cast<const float*>(rows + row * STRIDE + 32 * N);
  }
  // s += rows . columns, of the warp's rows and 8 T columns
  template <int T>
  static __device__ void add_scores(float (&s)[R][T][4], const Factors& rows, const Bf16* columns) {
    int lane = threadIdx.x % 32;
    columns += (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int c = 0; c < N; c++)
#pragma unroll
      for (int n = 0; n < T; n += 2) {
        unsigned y[4];
        ldmatrix(y, columns + 8 * n * STRIDE + 16 * c);
#pragma unroll
        for (int r = 0; r < R; r++) multiply(s[r][n], s[r][n + 1], rows[r][c], y);
      }
  }
  // sum += P . columns
  template <int T>
  static __device__ void add(Sums& sum, const float (&p)[R][T][4], const Bf16* columns) {
    int lane = threadIdx.x % 32;
    columns += lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < T; j += 2) {
      unsigned x[R][1][4];
      each<R, 1>([&](int r, int, int e) {
        const float* two = &p[r][j + e / 2][e % 2 * 2];
        x[r][0][e] = pack_bf16(two[0], two[1]);
      });
#pragma unroll
      for (int n = 0; n < 2 * N; n += 2) {
        unsigned y[4];
        ldmatrix_trans(y, columns + 8 * j * STRIDE + 8 * n);
#pragma unroll
        for (int r = 0; r < R; r++) multiply(sum[r][n], sum[r][n + 1], x[r][0], y);
      }
    }
  }
  // Two products side by side: y are the factors of 16 columns.
  static __device__ void multiply(float (&left)[4], float (&right)[4], const unsigned (&x)[4], const unsigned (&y)[4]) {
    const unsigned of_left[2] = {y[0], y[1]}, of_right[2] = {y[2], y[3]};
    mma_m16n8k16_bf16(left, x, of_left, left);
    mma_m16n8k16_bf16(right, x, of_right, right);
  }
  // A step of the online softmax: s becomes P. Only if a score exceeds its row's m by more than `room` does m follow, and l
  // and y shrink: a float has room for P above 1. Each lane has an l of its own columns.
  template <int T>
  static __device__ void softmax(float (&s)[R][T][4], float (&m)[2 * R], float (&l)[2 * R], Sums& y, float room) {
    float top[2 * R];
    bool exceeds = false;
#pragma unroll
    for (int r = 0; r < 2 * R; r++) top[r] = m[r];
    each<R, T>([&](int r, int n, int e) { top[2 * r + e / 2] = fmaxf(top[2 * r + e / 2], s[r][n][e]); });
#pragma unroll
    for (int r = 0; r < 2 * R; r++) exceeds |= top[r] > m[r] + room;
    if (__any_sync(~0u, exceeds)) {
      float shrink[2 * R];
#pragma unroll
      for (int r = 0; r < 2 * R; r++) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], step));
        shrink[r] = fast_exp2(m[r] - top[r]);
        m[r] = top[r];
        l[r] *= shrink[r];
      }
      each<R, 2 * N>([&](int r, int n, int e) { y[r][n][e] *= shrink[2 * r + e / 2]; });
    }
    each<R, T>([&](int r, int n, int e) { l[2 * r + e / 2] += s[r][n][e] = fast_exp2(s[r][n][e] - m[2 * r + e / 2]); });
  }
  static __device__ void finish(const Attention& a, long b, int h, int first, const Sums& y, const float (&m)[2 * R],
                                float (&l)[2 * R], bool vectors) {
    float factor[2 * R];
    int row = first + threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2 * R; r++) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) l[r] += __shfl_xor_sync(~0u, l[r], step);
      factor[r] = 1 / l[r];
      if (a.lse && threadIdx.x % 4 == 0 && row + 8 * r < a.Lq)
        a.lse[(b * a.heads + h) * a.Lq + row + 8 * r] = lse_of(m[r], l[r]);
    }
    put(Head(a, b, h).y, first, a.Lq, a.dv, y, factor, vectors);
  }
  // Each row's sums times its factor.
  static __device__ void put(const Rows<float>& to, int first, int L, int width, const Sums& sum,
                             const float (&factor)[2 * R], bool vectors) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2 * R; r++) {
      int i = first + lane / 4 + 8 * r;
      if (i >= L) continue;
#pragma unroll
      for (int n = 0; n < 2 * N; n++) {
        int c = 8 * n + lane % 4 * 2;
        float x = sum[r / 2][n][r % 2 * 2] * factor[r], y = sum[r / 2][n][r % 2 * 2 + 1] * factor[r];
        if (vectors && c < width) *reinterpret_cast<float2*>(to[i] + c) = make_float2(x, y);
        if (!vectors && c < width) to[i][c] = x;
        if (!vectors && c + 1 < width) to[i][c + 1] = y;
      }
    }
  }
  static __device__ void put(const Rows<float>& to, int first, int L, int width, const Sums& sum, float factor,
                             bool vectors) {
    float factors[2 * R];
#pragma unroll
    for (int r = 0; r < 2 * R; r++) factors[r] = factor;
    put(to, first, L, width, sum, factors, vectors);
  }
};

// A tile's rows of one matrix, rounded on the way to shared memory.
template <int N>
__device__ __forceinline__ void load_columns(Bf16* to, int count, const Rows<const float>& from, int first, int L, int width,
                                             float factor, bool vectors) {
#pragma unroll 4
  for (int i = threadIdx.x; i < count * 4 * N; i += THREADS) {
    int r = i / (4 * N), c = i % (4 * N) * 4;
    float x[4] = {};
    if (first + r < L) load_some(x, from[first + r], c, width, vectors);
    store_rounded(to + r * Fragments<N, 1>::STRIDE + c, x, factor);
  }
}

// Scores hidden and biased; those of lane 0 begin at `row` and `column`. BY_KEYS: rows are keys and columns queries.
template <bool BY_KEYS, int T>
__device__ __forceinline__ void mask(float (&s)[1][T][4], const Attention& a, const Share& at, int row, int column) {
  row += threadIdx.x % 32 / 4, column += threadIdx.x % 4 * 2;
  each<1, T>([&](int, int n, int e) {
    int r = row + e / 2 * 8, c = column + 8 * n + e % 2;
    s[0][n][e] = masked(a, at.b, at.h, BY_KEYS ? c : r, BY_KEYS ? r : c, s[0][n][e], LOG2_E);
  });
}

template <int N>
__global__ void __launch_bounds__(THREADS) forward_tensor_cores(Attention a, bool vectors) {
#ifdef SM_80
  using F = Fragments<N, 1>;
  constexpr int KEYS = 64, T = KEYS / 8;
  SHARED_DYNAMIC(Bf16, tile);
  Share s(a, a.Lq, BLOCK);
  Head head(a, s.b, s.h);
  int first = s.first + threadIdx.x / 32 * 16;
  unsigned q[1][N][4];
  float y[1][2 * N][4] = {}, m[2] = {-FLT_MAX, -FLT_MAX}, l[2] = {};
  F::load(q, head.q, first, a.Lq, a.d, a.scale * LOG2_E, vectors);
  int keys = a.causal ? min(a.Lk, s.first + BLOCK) : a.Lk;
  for (int j = 0; j < keys; j += KEYS) {
    __syncthreads();
    load_columns<N>(tile, KEYS, head.k, j, a.Lk, a.d, 1, vectors);
    load_columns<N>(tile + 16 * N, KEYS, head.v, j, a.Lk, a.dv, 1, vectors);
    __syncthreads();
    float p[1][T][4] = {};
    F::add_scores(p, q, tile);
    mask<false>(p, a, s, first, j);
    F::softmax(p, m, l, y, 0);
    F::add(y, p, tile + 16 * N);
  }
  F::finish(a, s.b, s.h, first, y, m, l, vectors);
#endif
}

template <int N, bool BY_KEYS>
__global__ void __launch_bounds__(THREADS, N < 4 ? 3 : 2)
    gradient_tensor_cores(Attention a, const float* delta, bool vectors) {
#ifdef SM_80
  using F = Fragments<N, 1>;
  constexpr int T = COLUMNS / 8;
  SHARED_DYNAMIC(Bf16, tile);
  float *lse = reinterpret_cast<float*>(tile + COLUMNS * F::STRIDE), *of_row = lse + BLOCK;
  int L = BY_KEYS ? a.Lk : a.Lq, L2 = BY_KEYS ? a.Lq : a.Lk;
  Share s(a, L, BLOCK);
  Head head(a, s.b, s.h);
  int first = s.first + threadIdx.x / 32 * 16, row = first - s.first + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  unsigned rows1[1][N][4], rows2[1][N][4];
  float d1[1][2 * N][4] = {}, d2[1][BY_KEYS ? 2 * N : 1][4] = {};
  auto fetch_queries = [&](int first, int n) {
    int t = threadIdx.x, i = first + t;
    if (t >= n) return;
    lse[t] = i < a.Lq ? a.lse[s.row(a, i)] * LOG2_E : 0;
    of_row[t] = i < a.Lq ? delta[s.row(a, i)] : 0;
  };
  auto query = [&](int n, int e) { return BY_KEYS ? column + 8 * n + e % 2 : row + e / 2 * 8; };
  F::load(rows1, BY_KEYS ? head.k : head.q, first, L, a.d, BY_KEYS ? 1 : a.scale * LOG2_E, vectors);
  F::load(rows2, BY_KEYS ? head.v : head.dy, first, L, a.dv, 1, vectors);
  if (!BY_KEYS) fetch_queries(s.first, BLOCK);
  int begin = BY_KEYS && a.causal ? s.first : 0, end = !BY_KEYS && a.causal ? min(L2, s.first + BLOCK) : L2;
  for (int c = begin; c < end; c += COLUMNS) {
    __syncthreads();
    load_columns<N>(tile, COLUMNS, BY_KEYS ? head.q : head.k, c, L2, a.d, BY_KEYS ? a.scale * LOG2_E : 1, vectors);
    load_columns<N>(tile + 16 * N, COLUMNS, BY_KEYS ? head.dy : head.v, c, L2, a.dv, 1, vectors);
    if (BY_KEYS) fetch_queries(c, COLUMNS);
    __syncthreads();
    float p[1][T][4] = {}, ds[1][T][4] = {};
    F::add_scores(p, rows1, tile);
    mask<BY_KEYS>(p, a, s, first, c);
    each<1, T>([&](int, int n, int e) { p[0][n][e] = fast_exp2(p[0][n][e] - lse[query(n, e)]); });
    if constexpr (BY_KEYS) F::add(d2, p, tile + 16 * N);
    F::add_scores(ds, rows2, tile + 16 * N);
    each<1, T>([&](int, int n, int e) { ds[0][n][e] = p[0][n][e] * (ds[0][n][e] - of_row[query(n, e)]); });
    F::add(d1, ds, tile);
  }
  F::put(BY_KEYS ? head.dk : head.dq, first, L, a.d, d1, BY_KEYS ? LN_2 : a.scale, vectors);
  if constexpr (BY_KEYS) F::put(head.dv, first, L, a.dv, d2, 1, vectors);
#endif
}

// v5: a pass of its own rounds what tiles are made of, once, and lays side by side what belongs to a key, or to a query:
//
//   key    │ K, 16 N channels │ V, 16 N channels │ bias        │   arrays (B, heads, L, 32 N + 8); zeros fill up the
//   query  │ Q                │ dY               │ -lse -delta │   channels, and L to a multiple of 32
//
// A tile is copied as it lies, by cp.async, past the registers; and while one is multiplied the next one is under way:
//
//   copied   ├─0─┼─1─┼─2─┼─3─┤          shared memory is a ring of two tiles
//   used         └─0─┴─1─┴─2─┴─3─
//
// A warp has 32 rows where registers allow, so that each fragment from shared memory is multiplied twice. Scores are not
// looked at one by one: minus infinity stands in place of the bias or -lse where there is no key or query. Sums begin with
// -lse and -delta; biases are added, and keys behind their query hidden, only in steps where there are any. A bias that
// varies along the queries is left to v4.
constexpr int AT_ONCE = 32;  // columns
__host__ __device__ constexpr int filled_up(int L) { return (L + AT_ONCE - 1) / AT_ONCE * AT_ONCE; }

// 32 keys or queries of a head a block, 8 lanes each. The forward has no `queries`: Q is read once, straight to registers.
__global__ void __launch_bounds__(256) round_heads(Attention a, Bf16* keys, Bf16* queries, int channels, bool vectors) {
  int of_keys = filled_up(a.Lk) / 32, of_queries = queries ? filled_up(a.Lq) / 32 : 0;  // blocks
  int number = blockIdx.x % (of_keys + of_queries);
  long bh = blockIdx.x / (of_keys + of_queries), b = bh / a.heads;
  int h = int(bh % a.heads);
  Head head(a, b, h);
  bool by_keys = number < of_keys;
  int L = by_keys ? a.Lk : a.Lq, row = (by_keys ? number : number - of_keys) * 32 + threadIdx.x / 8;
  const float *from1 = by_keys ? head.k[row] : head.q[row], *from2 = by_keys ? head.v[row] : head.dy[row], *y = head.y[row];
  Bf16* to = (by_keys ? keys : queries) + (bh * filled_up(L) + row) * (2 * channels + 8);
  float delta = 0;
  for (int c = threadIdx.x % 8 * 4; c < channels; c += 32) {
    float x1[4] = {}, x2[4] = {}, of_y[4] = {};
    if (row < L) {
      load_some(x1, from1, c, a.d, vectors);
      load_some(x2, from2, c, a.dv, vectors);
      if (!by_keys) load_some(of_y, y, c, a.dv, vectors);
    }
    store_rounded(to + c, x1, by_keys ? 1 : a.scale * LOG2_E);
    store_rounded(to + channels + c, x2, 1);
#pragma unroll
    for (int v = 0; v < 4; v++) delta += x2[v] * of_y[v];
  }
#pragma unroll
  for (int step = 4; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
  if (threadIdx.x % 8) return;
  float tail = row < L ? 0 : -INFINITY;
  if (row < L && !by_keys) tail = -LOG2_E * a.lse[bh * L + row];
  if (row < L && by_keys && a.bias)
    tail = LOG2_E * a.bias[b * a.bias_strides[0] + h * a.bias_strides[1] + row * a.bias_strides[3]];
  *reinterpret_cast<float4*>(to + 2 * channels) = make_float4(tail, -delta, 0, 0);
}

constexpr int TILED = 64, RING = 2 * TILED;  // columns of a tile and of the ring
constexpr size_t ring_bytes(int stride) { return sizeof(Bf16) * RING * stride; }

// The columns [begin, end) of a head on their way through shared memory; with `begin` begins a tile. In memory `all` columns
// of all heads lie STRIDE numbers apart; in chunks of 16 bytes 32 bits count 64 GiB.
template <int STRIDE>
struct Pipeline {
  static constexpr int CHUNKS = TILED * STRIDE / 8;  // of a tile
  Bf16* ring;
  const Bf16* all;
  unsigned chunk;
  int begin, end;

  __device__ __forceinline__ Pipeline(Bf16* ring, const Bf16* all, unsigned bh, int L, int begin, int end)
      : ring(ring), all(all), chunk((bh * filled_up(L) + begin) * (STRIDE / 8) + threadIdx.x), begin(begin), end(end) {
    if (begin < end) copy(begin);
  }
  __device__ __forceinline__ Bf16* place(int c) const { return ring + c % RING * STRIDE; }
  // Starts to copy the tile of column c.
  __device__ __forceinline__ void copy(int c) {
    int t = threadIdx.x, left = (filled_up(end) - c) * (STRIDE / 8) - t;
    Bf16* to = place(c) + t * 8;
    const Bf16* from = all + size_t(chunk) * 8;
#pragma unroll
    for (int k = 0; k < CHUNKS; k += THREADS)
      if (k + THREADS <= CHUNKS || t < CHUNKS - k) cp_async<16>(to + 8 * k, from + 8 * k, k < left ? 16 : 0);
    chunk += CHUNKS;
  }
  // use(c, place of column c) for every AT_ONCE columns
  template <class Use>
  __device__ __forceinline__ void run(Use use) {
#pragma unroll 1
    for (int c = begin; c < end; c += AT_ONCE) {
      if (c % TILED == 0) {
        cp_async_wait_all();
        __syncthreads();  // all have copied this tile and used the one before, whose place the next one takes
        if (c + TILED < end) copy(c + TILED);
      }
      use(c, place(c));
    }
  }
};

// Hides the keys behind their query; `row` and `column` are those of the warp's first score. BY_KEYS: rows are keys.
template <bool BY_KEYS, int R, int T>
__device__ __forceinline__ void hide(float (&s)[R][T][4], int row, int column) {
  int behind = column + threadIdx.x % 4 * 2 - row - threadIdx.x % 32 / 4;
  each<R, T>([&](int r, int n, int e) {
    int at = behind + 8 * n + e % 2 - 16 * r - e / 2 * 8;
    if (BY_KEYS ? at < 0 : at > 0) s[r][n][e] = -INFINITY;
  });
}

// How many times 16 rows a warp has, and how many blocks a multiprocessor: as registers allow. Heads of more than 96
// channels have their dK and dV from two launches.
enum Of { Y, DQ, DK_AND_DV, DK, DV };
template <int N, Of OF>
constexpr int HEIGHT = N <= (OF == Y ? 6 : OF == DQ ? 4 : 3) ? 2 : 1;
template <int N, Of OF>
constexpr int RESIDENT = (OF == Y ? N <= 4 : OF == DQ ? N <= 2 : N == 1 || N == 4) ? 3 : 2;

template <int N>
__global__ void __launch_bounds__(THREADS, RESIDENT<N, Y>)
    forward_pipelined(Attention a, const Bf16* keys, bool vectors) {
#ifdef SM_80
  constexpr int R = HEIGHT<N, Y>, T = AT_ONCE / 8;
  using F = Fragments<N, R>;
  SHARED_DYNAMIC(Bf16, ring);
  Share s(a, a.Lq, R * BLOCK);
  unsigned bh = unsigned(s.b * a.heads + s.h);
  int first = s.first + threadIdx.x / 32 * 16 * R, column = threadIdx.x % 4 * 2;
  Pipeline<F::STRIDE> pipeline(ring, keys, bh, a.Lk, 0, a.causal ? min(a.Lk, s.first + R * BLOCK) : a.Lk);
  unsigned q[R][N][4];
  float y[R][2 * N][4] = {}, m[2 * R], l[2 * R] = {};
#pragma unroll
  for (int r = 0; r < 2 * R; r++) m[r] = -FLT_MAX;
  F::load(q, Head(a, s.b, s.h).q, first, a.Lq, a.d, a.scale * LOG2_E, vectors);
  pipeline.run([&](int j, const Bf16* columns) {
    if (first >= a.Lq || (a.causal && j >= first + 16 * R)) return;  // no row of this warp sees them
    float p[R][T][4] = {};
    F::add_scores(p, q, columns);
    bool diagonal = a.causal && j + AT_ONCE > first + 1;
    if (diagonal || a.bias || j + AT_ONCE > a.Lk) {
      each<R, T>([&](int r, int n, int e) { p[r][n][e] += F::tail(columns, column + 8 * n + e % 2)[0]; });
      if (diagonal) hide<false>(p, first, j);
    }
    F::softmax(p, m, l, y, 8);
    F::add(y, p, columns + 16 * N);
  });
  F::finish(a, bh / a.heads, bh % a.heads, first, y, m, l, vectors);
#endif
}

template <int N, Of OF>
__global__ void __launch_bounds__(THREADS, RESIDENT<N, OF>)
    gradient_pipelined(Attention a, const Bf16* keys, const Bf16* queries, bool vectors) {
#ifdef SM_80
  constexpr int R = HEIGHT<N, OF>, T = AT_ONCE / 8;
  constexpr bool BY_KEYS = OF != DQ, FIRST = OF != DV, SECOND = OF == DK_AND_DV || OF == DV;
  using F = Fragments<N, R>;
  SHARED_DYNAMIC(Bf16, ring);
  int L = BY_KEYS ? a.Lk : a.Lq, L2 = BY_KEYS ? a.Lq : a.Lk;
  Share s(a, L, R * BLOCK);
  unsigned bh = unsigned(s.b * a.heads + s.h);
  int first = s.first + threadIdx.x / 32 * 16 * R, row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  int begin = BY_KEYS && a.causal ? s.first : 0, end = !BY_KEYS && a.causal ? min(L2, s.first + R * BLOCK) : L2;
  Pipeline<F::STRIDE> pipeline(ring, BY_KEYS ? queries : keys, bh, L2, begin, end);
  const Bf16* rows = (BY_KEYS ? keys : queries) + ((long)bh * filled_up(L) + first) * F::STRIDE;
  unsigned rows1[R][N][4], rows2[R][N][4];
  float s0[2 * R] = {}, dp0[2 * R] = {}, d1[R][FIRST ? 2 * N : 1][4] = {}, d2[R][SECOND ? 2 * N : 1][4] = {};
  if (first < L) {
    F::load(rows1, rows);
    F::load(rows2, rows + 16 * N);
#pragma unroll
    for (int r = 0; r < 2 * R; r++) s0[r] = F::tail(rows, row + 8 * r)[0], dp0[r] = F::tail(rows, row + 8 * r)[1];
  }
  pipeline.run([&](int c, const Bf16* columns) {
    if (first >= L || (!BY_KEYS && a.causal && c >= first + 16 * R)) return;  // no row of this warp meets them
    float p[R][T][4], ds[R][T][4];
    each<R, T>([&](int r, int n, int e) {
      p[r][n][e] = BY_KEYS ? F::tail(columns, column + 8 * n + e % 2)[0] : s0[2 * r + e / 2];
    });
    F::add_scores(p, rows1, columns);
    bool diagonal = a.causal && (BY_KEYS ? c < first + 16 * R - 1 : c + AT_ONCE > first + 1);
    if (diagonal || a.bias || (!BY_KEYS && c + AT_ONCE > a.Lk)) {
      const Bf16* of_keys = BY_KEYS ? keys + ((long)bh * filled_up(a.Lk) + first) * F::STRIDE : columns;
      each<R, T>([&](int r, int n, int e) {
        p[r][n][e] += F::tail(of_keys, BY_KEYS ? row + 16 * r + e / 2 * 8 : column + 8 * n + e % 2)[0];
      });
      if (diagonal) hide<BY_KEYS>(p, first, c);
    }
    each<R, T>([&](int r, int n, int e) { p[r][n][e] = fast_exp2(p[r][n][e]); });
    if constexpr (SECOND) F::add(d2, p, columns + 16 * N);
    if constexpr (FIRST) {
      each<R, T>([&](int r, int n, int e) {
        ds[r][n][e] = BY_KEYS ? F::tail(columns, column + 8 * n + e % 2)[1] : dp0[2 * r + e / 2];
      });
      F::add_scores(ds, rows2, columns + 16 * N);
      each<R, T>([&](int r, int n, int e) { ds[r][n][e] *= p[r][n][e]; });
      F::add(d1, ds, columns);
    }
  });
  Head head(a, bh / a.heads, bh % a.heads);
  if constexpr (FIRST) F::put(BY_KEYS ? head.dk : head.dq, first, L, a.d, d1, BY_KEYS ? LN_2 : a.scale, vectors);
  if constexpr (SECOND) F::put(head.dv, first, L, a.dv, d2, 1, vectors);
#endif
}

size_t shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Are all rows of all heads on multiples of 16 bytes?
bool aligned(const Attention& a) {
  size_t bits = (a.d | a.dv) * sizeof(float);
  for (const float* p : {a.q, a.k, a.v, a.dy}) bits |= reinterpret_cast<size_t>(p);
  for (const float* p : {a.y, a.dq, a.dk, a.dv_out}) bits |= reinterpret_cast<size_t>(p);
  return bits % 16 == 0;
}

unsigned blocks_of(const Attention& a, int L, int rows) { return unsigned((long)a.B * a.heads * ((L + rows - 1) / rows)); }
unsigned threads_of(const Attention& a, int L, int width) { return blocks_for((long)a.B * a.heads * L * width, 256); }

// What launches the kernels, one struct a direction; those that return false have no room for such heads.
struct Forward {
  static void naive(const Attention& a) {
    float* S = workspace((size_t)a.B * a.heads * a.Lq * a.Lk);
    LAUNCH(scores_naive, threads_of(a, a.Lq, a.Lk), 256, 0, stream(), a, S);
    LAUNCH(softmax_naive, threads_of(a, a.Lq, 1), 256, 0, stream(), a, S);
    if (a.dv) LAUNCH(y_naive, threads_of(a, a.Lq, a.dv), 256, 0, stream(), a, S);
  }
  static void by_warps(const Attention& a) {
    LAUNCH(forward_flash, blocks_of(a, a.Lq, WARPS), 32 * WARPS, Flash::bytes(a), stream(), a);
  }
  template <int CHUNKS>
  static bool by_registers(const Attention& a) {
    size_t bytes = sizeof(float) * (Tiles<CHUNKS>::ROWS + 2 * Tiles<CHUNKS>::COLS + Tiles<CHUNKS>::P);
    if (bytes > shared_limit()) return false;
    LAUNCH(forward_registers<CHUNKS>, blocks_of(a, a.Lq, BLOCK), THREADS, bytes, stream(), a, aligned(a));
    return true;
  }
  template <int N>
  static bool by_tensor_cores(const Attention& a) {
    size_t bytes = sizeof(Bf16) * BLOCK * Fragments<N, 1>::STRIDE;
    LAUNCH(forward_tensor_cores<N>, blocks_of(a, a.Lq, BLOCK), THREADS, bytes, stream(), a, aligned(a));
    return true;
  }
  template <int N>
  static bool pipelined(const Attention& a) {
    if (a.bias && a.bias_strides[2]) return false;
    constexpr size_t STRIDE = Fragments<N, 1>::STRIDE;
    unsigned of_keys = blocks_of(a, filled_up(a.Lk), 32), blocks = blocks_of(a, a.Lq, HEIGHT<N, Y> * BLOCK);
    Bf16* keys = reinterpret_cast<Bf16*>(workspace(of_keys * 32 * STRIDE / 2));
    LAUNCH(round_heads, of_keys, 256, 0, stream(), a, keys, nullptr, 16 * N, aligned(a));
    LAUNCH(forward_pipelined<N>, blocks, THREADS, ring_bytes(STRIDE), stream(), a, keys, aligned(a));
    return true;
  }
};

struct Backward {
  static void naive(const Attention& a) {
    size_t many = (size_t)a.B * a.heads * a.Lq * a.Lk;
    float *S = workspace(2 * many), *dS = S + many;
    if (many) {
      LAUNCH(scores_naive, threads_of(a, a.Lq, a.Lk), 256, 0, stream(), a, S);
      LAUNCH(ds_naive, threads_of(a, a.Lq, a.Lk), 256, 0, stream(), a, S, dS);
      if (a.d) LAUNCH(dq_naive, threads_of(a, a.Lq, a.d), 256, 0, stream(), a, dS);
    }
    if (a.d) LAUNCH(dk_naive, threads_of(a, a.Lk, a.d), 256, 0, stream(), a, dS);
    if (a.dv) LAUNCH(dv_naive, threads_of(a, a.Lk, a.dv), 256, 0, stream(), a, S);
  }
  static float* launch_deltas(const Attention& a) {
    float* delta = workspace((size_t)a.B * a.heads * a.Lq);
    if (a.Lq) LAUNCH(deltas, blocks_of(a, a.Lq, WARPS), 32 * WARPS, 0, stream(), a, delta);
    return delta;
  }
  static void by_warps(const Attention& a) {
    float* delta = launch_deltas(a);
    if (a.Lq) LAUNCH(dq_flash, blocks_of(a, a.Lq, WARPS), 32 * WARPS, Flash::bytes(a), stream(), a, delta);
    LAUNCH(dk_dv_flash, blocks_of(a, a.Lk, WARPS), 32 * WARPS, Flash::bytes(a), stream(), a, delta);
  }
  template <int CHUNKS>
  static bool by_registers(const Attention& a) {
    if constexpr (CHUNKS <= 5) {
      size_t bytes = sizeof(float) * (2 * Tiles<CHUNKS>::ROWS + 2 * Tiles<CHUNKS>::COLS + Tiles<CHUNKS>::P + 2 * BLOCK);
      if (bytes > shared_limit()) return false;
      float* delta = launch_deltas(a);
      unsigned queries = blocks_of(a, a.Lq, BLOCK), keys = blocks_of(a, a.Lk, BLOCK);
      if (a.Lq) LAUNCH((gradient_registers<CHUNKS, false>), queries, THREADS, bytes, stream(), a, delta, aligned(a));
      LAUNCH((gradient_registers<CHUNKS, true>), keys, THREADS, bytes, stream(), a, delta, aligned(a));
      return true;
    }
    return false;
  }
  template <int N>
  static bool by_tensor_cores(const Attention& a) {
    size_t bytes = sizeof(Bf16) * COLUMNS * Fragments<N, 1>::STRIDE + sizeof(float) * 2 * BLOCK;
    float* delta = launch_deltas(a);
    unsigned queries = blocks_of(a, a.Lq, BLOCK), keys = blocks_of(a, a.Lk, BLOCK);
    if (a.Lq) LAUNCH((gradient_tensor_cores<N, false>), queries, THREADS, bytes, stream(), a, delta, aligned(a));
    LAUNCH((gradient_tensor_cores<N, true>), keys, THREADS, bytes, stream(), a, delta, aligned(a));
    return true;
  }
  template <int N, Of OF>
  static void gradient(const Attention& a, const Bf16* keys, const Bf16* queries) {
    unsigned blocks = blocks_of(a, OF == DQ ? a.Lq : a.Lk, HEIGHT<N, OF> * BLOCK);
    size_t bytes = ring_bytes(Fragments<N, 1>::STRIDE);
    if (blocks) LAUNCH((gradient_pipelined<N, OF>), blocks, THREADS, bytes, stream(), a, keys, queries, aligned(a));
  }
  template <int N>
  static bool pipelined(const Attention& a) {
    if (a.bias && a.bias_strides[2]) return false;
    constexpr size_t STRIDE = Fragments<N, 1>::STRIDE;
    unsigned of_keys = blocks_of(a, filled_up(a.Lk), 32), of_queries = blocks_of(a, filled_up(a.Lq), 32);
    Bf16* keys = reinterpret_cast<Bf16*>(workspace((of_keys + of_queries) * 32 * STRIDE / 2));
    Bf16* queries = keys + of_keys * 32 * STRIDE;
    LAUNCH(round_heads, of_keys + of_queries, 256, 0, stream(), a, keys, queries, 16 * N, aligned(a));
    gradient<N, DQ>(a, keys, queries);
    if constexpr (N < 8) {
      gradient<N, DK_AND_DV>(a, keys, queries);
    } else {
      gradient<N, DK>(a, keys, queries);
      gradient<N, DV>(a, keys, queries);
    }
    return true;
  }
};

// Calls launch(width) for the widths that have room for the heads, the narrowest first, until it returns true.
template <int... WIDTHS, class Launch>
bool launch_fitting(const Attention& a, Launch launch) {
  int width = std::max(a.d, a.dv);
  return ((width && width <= WIDTHS && launch(std::integral_constant<int, WIDTHS>())) || ...);
}

// By the highest rung, up to the ladder's, that can.
template <class Direction>
void run(const Attention& a) {
  int rung = ladder.rung();
  auto pipelined = [&](auto width) { return Direction::template pipelined<width / 16>(a); };
  auto tensor_cores = [&](auto width) { return Direction::template by_tensor_cores<width / 16>(a); };
  auto registers = [&](auto width) { return Direction::template by_registers<width / 32>(a); };
  auto warps = [&](auto) { return Direction::by_warps(a), true; };
  if (rung >= 5 && launch_fitting<16, 32, 48, 64, 80, 96, 128, 160>(a, pipelined)) return;
  if (rung >= 4 && launch_fitting<32, 64>(a, tensor_cores)) return;
  if (rung >= 3 && launch_fitting<32, 64, 96, 128, 160, 256>(a, registers)) return;
  if (rung >= 2 && launch_fitting<WIDEST>(a, warps)) return;
  Direction::naive(a);
}

}  // namespace

void attention_forward(const Attention& a) {
  if ((long)a.B * a.heads * a.Lq > 0) run<Forward>(a);
}
void attention_backward(const Attention& a) {
  if ((long)a.B * a.heads > 0) run<Backward>(a);
}

}  // namespace minidiff::cuda
