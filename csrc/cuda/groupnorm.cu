// GroupNorm (+ SiLU): x (B, N, C), groups of C / groups channels. Channels lie beside each other, so a group is a stripe:
//
//            C channels                     z = gain * xhat + offset,   xhat = (x - mean) * rstd,   y = z or silu(z)
//        ┌────┬────┬────┬────┐
//        │    │    │    │    │ part 0       rungs 1, 2, 5: a thread or a block takes a stripe
//      N ├ ─ ─│─ ─ │─ ─ │─ ─ ┤              rungs 3, 4: a block takes a part, which is contiguous; partial sums of all
//        │    │    │    │    │ part 1       parts are joined by a second kernel, a third applies them:
//        └────┴────┴────┴────┘
//         group 0    2    3                 statistics ──► finish ──► apply
//
// The floor is the memory: x read twice and y written once, 12 bytes an element; 8 where a stripe stays on the chip (rung 5)
// or all of x in the L2. Backward: x and dy twice and dx once, 20 bytes, or 12. Arithmetic, some 10 operations an element,
// hides behind it.
//
// Variances come from Chan's formula, which joins the means and squared distances of two sets; there is no E[x^2] - E[x]^2,
// which cancels. Rungs 3 and 4 take them of x - shift, shift being the group's first element, so that a large common offset
// costs no digits. Chan, Golub and LeVeque 1983, doi 10.1080/00031305.1983.10483115.
//
// Backward, with g = gain * dz, dz = dy or dy through the SiLU, which is computed again rather than kept:
//   doffset = sum(dz), dgain = sum(dz * xhat) over N,   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) over the group
#include <algorithm>
#include <type_traits>

#include "../kernels.h"
#include "ladder.h"
#include "stream.h"
#include "sums.h"

namespace minidiff::cuda {
namespace {

Ladder group_norm("group_norm",
                  {{"naive", "one thread a group"},
                   {"block", "one block a group: neighbours read neighbouring channels, sums by trees"},
                   {"split", "blocks share an image, so that batch 1 fills the chip; whole rows, read contiguously"},
                   {"vector", "four channels a thread by 16-byte loads, four rows in flight, the last read first again"},
                   {"on chip", "a group that fits stays in shared memory: one read, one write, one launch"}});

constexpr int THREADS = 256;

// Image b's channel c: where it lies in its input, and the way to the next position.
struct Channel {
  const float* x;
  float* dx;
  long first, step;
  __device__ Channel(const GroupNorm& g, long b, int c) {
    bool second = c >= g.inputs[0].C;
    step = second ? g.inputs[1].C : g.inputs[0].C;
    first = b * g.N * step + c - (second ? g.inputs[1].first : 0);
    x = second ? g.inputs[1].x : g.inputs[0].x;
    dx = second ? g.inputs[1].dx : g.inputs[0].dx;
  }
};

__device__ __forceinline__ float silu(float z) { return __fdividef(z, 1 + __expf(-z)); }
__device__ __forceinline__ float silu_slope(float z) {
  float s = __fdividef(1, 1 + __expf(-z));
  return s * (1 + z * (1 - s));
}

// What V neighbouring channels need to go from x to y and back.
template <int V>
struct Affine {
  float mean[V], rstd[V], gain[V], offset[V];
  bool with_silu;
  __device__ Affine(const GroupNorm& g, long b, int c) : with_silu(g.silu) {
    load(mean, g.mean + b * g.C + c);
    load(rstd, g.rstd + b * g.C + c);
    load(gain, g.gain + b * g.gain_step + c);
    load(offset, g.offset + b * g.gain_step + c);
  }
  __device__ float y(float x, int v) const {
    float z = (x - mean[v]) * (rstd[v] * gain[v]) + offset[v];
    return with_silu ? silu(z) : z;
  }
  // x becomes xhat, dy becomes dz
  __device__ void back(float& x, float& dy, int v) const {
    x = (x - mean[v]) * rstd[v];
    if (with_silu) dy *= silu_slope(x * gain[v] + offset[v]);
  }
  __device__ float dx(float xhat, float dz, int v, float mean_g, float mean_g_xhat) const {
    return rstd[v] * (gain[v] * dz - mean_g - xhat * mean_g_xhat);
  }
};

// v1: one thread a group, alone with its whole stripe.
__global__ void forward_naive(GroupNorm g) {
  long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (i >= (long)g.B * g.groups) return;
  int size = g.C / g.groups, first = int(i % g.groups) * size;
  long b = i / g.groups;
  float sum = 0, squares = 0, count = float(g.N) * size;
  for (int c = first; c < first + size; c++) {
    Channel in(g, b, c);
    float here = 0;
    for (long n = 0; n < g.N; n++) here += in.x[in.first + n * in.step];
    sum += here;
  }
  float mean = sum / count;
  for (int c = first; c < first + size; c++) {
    Channel in(g, b, c);
    float here = 0;
    for (long n = 0; n < g.N; n++) {
      float d = in.x[in.first + n * in.step] - mean;
      here += d * d;
    }
    squares += here;
  }
  float rstd = rsqrtf(squares / count + float(g.eps));
  for (int c = first; c < first + size; c++) {
    g.mean[b * g.C + c] = mean;
    g.rstd[b * g.C + c] = rstd;
    Channel in(g, b, c);
    Affine<1> a(g, b, c);
    for (long n = 0; n < g.N; n++) g.y[(b * g.N + n) * g.C + c] = a.y(in.x[in.first + n * in.step], 0);
  }
}

__global__ void backward_naive(GroupNorm g) {
  long i = blockIdx.x * (long)blockDim.x + threadIdx.x;
  if (i >= (long)g.B * g.groups) return;
  int size = g.C / g.groups, first = int(i % g.groups) * size;
  long b = i / g.groups;
  float of_g = 0, of_g_xhat = 0, count = float(g.N) * size;
  for (int c = first; c < first + size; c++) {
    Channel in(g, b, c);
    Affine<1> a(g, b, c);
    float s = 0, t = 0;
    for (long n = 0; n < g.N; n++) {
      float xhat = in.x[in.first + n * in.step], dz = g.dy[(b * g.N + n) * g.C + c];
      a.back(xhat, dz, 0);
      s += dz;
      t += dz * xhat;
    }
    g.doffset[b * g.C + c] = s;
    g.dgain[b * g.C + c] = t;
    of_g += a.gain[0] * s;
    of_g_xhat += a.gain[0] * t;
  }
  for (int c = first; c < first + size; c++) {
    Channel in(g, b, c);
    Affine<1> a(g, b, c);
    for (long n = 0; n < g.N; n++) {
      float xhat = in.x[in.first + n * in.step], dz = g.dy[(b * g.N + n) * g.C + c];
      a.back(xhat, dz, 0);
      in.dx[in.first + n * in.step] = a.dx(xhat, dz, 0, of_g / count, of_g_xhat / count);
    }
  }
}

// The block's threads as rows of `width` threads over `columns` columns; those left over have nothing to do.
struct Layout {
  int width, high, column, row;
  __device__ explicit Layout(int columns) : width(min(columns, THREADS)), high(THREADS / width) {
    column = threadIdx.x % width;
    row = threadIdx.x / width;
  }
  __device__ bool idle() const { return row >= high; }
};

// Calls f(position, channel) for the elements of a group that are this thread's.
template <class F>
__device__ __forceinline__ void over_group(const Layout& l, long N, int size, const F& f) {
  if (l.idle()) return;
  for (int c = l.column; c < size; c += l.width)
    for (long n = l.row; n < N; n += l.high) f(n, c);
}

// v2: one block a group. Threads that are neighbours read channels that are neighbours, and sum up by a tree.
__global__ void __launch_bounds__(THREADS) forward_block(GroupNorm g) {
  __shared__ float shared[THREADS / 32];
  int size = g.C / g.groups, first = blockIdx.x % g.groups * size;
  long b = blockIdx.x / g.groups;
  float count = float(g.N) * size, sum[1] = {0}, squares[1] = {0};
  Layout l(size);
  auto x = [&](long n, int c) {
    Channel in(g, b, first + c);
    return in.x[in.first + n * in.step];
  };
  over_group(l, g.N, size, [&](long n, int c) { sum[0] += x(n, c); });
  block_sum(sum, shared);
  float mean = sum[0] / count;
  over_group(l, g.N, size, [&](long n, int c) {
    float d = x(n, c) - mean;
    squares[0] += d * d;
  });
  block_sum(squares, shared);
  float rstd = rsqrtf(squares[0] / count + float(g.eps));
  for (int c = threadIdx.x; c < size; c += THREADS) {
    g.mean[b * g.C + first + c] = mean;
    g.rstd[b * g.C + first + c] = rstd;
  }
  over_group(l, g.N, size, [&](long n, int c) {
    long at = b * g.gain_step + first + c;
    float z = (x(n, c) - mean) * (rstd * g.gain[at]) + g.offset[at];
    g.y[(b * g.N + n) * g.C + first + c] = g.silu ? silu(z) : z;
  });
}

__global__ void __launch_bounds__(THREADS) backward_block(GroupNorm g) {
  __shared__ float shared[2 * THREADS];
  int size = g.C / g.groups, first = blockIdx.x % g.groups * size;
  long b = blockIdx.x / g.groups;
  float count = float(g.N) * size, of_g[2] = {0, 0};
  Layout l(size);
  for (int c0 = 0; c0 < size; c0 += l.width) {  // more than once only where a row is the whole block
    int c = first + c0 + l.column;
    bool active = !l.idle() && c0 + l.column < size;
    float sums[2] = {0, 0};
    if (active) {
      Channel in(g, b, c);
      Affine<1> a(g, b, c);
      for (long n = l.row; n < g.N; n += l.high) {
        float xhat = in.x[in.first + n * in.step], dz = g.dy[(b * g.N + n) * g.C + c];
        a.back(xhat, dz, 0);
        sums[0] += dz;
        sums[1] += dz * xhat;
      }
    }
    sum_rows(sums, shared, l.width, l.high);
    if (active && l.row == 0) {
      g.doffset[b * g.C + c] = sums[0];
      g.dgain[b * g.C + c] = sums[1];
      for (int i = 0; i < 2; i++) of_g[i] += g.gain[b * g.gain_step + c] * sums[i];
    }
  }
  block_sum(of_g, shared);
  over_group(l, g.N, size, [&](long n, int k) {
    int c = first + k;
    Channel in(g, b, c);
    Affine<1> a(g, b, c);
    float xhat = in.x[in.first + n * in.step], dz = g.dy[(b * g.N + n) * g.C + c];
    a.back(xhat, dz, 0);
    in.dx[in.first + n * in.step] = a.dx(xhat, dz, 0, of_g[0] / count, of_g[1] / count);
  });
}

// An image's positions cut into parts, and its columns of V channels into tiles of at most a block's width.
struct Cut {
  int parts, tiles, width;
  long N;
  __device__ long first(int part) const { return N * part / parts; }
};

// A block's share of that: threads are rows of `width`, and each has one column.
struct Share {
  long b;
  int part, c, high, row;
  bool active;
  __device__ Share(const Cut& cut, int C, int V, unsigned block) {
    int tile = block % cut.tiles;
    part = block / cut.tiles % cut.parts;
    b = block / cut.tiles / cut.parts;
    high = THREADS / cut.width;
    row = threadIdx.x / cut.width;
    c = (tile * cut.width + threadIdx.x % cut.width) * V;
    active = row < high && c < C;
  }
};

// Calls f(n, M) for n, n + step, ... below end, M of them at a time: ROWS, and in the end one.
template <int ROWS, class F>
__device__ __forceinline__ void in_batches(long n, long end, int step, const F& f) {
  for (; n + (ROWS - 1) * step < end; n += ROWS * step) f(n, std::integral_constant<int, ROWS>());
  if constexpr (ROWS > 1)
    for (; n < end; n += step) f(n, std::integral_constant<int, 1>());
}
template <int ROWS, class F>
__device__ __forceinline__ void over_part(const Cut& cut, const Share& s, const F& f) {
  in_batches<ROWS>(cut.first(s.part) + s.row, cut.first(s.part + 1), s.high, f);
}

// The mean, the sum of squared distances from it, and the count of V sets each, V of either, then the one count.
template <int V>
struct Join {
  __device__ void operator()(float (&mine)[2 * V + 1], const float (&other)[2 * V + 1]) const {
    float count = mine[2 * V] + other[2 * V];
    float share = count > 0 ? other[2 * V] / count : 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
      float delta = other[v] - mine[v];
      mine[v] += delta * share;
      mine[V + v] += other[V + v] + delta * delta * mine[2 * V] * share;
    }
    mine[2 * V] = count;
  }
};

// The first element of channel c's group, from which the statistics are taken.
__device__ __forceinline__ float shift_of(const GroupNorm& g, long b, int c) {
  int size = g.C / g.groups;
  Channel in(g, b, c / size * size);
  return in.x[in.first];
}

// v3, v4: each thread keeps the means and squared distances of its own V channels over its rows of the part, ROWS of them in
// flight; a tree over the block's rows leaves partial (B, parts, 2, C).
template <int V, int ROWS>
__global__ void __launch_bounds__(THREADS) statistics(GroupNorm g, Cut cut, float* partial) {
  __shared__ float shared[(2 * V + 1) * THREADS];
  Share s(cut, g.C, V, blockIdx.x);
  float moments[2 * V + 1] = {};
  if (s.active) {
    Channel in(g, s.b, s.c);
    float shift[V];
    for (int v = 0; v < V; v++) shift[v] = shift_of(g, s.b, s.c + v);
    over_part<ROWS>(cut, s, [&](long n, auto rows) {
      constexpr int M = decltype(rows)::value;
      float x[M][V], some[2 * V + 1];
#pragma unroll
      for (int i = 0; i < M; i++) load(x[i], in.x + in.first + (n + i * s.high) * in.step);
#pragma unroll
      for (int v = 0; v < V; v++) {
        float sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < M; i++) sum += x[i][v] -= shift[v];
        some[v] = sum / M;
#pragma unroll
        for (int i = 0; i < M; i++) squares += (x[i][v] - some[v]) * (x[i][v] - some[v]);
        some[V + v] = squares;
      }
      some[2 * V] = M;
      Join<V>()(moments, some);
    });
  }
  join_rows(moments, shared, cut.width, s.high, Join<V>());
  if (!s.active || s.row > 0) return;
  float* out = partial + (s.b * cut.parts + s.part) * 2 * g.C + s.c;
  float mean[V], squares[V];
  for (int v = 0; v < V; v++) mean[v] = moments[v], squares[v] = moments[V + v];
  store(out, mean);
  store(out + g.C, squares);
}

// Joins the parts and channels of a group, one block each.
__global__ void __launch_bounds__(THREADS) finish(GroupNorm g, Cut cut, const float* partial) {
  __shared__ float shared[3 * THREADS];
  int size = g.C / g.groups, first = blockIdx.x % g.groups * size;
  long b = blockIdx.x / g.groups;
  float moments[3] = {};
  for (long i = threadIdx.x; i < (long)cut.parts * size; i += THREADS) {
    int part = int(i / size);
    const float* p = partial + (b * cut.parts + part) * 2 * g.C + first + i % size;
    float some[3] = {p[0], p[g.C], float(cut.first(part + 1) - cut.first(part))};
    Join<1>()(moments, some);
  }
  join_rows(moments, shared, 1, THREADS, Join<1>());
  __syncthreads();
  float mean = shift_of(g, b, first) + shared[0], variance = shared[THREADS] / shared[2 * THREADS];
  for (int c = threadIdx.x; c < size; c += THREADS) {
    g.mean[b * g.C + first + c] = mean;
    g.rstd[b * g.C + first + c] = rsqrtf(variance + float(g.eps));
  }
}

// Goes over the parts from back to front: what the statistics read last is still in the L2.
template <int V, int ROWS>
__global__ void __launch_bounds__(THREADS) apply(GroupNorm g, Cut cut) {
  Share s(cut, g.C, V, gridDim.x - 1 - blockIdx.x);
  if (!s.active) return;
  Channel in(g, s.b, s.c);
  Affine<V> a(g, s.b, s.c);
  over_part<ROWS>(cut, s, [&](long n, auto rows) {
    constexpr int M = decltype(rows)::value;
    float x[M][V];
#pragma unroll
    for (int i = 0; i < M; i++) load(x[i], in.x + in.first + (n + i * s.high) * in.step);
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
      for (int v = 0; v < V; v++) x[i][v] = a.y(x[i][v], v);
      store_streaming(g.y + (s.b * g.N + n + i * s.high) * g.C + s.c, x[i]);
    }
  });
}

// Backward in the same three steps: partial (B, parts, 2, C) holds sums of dz and of dz * xhat.
template <int V, int ROWS>
__global__ void __launch_bounds__(THREADS) gradient_sums(GroupNorm g, Cut cut, float* partial) {
  __shared__ float shared[2 * V * THREADS];
  Share s(cut, g.C, V, blockIdx.x);
  float sums[2 * V] = {};
  if (s.active) {
    Channel in(g, s.b, s.c);
    Affine<V> a(g, s.b, s.c);
    over_part<ROWS>(cut, s, [&](long n, auto rows) {
      constexpr int M = decltype(rows)::value;
      float x[M][V], dy[M][V];
#pragma unroll
      for (int i = 0; i < M; i++) {
        load(x[i], in.x + in.first + (n + i * s.high) * in.step);
        load(dy[i], g.dy + (s.b * g.N + n + i * s.high) * g.C + s.c);
      }
#pragma unroll
      for (int i = 0; i < M; i++)
#pragma unroll
        for (int v = 0; v < V; v++) {
          a.back(x[i][v], dy[i][v], v);
          sums[v] += dy[i][v];
          sums[V + v] += dy[i][v] * x[i][v];
        }
    });
  }
  sum_rows(sums, shared, cut.width, s.high);
  if (!s.active || s.row > 0) return;
  float* out = partial + (s.b * cut.parts + s.part) * 2 * g.C + s.c;
  float of_dz[V], of_dz_xhat[V];
  for (int v = 0; v < V; v++) of_dz[v] = sums[v], of_dz_xhat[v] = sums[V + v];
  store(out, of_dz);
  store(out + g.C, of_dz_xhat);
}

// means (B, groups, 2): of g and of g * xhat
__global__ void __launch_bounds__(THREADS) finish_sums(GroupNorm g, Cut cut, const float* partial, float* means) {
  __shared__ float shared[2 * THREADS];
  int size = g.C / g.groups, first = blockIdx.x % g.groups * size;
  long b = blockIdx.x / g.groups;
  float of_g[2] = {0, 0};
  Layout l(size);
  for (int c0 = 0; c0 < size; c0 += l.width) {
    int c = first + c0 + l.column;
    bool active = !l.idle() && c0 + l.column < size;
    float sums[2] = {0, 0};
    if (active)
      for (int part = l.row; part < cut.parts; part += l.high) {
        const float* p = partial + (b * cut.parts + part) * 2 * g.C + c;
        sums[0] += p[0];
        sums[1] += p[g.C];
      }
    sum_rows(sums, shared, l.width, l.high);
    if (active && l.row == 0) {
      g.doffset[b * g.C + c] = sums[0];
      g.dgain[b * g.C + c] = sums[1];
      for (int i = 0; i < 2; i++) of_g[i] += g.gain[b * g.gain_step + c] * sums[i];
    }
  }
  block_sum(of_g, shared);
  if (threadIdx.x < 2) means[2L * blockIdx.x + threadIdx.x] = of_g[threadIdx.x] / (float(g.N) * size);
}

template <int V, int ROWS>
__global__ void __launch_bounds__(THREADS) apply_gradient(GroupNorm g, Cut cut, const float* means) {
  Share s(cut, g.C, V, gridDim.x - 1 - blockIdx.x);
  if (!s.active) return;
  Channel in(g, s.b, s.c);
  Affine<V> a(g, s.b, s.c);
  float mean_g[V], mean_g_xhat[V];
  for (int v = 0; v < V; v++) {
    const float* m = means + 2 * (s.b * g.groups + (s.c + v) / (g.C / g.groups));
    mean_g[v] = m[0], mean_g_xhat[v] = m[1];
  }
  over_part<ROWS>(cut, s, [&](long n, auto rows) {
    constexpr int M = decltype(rows)::value;
    float x[M][V], dy[M][V];
#pragma unroll
    for (int i = 0; i < M; i++) {
      load(x[i], in.x + in.first + (n + i * s.high) * in.step);
      load(dy[i], g.dy + (s.b * g.N + n + i * s.high) * g.C + s.c);
    }
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        a.back(x[i][v], dy[i][v], v);
        x[i][v] = a.dx(x[i][v], dy[i][v], v, mean_g[v], mean_g_xhat[v]);
      }
      store_streaming(in.dx + in.first + (n + i * s.high) * in.step, x[i]);
    }
  });
}

// v5: one block a group, whose stripe it reads once: thread t keeps its V channels of position after position in shared
// memory, at (slot * THREADS + t) * V. Nobody else reads them there, so only the sums need barriers.
constexpr int IN_FLIGHT = 4;

template <int V>
__global__ void __launch_bounds__(THREADS) forward_on_chip(GroupNorm g) {
  SHARED_DYNAMIC(float, kept);
  __shared__ float shared[THREADS / 32];
  int size = g.C / g.groups, first = blockIdx.x % g.groups * size, slots = 0;
  long b = blockIdx.x / g.groups;
  float count = float(g.N) * size, sum[1] = {0}, squares[1] = {0};
  Layout l(size / V);
  long end = l.idle() ? 0 : g.N;
  for (int c = l.column * V; c < size; c += l.width * V) {
    Channel in(g, b, first + c);
    in_batches<IN_FLIGHT>(l.row, end, l.high, [&](long n, auto rows) {
      constexpr int M = decltype(rows)::value;
      float x[M][V];
#pragma unroll
      for (int i = 0; i < M; i++) load(x[i], in.x + in.first + (n + i * l.high) * in.step);
#pragma unroll
      for (int i = 0; i < M; i++) {
        for (int v = 0; v < V; v++) sum[0] += x[i][v];
        store(kept + (slots++ * THREADS + threadIdx.x) * V, x[i]);
      }
    });
  }
  block_sum(sum, shared);
  float mean = sum[0] / count;
  for (int slot = 0; slot < slots; slot++) {
    float x[V];
    load(x, kept + (slot * THREADS + threadIdx.x) * V);
    for (int v = 0; v < V; v++) squares[0] += (x[v] - mean) * (x[v] - mean);
  }
  block_sum(squares, shared);
  float rstd = rsqrtf(squares[0] / count + float(g.eps));
  for (int c = threadIdx.x; c < size; c += THREADS) {
    g.mean[b * g.C + first + c] = mean;
    g.rstd[b * g.C + first + c] = rstd;
  }
  int slot = 0;
  for (int c = l.column * V; c < size; c += l.width * V) {
    float gain[V], offset[V];
    load(gain, g.gain + b * g.gain_step + first + c);
    load(offset, g.offset + b * g.gain_step + first + c);
    for (long n = l.row; n < end; n += l.high) {
      float x[V];
      load(x, kept + (slot++ * THREADS + threadIdx.x) * V);
      for (int v = 0; v < V; v++) {
        float z = (x[v] - mean) * (rstd * gain[v]) + offset[v];
        x[v] = g.silu ? silu(z) : z;
      }
      store(g.y + (b * g.N + n) * g.C + first + c, x);
    }
  }
}

// slots: a thread's; xhat and dz are kept
template <int V>
__global__ void __launch_bounds__(THREADS) backward_on_chip(GroupNorm g, int slots) {
  SHARED_DYNAMIC(float, kept);
  __shared__ float shared[2 * V * THREADS];
  float* kept_dz = kept + slots * THREADS * V;
  int size = g.C / g.groups, first = blockIdx.x % g.groups * size, slot = 0;
  long b = blockIdx.x / g.groups;
  float count = float(g.N) * size, of_g[2] = {0, 0};
  Layout l(size / V);
  for (int c0 = 0; c0 < size; c0 += l.width * V) {
    int c = first + c0 + l.column * V;
    bool active = !l.idle() && c < first + size;
    float sums[2 * V] = {};
    if (active) {
      Channel in(g, b, c);
      Affine<V> a(g, b, c);
      in_batches<IN_FLIGHT>(l.row, g.N, l.high, [&](long n, auto rows) {
        constexpr int M = decltype(rows)::value;
        float x[M][V], dy[M][V];
#pragma unroll
        for (int i = 0; i < M; i++) {
          load(x[i], in.x + in.first + (n + i * l.high) * in.step);
          load(dy[i], g.dy + (b * g.N + n + i * l.high) * g.C + c);
        }
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
          for (int v = 0; v < V; v++) {
            a.back(x[i][v], dy[i][v], v);
            sums[v] += dy[i][v];
            sums[V + v] += dy[i][v] * x[i][v];
          }
          store(kept + (slot * THREADS + threadIdx.x) * V, x[i]);
          store(kept_dz + (slot++ * THREADS + threadIdx.x) * V, dy[i]);
        }
      });
    }
    sum_rows(sums, shared, l.width, l.high);
    if (active && l.row == 0)
      for (int v = 0; v < V; v++) {
        g.doffset[b * g.C + c + v] = sums[v];
        g.dgain[b * g.C + c + v] = sums[V + v];
        for (int i = 0; i < 2; i++) of_g[i] += g.gain[b * g.gain_step + c + v] * sums[i * V + v];
      }
  }
  block_sum(of_g, shared);
  slot = 0;
  for (int c = first + l.column * V; !l.idle() && c < first + size; c += l.width * V) {
    Channel in(g, b, c);
    Affine<V> a(g, b, c);
    for (long n = l.row; n < g.N; n += l.high) {
      float x[V], dz[V];
      load(x, kept + (slot * THREADS + threadIdx.x) * V);
      load(dz, kept_dz + (slot++ * THREADS + threadIdx.x) * V);
      for (int v = 0; v < V; v++) x[v] = a.dx(x[v], dz[v], v, of_g[0] / count, of_g[1] / count);
      store(in.dx + in.first + n * in.step, x);
    }
  }
}

// Are all arrays, and all their rows, on multiples of 16 bytes?
bool aligned(const GroupNorm& g) {
  size_t bits = 0;
  auto add = [&](const void* p) { bits |= reinterpret_cast<size_t>(p); };
  for (const auto& in : g.inputs) add(in.x), add(in.dx), bits |= in.C * sizeof(float);
  for (const float* p : {g.gain, g.offset, g.dy}) add(p);
  for (const float* p : {g.mean, g.rstd, g.y, g.dgain, g.doffset}) add(p);
  return bits % 16 == 0;
}

// Some four blocks a multiprocessor, if each then has rows enough to do.
Cut cut(const GroupNorm& g, int V, int rows) {
  int columns = g.C / V, tiles = (columns + THREADS - 1) / THREADS, width = (columns + tiles - 1) / tiles;
  long wanted = (4L * multiprocessors() + g.B * tiles - 1) / ((long)g.B * tiles);
  long most = g.N / ((long)THREADS / width * rows);
  return {int(std::max(1L, std::min(wanted, most))), tiles, width, g.N};
}

template <int V, int ROWS>
void forward_split(const GroupNorm& g) {
  Cut c = cut(g, V, ROWS);
  float* partial = workspace(2L * g.B * c.parts * g.C);
  unsigned blocks = unsigned((long)g.B * c.parts * c.tiles);
  LAUNCH((statistics<V, ROWS>), blocks, THREADS, 0, stream(), g, c, partial);
  LAUNCH(finish, g.B * g.groups, THREADS, 0, stream(), g, c, partial);
  LAUNCH((apply<V, ROWS>), blocks, THREADS, 0, stream(), g, c);
}

template <int V, int ROWS>
void backward_split(const GroupNorm& g) {
  Cut c = cut(g, V, ROWS);
  long sums = 2L * g.B * c.parts * g.C;
  float *partial = workspace(sums + 2L * g.B * g.groups), *means = partial + sums;
  unsigned blocks = unsigned((long)g.B * c.parts * c.tiles);
  LAUNCH((gradient_sums<V, ROWS>), blocks, THREADS, 0, stream(), g, c, partial);
  LAUNCH(finish_sums, g.B * g.groups, THREADS, 0, stream(), g, c, partial, means);
  LAUNCH((apply_gradient<V, ROWS>), blocks, THREADS, 0, stream(), g, c, means);
}

// How many slots a thread keeps of a group's stripe; 0: it does not fit, or is narrower than the 32 bytes that memory moves.
int slots_on_chip(const GroupNorm& g, int V, int arrays) {
  size_t most = compute_capability() >= 80 ? 80 << 10 : 32 << 10;  // two blocks a multiprocessor
  int size = g.C / g.groups, columns = size / V, width = std::min(columns, THREADS), high = THREADS / width;
  long slots = (g.N + high - 1) / high * ((columns + width - 1) / width);
  return size >= 8 && arrays * slots * THREADS * V * sizeof(float) <= most ? int(slots) : 0;
}

}  // namespace

void group_norm_forward(const GroupNorm& g) {
  if (g.B == 0 || g.C == 0) return;
  int rung = g.N ? group_norm.rung() : 2;  // of no positions the mean is 0 / 0
  bool vectors = aligned(g), in_group = vectors && g.C / g.groups % 4 == 0;
  int slots = rung == 5 ? slots_on_chip(g, in_group ? 4 : 1, 1) : 0;
  if (rung == 1) {
    LAUNCH(forward_naive, blocks_for((long)g.B * g.groups, 64), 64, 0, stream(), g);
  } else if (rung == 2) {
    LAUNCH(forward_block, g.B * g.groups, THREADS, 0, stream(), g);
  } else if (rung == 3) {
    forward_split<1, 1>(g);
  } else if (slots && in_group) {
    LAUNCH(forward_on_chip<4>, g.B * g.groups, THREADS, slots * THREADS * 4 * sizeof(float), stream(), g);
  } else if (slots) {
    LAUNCH(forward_on_chip<1>, g.B * g.groups, THREADS, slots * THREADS * sizeof(float), stream(), g);
  } else if (vectors) {
    forward_split<4, 4>(g);
  } else {
    forward_split<1, 4>(g);
  }
}

void group_norm_backward(const GroupNorm& g) {
  if (g.B == 0 || g.C == 0) return;
  int rung = g.N ? group_norm.rung() : 2;  // of no positions the sums are 0
  bool vectors = aligned(g), in_group = vectors && g.C / g.groups % 4 == 0;
  int slots = rung == 5 ? slots_on_chip(g, in_group ? 4 : 1, 2) : 0;
  if (rung == 1) {
    LAUNCH(backward_naive, blocks_for((long)g.B * g.groups, 64), 64, 0, stream(), g);
  } else if (rung == 2) {
    LAUNCH(backward_block, g.B * g.groups, THREADS, 0, stream(), g);
  } else if (rung == 3) {
    backward_split<1, 1>(g);
  } else if (slots && in_group) {
    LAUNCH(backward_on_chip<4>, g.B * g.groups, THREADS, 2 * slots * THREADS * 4 * sizeof(float), stream(), g, slots);
  } else if (slots) {
    LAUNCH(backward_on_chip<1>, g.B * g.groups, THREADS, 2 * slots * THREADS * sizeof(float), stream(), g, slots);
  } else if (vectors) {
    backward_split<4, 4>(g);
  } else {
    backward_split<1, 4>(g);
  }
}

}  // namespace minidiff::cuda
