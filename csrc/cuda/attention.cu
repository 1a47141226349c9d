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
// for dK and dV, so nothing is added up by several blocks.
//
// The floor is arithmetic: 2 Lq Lk (d + dv) operations a head forward, 2 Lq Lk (3 d + 2 dv) backward, where S and dY V^T are
// computed by both kernels: 4 d + 3 dv. The memory moved is that of the arrays, and K and V again for every block of
// queries, which come from the L2.
#include <algorithm>
#include <cmath>

#include "../kernels.h"
#include "ladder.h"
#include "stream.h"
#include "sums.h"

namespace minidiff::cuda {
namespace {

Ladder ladder("attention",
              {{"naive", "one thread a number; all scores in memory; any size of heads"},
               {"flash", "online softmax over tiles of keys in shared memory; one warp a query, heads up to 256"},
               {"registers", "a block of 64 queries; each thread computes 4 x 4 scores and 4 rows of y in registers"},
               {"tensor cores", "bf16 factors, products by mma.sync; the scores' registers are the next product's factor",
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

// v4: the same blocks, as bf16 in shared memory, on tensor cores. A warp has 16 rows; lane 4 g + t computes rows g and
// g + 8, and of every 8 columns those at 2 t and 2 t + 1 (see ptx.h). Scores come out so that, rounded to bf16, they are the
// next product's left factor as they are. Heads are padded to 16 N channels; 8 more to a row keep the rows that ldmatrix
// reads in different banks.
template <int N>
struct Fragments {
  using Bf16 = unsigned short;
  static constexpr int STRIDE = 16 * N + 8;
  static constexpr int KEYS = 64, GRADIENT_COLUMNS = N == 8 ? 16 : 32;  // of a tile; 16 spare registers

  static __device__ void load(Bf16* to, int rows, const Rows<const float>& from, int first, int L, int width, float factor,
                              bool vectors) {
#pragma unroll(N < 8 ? 4 : 2)
    for (int i = threadIdx.x; i < rows * 4 * N; i += THREADS) {
      int r = i / (4 * N), c = i % (4 * N) * 4;
      const float* row = from[first + r] + c;
      float x[4] = {};
      if (first + r < L && vectors && c < width) minidiff::cuda::load(x, row);
      if (first + r < L && !vectors)
        for (int v = 0; v < 4; v++)
          if (c + v < width) x[v] = row[v];
      *reinterpret_cast<uint2*>(to + r * STRIDE + c) =
          make_uint2(pack_bf16(x[0] * factor, x[1] * factor), pack_bf16(x[2] * factor, x[3] * factor));
    }
  }
  // s = rows . columns, of this warp's rows and 8 T columns
  template <int T>
  static __device__ void scores(float (&s)[T][4], const Bf16* rows, const Bf16* columns) {
    int lane = threadIdx.x % 32;
    rows += (threadIdx.x / 32 * 16 + lane % 16) * STRIDE + lane / 16 * 8;
    columns += (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < 4 * T; n++) s[n / 4][n % 4] = 0;
#pragma unroll
    for (int c = 0; c < N; c++) {
      unsigned x[4], y[4];
      ldmatrix(x, rows + 16 * c);
#pragma unroll
      for (int n = 0; n < T; n += 2) {
        ldmatrix(y, columns + 8 * n * STRIDE + 16 * c);
        multiply(s[n], s[n + 1], x, y);
      }
    }
  }
  // sum += P . columns
  template <int T>
  static __device__ void add(float (&sum)[2 * N][4], const float (&p)[T][4], const Bf16* columns) {
    int lane = threadIdx.x % 32;
    columns += lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < T; j += 2) {
      unsigned x[4] = {pack_bf16(p[j][0], p[j][1]), pack_bf16(p[j][2], p[j][3]), pack_bf16(p[j + 1][0], p[j + 1][1]),
                       pack_bf16(p[j + 1][2], p[j + 1][3])};
      unsigned y[4];
#pragma unroll
      for (int n = 0; n < 2 * N; n += 2) {
        ldmatrix_trans(y, columns + 8 * j * STRIDE + 8 * n);
        multiply(sum[n], sum[n + 1], x, y);
      }
    }
  }
  // Two products side by side: y are the factors of 16 columns.
  static __device__ void multiply(float (&left)[4], float (&right)[4], const unsigned (&x)[4], const unsigned (&y)[4]) {
    const unsigned of_left[2] = {y[0], y[1]}, of_right[2] = {y[2], y[3]};
    mma_m16n8k16_bf16(left, x, of_left, left);
    mma_m16n8k16_bf16(right, x, of_right, right);
  }
  static __device__ void put(const Rows<float>& to, int first, int L, int width, const float (&sum)[2 * N][4],
                             const float (&factor)[2], bool vectors) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int r = first + threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
      if (r >= L) continue;
#pragma unroll
      for (int n = 0; n < 2 * N; n++) {
        int c = 8 * n + lane % 4 * 2;
        float x = sum[n][2 * half] * factor[half], y = sum[n][2 * half + 1] * factor[half];
        if (vectors && c < width) *reinterpret_cast<float2*>(to[r] + c) = make_float2(x, y);
        if (!vectors && c < width) to[r][c] = x;
        if (!vectors && c + 1 < width) to[r][c + 1] = y;
      }
    }
  }
};

template <int N>
__global__ void __launch_bounds__(THREADS) forward_tensor_cores(Attention a, bool vectors) {
  using F = Fragments<N>;
  constexpr int KEYS = F::KEYS, T = KEYS / 8;
  SHARED_DYNAMIC(unsigned short, shared);
  unsigned short *q = shared, *k = q + BLOCK * F::STRIDE, *v = k + KEYS * F::STRIDE;
  Share s(a, a.Lq, BLOCK);
  Head head(a, s.b, s.h);
  int lane = threadIdx.x % 32, row = s.first + threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  float y[2 * N][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  F::load(q, BLOCK, head.q, s.first, a.Lq, a.d, a.scale * LOG2_E, vectors);
  int keys = a.causal ? min(a.Lk, s.first + BLOCK) : a.Lk;
  for (int j = 0; j < keys; j += KEYS) {
    __syncthreads();
    F::load(k, KEYS, head.k, j, a.Lk, a.d, 1, vectors);
    F::load(v, KEYS, head.v, j, a.Lk, a.dv, 1, vectors);
    __syncthreads();
    float p[T][4];
    F::scores(p, q, k);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float of_row[2 * T];
#pragma unroll
      for (int n = 0; n < 2 * T; n++)
        of_row[n] = masked(a, s.b, s.h, row + 8 * half, j + n / 2 * 8 + column + n % 2, p[n / 2][2 * half + n % 2], LOG2_E);
      float shrink = online_softmax<4>(of_row, m[half], l[half]);
#pragma unroll
      for (int n = 0; n < 2 * T; n++) p[n / 2][2 * half + n % 2] = of_row[n];
#pragma unroll
      for (int n = 0; n < 4 * N; n++) y[n / 2][2 * half + n % 2] *= shrink;
    }
    F::add(y, p, v);
  }
  const float factor[2] = {1 / l[0], 1 / l[1]};
  F::put(head.y, s.first, a.Lq, a.dv, y, factor, vectors);
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (a.lse && lane % 4 == 0 && row + 8 * half < a.Lq) a.lse[s.row(a, row + 8 * half)] = lse_of(m[half], l[half]);
}

// Heads of 160 channels have their dK and dV from two launches: there are not registers enough for both.
enum Of { DQ, DK_AND_DV, DK, DV };

template <int N, Of OF>
__global__ void __launch_bounds__(THREADS, N < 4 ? 3 : N < 8 || OF != DK_AND_DV ? 2 : 1)
    gradient_tensor_cores(Attention a, const float* delta, bool vectors) {
  using F = Fragments<N>;
  constexpr bool BY_KEYS = OF != DQ, FIRST = OF != DV, SECOND = OF == DK_AND_DV || OF == DV;
  constexpr int WIDTH = F::GRADIENT_COLUMNS, T = WIDTH / 8;
  SHARED_DYNAMIC(unsigned short, shared);
  unsigned short *rows1 = shared, *rows2 = rows1 + BLOCK * F::STRIDE, *cols1 = rows2 + BLOCK * F::STRIDE;
  unsigned short* cols2 = cols1 + WIDTH * F::STRIDE;
  float *lse = reinterpret_cast<float*>(cols2 + WIDTH * F::STRIDE), *of_row = lse + BLOCK;
  int L = BY_KEYS ? a.Lk : a.Lq, L2 = BY_KEYS ? a.Lq : a.Lk;
  Share s(a, L, BLOCK);
  Head head(a, s.b, s.h);
  int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  float d1[FIRST ? 2 * N : 1][4] = {}, d2[SECOND ? 2 * N : 1][4] = {};
  auto fetch_queries = [&](int first, int n) {
    int t = threadIdx.x, i = first + t;
    if (t >= n) return;
    lse[t] = i < a.Lq ? a.lse[s.row(a, i)] * LOG2_E : 0;
    of_row[t] = i < a.Lq ? delta[s.row(a, i)] : 0;
  };
  F::load(rows1, BLOCK, BY_KEYS ? head.k : head.q, s.first, L, a.d, BY_KEYS ? 1 : a.scale * LOG2_E, vectors);
  F::load(rows2, BLOCK, BY_KEYS ? head.v : head.dy, s.first, L, a.dv, 1, vectors);
  if (!BY_KEYS) fetch_queries(s.first, BLOCK);
  int begin = BY_KEYS && a.causal ? s.first : 0, end = !BY_KEYS && a.causal ? min(L2, s.first + BLOCK) : L2;
  for (int c0 = begin; c0 < end; c0 += WIDTH) {
    __syncthreads();
    F::load(cols1, WIDTH, BY_KEYS ? head.q : head.k, c0, L2, a.d, BY_KEYS ? a.scale * LOG2_E : 1, vectors);
    F::load(cols2, WIDTH, BY_KEYS ? head.dy : head.v, c0, L2, a.dv, 1, vectors);
    if (BY_KEYS) fetch_queries(c0, WIDTH);
    __syncthreads();
    float p[T][4];
    F::scores(p, rows1, cols1);
#pragma unroll
    for (int n = 0; n < 4 * T; n++) {
      int r = row + n % 4 / 2 * 8, c = n / 4 * 8 + column + n % 2, i = BY_KEYS ? c0 + c : s.first + r;
      p[n / 4][n % 4] = fast_exp2(masked(a, s.b, s.h, i, BY_KEYS ? s.first + r : c0 + c, p[n / 4][n % 4], LOG2_E) -
                                  lse[BY_KEYS ? c : r]);
    }
    if constexpr (SECOND) F::add(d2, p, cols2);
    if constexpr (FIRST) {
      float ds[T][4];
      F::scores(ds, rows2, cols2);
#pragma unroll
      for (int n = 0; n < 4 * T; n++)
        ds[n / 4][n % 4] = p[n / 4][n % 4] *
                           (ds[n / 4][n % 4] - of_row[BY_KEYS ? n / 4 * 8 + column + n % 2 : row + n % 4 / 2 * 8]);
      F::add(d1, ds, cols1);
    }
  }
  const float of_d1 = BY_KEYS ? LN_2 : a.scale, factor1[2] = {of_d1, of_d1}, factor2[2] = {1, 1};
  if constexpr (FIRST) F::put(BY_KEYS ? head.dk : head.dq, s.first, L, a.d, d1, factor1, vectors);
  if constexpr (SECOND) F::put(head.dv, s.first, L, a.dv, d2, factor2, vectors);
}

// What a block may have, of which one fits on a multiprocessor.
size_t shared_limit() {
  int sm = compute_capability();
  return sm >= 90 ? 227 << 10 : sm == 80 || sm == 87 ? 163 << 10 : sm >= 80 ? 99 << 10 : 64 << 10;
}

// Are all rows of all heads on multiples of 16 bytes?
bool aligned(const Attention& a) {
  size_t bits = (a.d | a.dv) * sizeof(float);
  for (const float* p : {a.q, a.k, a.v, a.dy}) bits |= reinterpret_cast<size_t>(p);
  for (const float* p : {a.y, a.dq, a.dk, a.dv_out}) bits |= reinterpret_cast<size_t>(p);
  return bits % 16 == 0;
}

unsigned blocks_of(const Attention& a, int L, int rows) { return unsigned((long)a.B * a.heads * ((L + rows - 1) / rows)); }
unsigned threads_of(const Attention& a, int L, int width) { return blocks_for((long)a.B * a.heads * L * width, 256); }

void forward_naive(const Attention& a) {
  float* S = workspace((size_t)a.B * a.heads * a.Lq * a.Lk);
  LAUNCH(scores_naive, threads_of(a, a.Lq, a.Lk), 256, 0, stream(), a, S);
  LAUNCH(softmax_naive, threads_of(a, a.Lq, 1), 256, 0, stream(), a, S);
  if (a.dv) LAUNCH(y_naive, threads_of(a, a.Lq, a.dv), 256, 0, stream(), a, S);
}

void backward_naive(const Attention& a) {
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

void forward_by_warps(const Attention& a) {
  LAUNCH(forward_flash, blocks_of(a, a.Lq, WARPS), 32 * WARPS, Flash::bytes(a), stream(), a);
}

float* launch_deltas(const Attention& a) {
  float* delta = workspace((size_t)a.B * a.heads * a.Lq);
  if (a.Lq) LAUNCH(deltas, blocks_of(a, a.Lq, WARPS), 32 * WARPS, 0, stream(), a, delta);
  return delta;
}

void backward_by_warps(const Attention& a) {
  float* delta = launch_deltas(a);
  if (a.Lq) LAUNCH(dq_flash, blocks_of(a, a.Lq, WARPS), 32 * WARPS, Flash::bytes(a), stream(), a, delta);
  LAUNCH(dk_dv_flash, blocks_of(a, a.Lk, WARPS), 32 * WARPS, Flash::bytes(a), stream(), a, delta);
}

template <int CHUNKS>
bool forward_by_registers(const Attention& a) {
  size_t bytes = sizeof(float) * (Tiles<CHUNKS>::ROWS + 2 * Tiles<CHUNKS>::COLS + Tiles<CHUNKS>::P);
  if (bytes > shared_limit()) return false;
  LAUNCH(forward_registers<CHUNKS>, blocks_of(a, a.Lq, BLOCK), THREADS, bytes, stream(), a, aligned(a));
  return true;
}

template <int CHUNKS>
bool backward_by_registers(const Attention& a) {
  size_t bytes = sizeof(float) * (2 * Tiles<CHUNKS>::ROWS + 2 * Tiles<CHUNKS>::COLS + Tiles<CHUNKS>::P + 2 * BLOCK);
  if (bytes > shared_limit()) return false;
  float* delta = launch_deltas(a);
  unsigned queries = blocks_of(a, a.Lq, BLOCK), keys = blocks_of(a, a.Lk, BLOCK);
  if (a.Lq) LAUNCH((gradient_registers<CHUNKS, false>), queries, THREADS, bytes, stream(), a, delta, aligned(a));
  LAUNCH((gradient_registers<CHUNKS, true>), keys, THREADS, bytes, stream(), a, delta, aligned(a));
  return true;
}

template <int N>
void forward_by_tensor_cores(const Attention& a) {
  size_t bytes = sizeof(short) * (BLOCK + 2 * Fragments<N>::KEYS) * Fragments<N>::STRIDE;
  LAUNCH(forward_tensor_cores<N>, blocks_of(a, a.Lq, BLOCK), THREADS, bytes, stream(), a, aligned(a));
}

template <int N>
void backward_by_tensor_cores(const Attention& a) {
  using F = Fragments<N>;
  size_t bytes = sizeof(short) * 2 * (BLOCK + F::GRADIENT_COLUMNS) * F::STRIDE + sizeof(float) * 2 * BLOCK;
  float* delta = launch_deltas(a);
  unsigned queries = blocks_of(a, a.Lq, BLOCK), keys = blocks_of(a, a.Lk, BLOCK);
  if (a.Lq) LAUNCH((gradient_tensor_cores<N, DQ>), queries, THREADS, bytes, stream(), a, delta, aligned(a));
  if constexpr (N < 10) {
    LAUNCH((gradient_tensor_cores<N, DK_AND_DV>), keys, THREADS, bytes, stream(), a, delta, aligned(a));
  } else {
    LAUNCH((gradient_tensor_cores<N, DK>), keys, THREADS, bytes, stream(), a, delta, aligned(a));
    LAUNCH((gradient_tensor_cores<N, DV>), keys, THREADS, bytes, stream(), a, delta, aligned(a));
  }
}

}  // namespace

void attention_forward(const Attention& a) {
  if ((long)a.B * a.heads * a.Lq == 0) return;
  int width = std::max(a.d, a.dv), rung = ladder.rung();
  auto fits = [&](int channels) { return width && width <= channels; };
  if (rung >= 4) {
    if (fits(32)) return forward_by_tensor_cores<2>(a);
    if (fits(48)) return forward_by_tensor_cores<3>(a);
    if (fits(64)) return forward_by_tensor_cores<4>(a);
    if (fits(80)) return forward_by_tensor_cores<5>(a);
    if (fits(96)) return forward_by_tensor_cores<6>(a);
    if (fits(128)) return forward_by_tensor_cores<8>(a);
    if (fits(160)) return forward_by_tensor_cores<10>(a);
  }
  if (rung >= 3) {
    if (fits(32) && forward_by_registers<1>(a)) return;
    if (fits(64) && forward_by_registers<2>(a)) return;
    if (fits(96) && forward_by_registers<3>(a)) return;
    if (fits(128) && forward_by_registers<4>(a)) return;
    if (fits(160) && forward_by_registers<5>(a)) return;
    if (fits(256) && forward_by_registers<8>(a)) return;
  }
  rung >= 2 && fits(WIDEST) ? forward_by_warps(a) : forward_naive(a);
}

void attention_backward(const Attention& a) {
  if ((long)a.B * a.heads == 0) return;
  int width = std::max(a.d, a.dv), rung = ladder.rung();
  auto fits = [&](int channels) { return width && width <= channels; };
  if (rung >= 4) {
    if (fits(32)) return backward_by_tensor_cores<2>(a);
    if (fits(48)) return backward_by_tensor_cores<3>(a);
    if (fits(64)) return backward_by_tensor_cores<4>(a);
    if (fits(80)) return backward_by_tensor_cores<5>(a);
    if (fits(96)) return backward_by_tensor_cores<6>(a);
    if (fits(128)) return backward_by_tensor_cores<8>(a);
    if (fits(160)) return backward_by_tensor_cores<10>(a);
  }
  if (rung >= 3) {
    if (fits(32) && backward_by_registers<1>(a)) return;
    if (fits(64) && backward_by_registers<2>(a)) return;
    if (fits(96) && backward_by_registers<3>(a)) return;
    if (fits(128) && backward_by_registers<4>(a)) return;
    if (fits(160) && backward_by_registers<5>(a)) return;
  }
  rung >= 2 && fits(WIDEST) ? backward_by_warps(a) : backward_naive(a);
}

}  // namespace minidiff::cuda
