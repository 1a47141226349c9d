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
// The floor is the memory: x read and y written, 8 bytes an element; backward x and dy read and dx written, 12. Rung 5
// moves no more, as its stripes stay on the chip. The others read twice, 12 and 20 bytes; rung 4 finds what it reads a
// second time in the L2. Arithmetic, some 10 operations an element, hides behind it.
//
// Variances come from Chan's formula, which joins the means and squared distances of two sets; there is no E[x^2] - E[x]^2,
// which cancels. Rungs 3 and 4 take them of x - shift, shift being the group's first element, so that a large common offset
// costs no digits. Chan, Golub and LeVeque 1983, doi 10.1080/00031305.1983.10483115.
//
// Backward, with g = gain * dz, dz = dy or dy through the SiLU, which is computed again rather than kept:
//   doffset = sum(dz), dgain = sum(dz * xhat) over N,   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) over the group
#include <algorithm>
#include <numeric>

#include "../kernels.h"
#include "ladder.h"
#include "stream.h"
#include "sums.h"

namespace minidiff::cuda {
namespace {

Ladder group_norm("group_norm",
                  {{"naive", "one thread a group"},
                   {"block", "one block a group: neighbours read neighbouring channels, sums by trees"},
                   {"split", "blocks share an image, so that batch 1 fills the chip; whole rows, by 16-byte loads"},
                   {"cached", "as many images at a time as half the L2 holds: the second reading finds them there"},
                   {"on chip", "a group that fits stays in shared memory: one read, one write, one launch"}});

constexpr int THREADS = 256;

// Image b's channel c: where it lies in its input, and the way to the next position.
struct Channel {
  const float* x;
  float* dx;
  long first;
  int step;
  __device__ Channel(const GroupNorm& g, long b, int c) {
    bool second = c >= g.inputs[0].C;
    step = second ? g.inputs[1].C : g.inputs[0].C;
    first = b * g.N * step + c - (second ? g.inputs[1].first : 0);
    x = second ? g.inputs[1].x : g.inputs[0].x;
    dx = second ? g.inputs[1].dx : g.inputs[0].dx;
  }
};

// Where e^-z overflows both are 0, as they should, also at -infinity: of z only what is above -100 is multiplied by that 0.
__device__ __forceinline__ float silu(float z) { return __fdividef(fmaxf(z, -100), 1 + __expf(-z)); }
__device__ __forceinline__ float silu_slope(float z) {
  float s = __fdividef(1, 1 + __expf(-z));
  return s * (1 + fmaxf(z, -100) * (1 - s));
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
  // Of a group whose mean and rstd the block has just found.
  __device__ Affine(const GroupNorm& g, long b, int c, float its_mean, float its_rstd) : with_silu(g.silu) {
    for (int v = 0; v < V; v++) mean[v] = its_mean, rstd[v] = its_rstd;
    load(gain, g.gain + b * g.gain_step + c);
    load(offset, g.offset + b * g.gain_step + c);
  }
  // x becomes y
  __device__ __forceinline__ void forward(float (&x)[V]) const {
    for (int v = 0; v < V; v++) x[v] = (x[v] - mean[v]) * (rstd[v] * gain[v]) + offset[v];
    if (with_silu)
      for (int v = 0; v < V; v++) x[v] = silu(x[v]);
  }
  // x becomes xhat, dy becomes dz
  __device__ __forceinline__ void back(float (&x)[V], float (&dy)[V]) const {
    for (int v = 0; v < V; v++) x[v] = (x[v] - mean[v]) * rstd[v];
    if (with_silu)
      for (int v = 0; v < V; v++) dy[v] *= silu_slope(x[v] * gain[v] + offset[v]);
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
    for (long n = 0; n < g.N; n++) {
      float x[1] = {in.x[in.first + n * in.step]};
      a.forward(x);
      g.y[(b * g.N + n) * g.C + c] = x[0];
    }
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
      float xhat[1] = {in.x[in.first + n * in.step]}, dz[1] = {g.dy[(b * g.N + n) * g.C + c]};
      a.back(xhat, dz);
      s += dz[0];
      t += dz[0] * xhat[0];
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
      float xhat[1] = {in.x[in.first + n * in.step]}, dz[1] = {g.dy[(b * g.N + n) * g.C + c]};
      a.back(xhat, dz);
      in.dx[in.first + n * in.step] = a.dx(xhat[0], dz[0], 0, of_g / count, of_g_xhat / count);
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
  int size = g.C / g.groups, first = blockIdx.x % g.groups * size;
  long b = blockIdx.x / g.groups;
  float count = float(g.N) * size, sum = 0, squares = 0;
  Layout l(size);
  auto x = [&](long n, int c) {
    Channel in(g, b, first + c);
    return in.x[in.first + n * in.step];
  };
  over_group(l, g.N, size, [&](long n, int c) { sum += x(n, c); });
  float mean = block_sum<0>(sum) / count;
  over_group(l, g.N, size, [&](long n, int c) {
    float d = x(n, c) - mean;
    squares += d * d;
  });
  float rstd = rsqrtf(block_sum<1>(squares) / count + float(g.eps));
  for (int c = threadIdx.x; c < size; c += THREADS) {
    g.mean[b * g.C + first + c] = mean;
    g.rstd[b * g.C + first + c] = rstd;
  }
  over_group(l, g.N, size, [&](long n, int c) {
    float y[1] = {x(n, c)};
    Affine<1>(g, b, first + c, mean, rstd).forward(y);
    g.y[(b * g.N + n) * g.C + first + c] = y[0];
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
        float xhat[1] = {in.x[in.first + n * in.step]}, dz[1] = {g.dy[(b * g.N + n) * g.C + c]};
        a.back(xhat, dz);
        sums[0] += dz[0];
        sums[1] += dz[0] * xhat[0];
      }
    }
    sum_rows(sums, shared, l.width, l.high);
    if (active && l.row == 0) {
      g.doffset[b * g.C + c] = sums[0];
      g.dgain[b * g.C + c] = sums[1];
      for (int i = 0; i < 2; i++) of_g[i] += g.gain[b * g.gain_step + c] * sums[i];
    }
  }
  float mean_g = block_sum<0>(of_g[0]) / count, mean_g_xhat = block_sum<1>(of_g[1]) / count;
  over_group(l, g.N, size, [&](long n, int k) {
    int c = first + k;
    Channel in(g, b, c);
    Affine<1> a(g, b, c);
    float xhat[1] = {in.x[in.first + n * in.step]}, dz[1] = {g.dy[(b * g.N + n) * g.C + c]};
    a.back(xhat, dz);
    in.dx[in.first + n * in.step] = a.dx(xhat[0], dz[0], 0, mean_g, mean_g_xhat);
  });
}

// Some images, the positions of each cut into parts of so many rows, its columns of V channels into tiles of at most a
// block's width. The grid: tiles, parts, images.
struct Cut {
  int first_image, parts, tiles, width;
  long rows;
};

// A block's share of that: threads are rows of `width`, and each has one column, of whose positions it takes every step-th.
struct Share {
  long b, first;  // the image; the first position
  int c, row, high, step, count;
  bool active;
  __device__ Share(const Cut& cut, const GroupNorm& g, int V) {
    b = cut.first_image + blockIdx.z;
    step = high = THREADS / cut.width;
    row = threadIdx.x / cut.width;
    c = (blockIdx.x * cut.width + threadIdx.x % cut.width) * V;
    active = row < high && c < g.C;
    first = blockIdx.y * cut.rows + row;
    count = int(min(g.N - blockIdx.y * cut.rows, cut.rows) - row + high - 1) / high;
  }
  // From the last to the first: if not all of it, the end of what was read before is still in the L2.
  __device__ void turn_round() {
    first += (count - 1L) * step;
    step = -step;
  }
  // Where its partial results lie, of partial (images, parts, 2, C).
  __device__ long at(const GroupNorm& g) const { return (blockIdx.z * gridDim.y + blockIdx.y) * 2L * g.C + c; }
};

// A way over a column's positions.
struct Walk {
  const float* at;
  int step;
  // V channels of the next ROWS positions, `left` of which are there; all loads are on their way before the first is used.
  template <int ROWS, int V>
  __device__ __forceinline__ void next(float (&to)[ROWS][V], int left) {
#pragma unroll
    for (int i = 0; i < ROWS; i++, at += step)
      if (i < left) load(to[i], at);
  }
};

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

constexpr int ROWS = 4, PAIRS = 2;  // rows of x, or of x and dy, in flight
constexpr int FITS = 4;             // so many blocks run on a multiprocessor: the compiler keeps to the registers

// v3: each thread keeps the means and squared distances of its own V channels over its rows of the part; a tree over the
// block's rows leaves partial.
template <int V>
__global__ void __launch_bounds__(THREADS, FITS) statistics(GroupNorm g, Cut cut, float* partial) {
  __shared__ float shared[(2 * V + 1) * THREADS];
  Share s(cut, g, V);
  float moments[2 * V + 1] = {};
  if (s.active) {
    Channel in(g, s.b, s.c);
    float shift[V];
    for (int v = 0; v < V; v++) shift[v] = shift_of(g, s.b, s.c + v);
    Walk from{in.x + in.first + s.first * in.step, s.step * in.step};
    for (int left = s.count; left > 0; left -= ROWS) {
      float x[ROWS][V], some[2 * V + 1], count = min(left, ROWS), share = 1 / count;
      from.next(x, left);
#pragma unroll
      for (int v = 0; v < V; v++) {
        float sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
          if (i < left) sum += x[i][v] -= shift[v];
        some[v] = sum * share;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
          if (i < left) squares += (x[i][v] - some[v]) * (x[i][v] - some[v]);
        some[V + v] = squares;
      }
      some[2 * V] = count;
      Join<V>()(moments, some);
    }
  }
  join_rows(moments, shared, cut.width, s.high, Join<V>());
  if (!s.active || s.row > 0) return;
  float* out = partial + s.at(g);
  float mean[V], squares[V];
  for (int v = 0; v < V; v++) mean[v] = moments[v], squares[v] = moments[V + v];
  store(out, mean);
  store(out + g.C, squares);
}

// Joins the parts and channels of a group, one block each.
__global__ void __launch_bounds__(THREADS) finish(GroupNorm g, Cut cut, const float* partial) {
  __shared__ float shared[3 * THREADS];
  int size = g.C / g.groups, first = blockIdx.x * size;
  long b = cut.first_image + blockIdx.y;
  float moments[3] = {};
  over_group(Layout(size), cut.parts, size, [&](long part, int c) {
    const float* p = partial + (blockIdx.y * cut.parts + part) * 2 * g.C + first + c;
    float some[3] = {p[0], p[g.C], float(min(g.N - part * cut.rows, cut.rows))};
    Join<1>()(moments, some);
  });
  join_rows(moments, shared, 1, THREADS, Join<1>());
  __syncthreads();
  float mean = shift_of(g, b, first) + shared[0], variance = shared[THREADS] / shared[2 * THREADS];
  for (int c = threadIdx.x; c < size; c += THREADS) {
    g.mean[b * g.C + first + c] = mean;
    g.rstd[b * g.C + first + c] = rsqrtf(variance + float(g.eps));
  }
}

template <int V>
__global__ void __launch_bounds__(THREADS, FITS) apply(GroupNorm g, Cut cut) {
  Share s(cut, g, V);
  if (!s.active || s.count <= 0) return;
  s.turn_round();
  Channel in(g, s.b, s.c);
  Affine<V> a(g, s.b, s.c);
  Walk from{in.x + in.first + s.first * in.step, s.step * in.step};
  float* to = g.y + (s.b * g.N + s.first) * g.C + s.c;
  for (int left = s.count; left > 0; left -= ROWS) {
    float x[ROWS][V];
    from.next(x, left);
#pragma unroll
    for (int i = 0; i < ROWS; i++, to += s.step * g.C) {
      if (i >= left) break;
      a.forward(x[i]);
      store_streaming(to, x[i]);
    }
  }
}

// Backward in the same three steps: partial holds sums of dz and of dz * xhat.
template <int V>
__global__ void __launch_bounds__(THREADS, FITS) gradient_sums(GroupNorm g, Cut cut, float* partial) {
  __shared__ float shared[2 * V * THREADS];
  Share s(cut, g, V);
  float sums[2 * V] = {};
  if (s.active) {
    Channel in(g, s.b, s.c);
    Affine<V> a(g, s.b, s.c);
    Walk of_x{in.x + in.first + s.first * in.step, s.step * in.step};
    Walk of_dy{g.dy + (s.b * g.N + s.first) * g.C + s.c, s.step * g.C};
    for (int left = s.count; left > 0; left -= PAIRS) {
      float x[PAIRS][V], dy[PAIRS][V];
      of_x.next(x, left);
      of_dy.next(dy, left);
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        if (i >= left) break;
        a.back(x[i], dy[i]);
#pragma unroll
        for (int v = 0; v < V; v++) {
          sums[v] += dy[i][v];
          sums[V + v] += dy[i][v] * x[i][v];
        }
      }
    }
  }
  sum_rows(sums, shared, cut.width, s.high);
  if (!s.active || s.row > 0) return;
  float* out = partial + s.at(g);
  float of_dz[V], of_dz_xhat[V];
  for (int v = 0; v < V; v++) of_dz[v] = sums[v], of_dz_xhat[v] = sums[V + v];
  store(out, of_dz);
  store(out + g.C, of_dz_xhat);
}

// means (images, groups, 2): of g and of g * xhat
__global__ void __launch_bounds__(THREADS) finish_sums(GroupNorm g, Cut cut, const float* partial, float* means) {
  __shared__ float shared[2 * THREADS];
  int size = g.C / g.groups, first = blockIdx.x * size;
  long b = cut.first_image + blockIdx.y;
  float of_g[2] = {0, 0};
  Layout l(size);
  for (int c0 = 0; c0 < size; c0 += l.width) {
    int c = first + c0 + l.column;
    bool active = !l.idle() && c0 + l.column < size;
    float sums[2] = {0, 0};
    if (active)
      for (int part = l.row; part < cut.parts; part += l.high) {
        const float* p = partial + (blockIdx.y * cut.parts + part) * 2L * g.C + c;
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
  float sum_g = block_sum<0>(of_g[0]), sum_g_xhat = block_sum<1>(of_g[1]), count = float(g.N) * size;
  if (threadIdx.x > 0) return;
  means += 2L * (blockIdx.y * g.groups + blockIdx.x);
  means[0] = sum_g / count;
  means[1] = sum_g_xhat / count;
}

template <int V>
__global__ void __launch_bounds__(THREADS, FITS) apply_gradient(GroupNorm g, Cut cut, const float* means) {
  Share s(cut, g, V);
  if (!s.active || s.count <= 0) return;
  s.turn_round();
  Channel in(g, s.b, s.c);
  Affine<V> a(g, s.b, s.c);
  float mean_g[V], mean_g_xhat[V];
  for (int v = 0; v < V; v++) {
    const float* m = means + 2L * (blockIdx.z * g.groups + (s.c + v) / (g.C / g.groups));
    mean_g[v] = m[0], mean_g_xhat[v] = m[1];
  }
  long first = in.first + s.first * in.step;
  Walk of_x{in.x + first, s.step * in.step}, of_dy{g.dy + (s.b * g.N + s.first) * g.C + s.c, s.step * g.C};
  float* dx = in.dx + first;
  for (int left = s.count; left > 0; left -= PAIRS) {
    float x[PAIRS][V], dy[PAIRS][V];
    of_x.next(x, left);
    of_dy.next(dy, left);
#pragma unroll
    for (int i = 0; i < PAIRS; i++, dx += of_x.step) {
      if (i >= left) break;
      a.back(x[i], dy[i]);
#pragma unroll
      for (int v = 0; v < V; v++) x[i][v] = a.dx(x[i][v], dy[i][v], v, mean_g[v], mean_g_xhat[v]);
      store_streaming(dx, x[i]);
    }
  }
}

// v5: one block a group, whose stripe it reads once: thread t keeps its V channels of position after position in shared
// memory, at (slot * THREADS + t) * V. Nobody else reads them there, so only the sums need barriers. 16 floats in flight.
template <int V>
__global__ void __launch_bounds__(THREADS) forward_on_chip(GroupNorm g) {
  SHARED_DYNAMIC(float, kept);
  constexpr int M = 16 / V;
  int size = g.C / g.groups, first = blockIdx.x % g.groups * size, slots = 0;
  long b = blockIdx.x / g.groups;
  float count = float(g.N) * size, sum = 0, squares = 0;
  Layout l(size / V);
  int rows = l.idle() ? 0 : int(g.N - l.row + l.high - 1) / l.high;
  kept += threadIdx.x * V;
  for (int c = l.column * V; c < size; c += l.width * V) {
    Channel in(g, b, first + c);
    Walk from{in.x + in.first + l.row * in.step, l.high * in.step};
    for (int left = rows; left > 0; left -= M) {
      float x[M][V];
      from.next(x, left);
#pragma unroll
      for (int i = 0; i < M; i++) {
        if (i >= left) break;
        for (int v = 0; v < V; v++) sum += x[i][v];
        store(kept + slots++ * THREADS * V, x[i]);
      }
    }
  }
  float mean = block_sum<0>(sum) / count;
  for (int slot = 0; slot < slots; slot++) {
    float x[V];
    load(x, kept + slot * THREADS * V);
    for (int v = 0; v < V; v++) squares += (x[v] - mean) * (x[v] - mean);
  }
  float rstd = rsqrtf(block_sum<1>(squares) / count + float(g.eps));
  for (int c = threadIdx.x; c < size; c += THREADS) {
    g.mean[b * g.C + first + c] = mean;
    g.rstd[b * g.C + first + c] = rstd;
  }
  for (int c = l.column * V; c < size; c += l.width * V) {
    Affine<V> a(g, b, first + c, mean, rstd);
    float* y = g.y + (b * g.N + l.row) * g.C + first + c;
    for (int k = 0; k < rows; k++, y += l.high * g.C, kept += THREADS * V) {
      float x[V];
      load(x, kept);
      a.forward(x);
      store(y, x);
    }
  }
}

// slots: a thread's; xhat and dz are kept, and there are two slots more for the sums
template <int V>
__global__ void __launch_bounds__(THREADS) backward_on_chip(GroupNorm g, int slots) {
  SHARED_DYNAMIC(float, shared);
  constexpr int M = V == 1 ? 8 : 16 / V;
  int size = g.C / g.groups, first = blockIdx.x % g.groups * size;
  long b = blockIdx.x / g.groups;
  float count = float(g.N) * size, of_g[2] = {0, 0};
  Layout l(size / V);
  int rows = l.idle() ? 0 : int(g.N - l.row + l.high - 1) / l.high;
  float *kept = shared + (2 * THREADS + threadIdx.x) * V, *xhats = kept, *dzs = kept + slots * THREADS * V;
  for (int c0 = 0; c0 < size; c0 += l.width * V) {
    int c = first + c0 + l.column * V;
    bool active = !l.idle() && c < first + size;
    float sums[2 * V] = {};
    if (active) {
      Channel in(g, b, c);
      Affine<V> a(g, b, c);
      Walk of_x{in.x + in.first + l.row * in.step, l.high * in.step};
      Walk of_dy{g.dy + (b * g.N + l.row) * g.C + c, l.high * g.C};
      for (int left = rows; left > 0; left -= M) {
        float x[M][V], dy[M][V];
        of_x.next(x, left);
        of_dy.next(dy, left);
#pragma unroll
        for (int i = 0; i < M; i++) {
          if (i >= left) break;
          a.back(x[i], dy[i]);
#pragma unroll
          for (int v = 0; v < V; v++) {
            sums[v] += dy[i][v];
            sums[V + v] += dy[i][v] * x[i][v];
          }
          store(xhats, x[i]);
          store(dzs, dy[i]);
          xhats += THREADS * V, dzs += THREADS * V;
        }
      }
    }
    sum_rows(sums, shared, l.width, l.high);
    if (active && l.row == 0)
      for (int v = 0; v < V; v++) {
        g.doffset[b * g.C + c + v] = sums[v];
        g.dgain[b * g.C + c + v] = sums[V + v];
        for (int i = 0; i < 2; i++) of_g[i] += g.gain[b * g.gain_step + c + v] * sums[i * V + v];
      }
  }
  float mean_g = block_sum<0>(of_g[0]) / count, mean_g_xhat = block_sum<1>(of_g[1]) / count;
  xhats = kept, dzs = kept + slots * THREADS * V;
  for (int c = first + l.column * V; c < first + size; c += l.width * V) {
    Channel in(g, b, c);
    Affine<V> a(g, b, c);
    float* dx = in.dx + in.first + l.row * in.step;
    for (int k = 0; k < rows; k++, dx += l.high * in.step, xhats += THREADS * V, dzs += THREADS * V) {
      float x[V], dz[V];
      load(x, xhats);
      load(dz, dzs);
      for (int v = 0; v < V; v++) x[v] = a.dx(x[v], dz[v], v, mean_g, mean_g_xhat);
      store(dx, x);
    }
  }
}

// How many floats one load may fetch, 4, 2 or 1: on multiples of their bytes lie all arrays, and all their rows.
int widest_load(const GroupNorm& g) {
  size_t bits = 0;
  auto add = [&](const void* p) { bits |= reinterpret_cast<size_t>(p); };
  for (const auto& in : g.inputs) add(in.x), add(in.dx), bits |= in.C * sizeof(float);
  for (const float* p : {g.gain, g.offset, g.dy}) add(p);
  for (const float* p : {g.mean, g.rstd, g.y, g.dgain, g.doffset}) add(p);
  return bits % 16 == 0 ? 4 : bits % 8 == 0 ? 2 : 1;
}

// How many images at a time, in even rounds: all, or as many as half the L2 holds; `arrays` of their size are read twice.
int images_at_a_time(const GroupNorm& g, int rung, int arrays) {
  constexpr long grid = 65535;
  long bytes = arrays * g.N * g.C * long(sizeof(float)), cached = device_attribute(cudaDevAttrL2CacheSize) / 2 / bytes;
  int most = int(rung == 3 ? grid : std::max(1L, std::min(grid, cached))), rounds = (g.B + most - 1) / most;
  return (g.B + rounds - 1) / rounds;
}

// Parts for as many blocks as run at a time, if each thread then has as many rows as it keeps in flight.
Cut cut(const GroupNorm& g, int V, int images, int rows_in_flight) {
  int columns = g.C / V, tiles = (columns + THREADS - 1) / THREADS, width = (columns + tiles - 1) / tiles;
  long wanted = long(FITS) * multiprocessors() / (long(images) * tiles);
  long most = g.N / (THREADS / width * rows_in_flight);
  long parts = std::max(1L, std::min(wanted, most)), rows = (g.N + parts - 1) / parts;
  return {0, int((g.N + rows - 1) / rows), tiles, width, rows};
}

template <int V>
void forward_split(const GroupNorm& g, int images) {
  Cut c = cut(g, V, images, ROWS);
  float* partial = workspace(2L * images * c.parts * g.C);
  for (; c.first_image < g.B; c.first_image += images) {
    int here = std::min(images, g.B - c.first_image);
    dim3 blocks(c.tiles, c.parts, here), groups(g.groups, here);
    LAUNCH(statistics<V>, blocks, THREADS, 0, stream(), g, c, partial);
    LAUNCH(finish, groups, THREADS, 0, stream(), g, c, partial);
    LAUNCH(apply<V>, blocks, THREADS, 0, stream(), g, c);
  }
}

template <int V>
void backward_split(const GroupNorm& g, int images) {
  Cut c = cut(g, V, images, PAIRS);
  long sums = 2L * images * c.parts * g.C;
  float *partial = workspace(sums + 2L * images * g.groups), *means = partial + sums;
  for (; c.first_image < g.B; c.first_image += images) {
    int here = std::min(images, g.B - c.first_image);
    dim3 blocks(c.tiles, c.parts, here), groups(g.groups, here);
    LAUNCH(gradient_sums<V>, blocks, THREADS, 0, stream(), g, c, partial);
    LAUNCH(finish_sums, groups, THREADS, 0, stream(), g, c, partial, means);
    LAUNCH(apply_gradient<V>, blocks, THREADS, 0, stream(), g, c, means);
  }
}

// How many slots a thread needs for its share of a group's stripe.
long slots_of(const GroupNorm& g, int V) {
  int columns = g.C / g.groups / V, width = std::min(columns, THREADS), high = THREADS / width;
  return (g.N + high - 1) / high * ((columns + width - 1) / width);
}

// Whether a block of so much shared memory should take a group. Not where of the 32 bytes that memory moves at a time less
// than half are the group's; nor, as one multiprocessor is slow with it, where it is large and the groups too few for all.
bool on_chip(const GroupNorm& g, size_t bytes) {
  constexpr size_t statics = 1 << 10, large = 64 << 10;
  size_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - statics;
  bool few = (long)g.B * g.groups < multiprocessors();
  return g.C / g.groups >= 4 && bytes <= (few ? std::min(large, most) : most);
}

// False: it was not done.
template <int V>
bool forward_fitting(const GroupNorm& g) {
  size_t bytes = slots_of(g, V) * THREADS * V * sizeof(float);
  if (!on_chip(g, bytes)) return false;
  LAUNCH(forward_on_chip<V>, g.B * g.groups, THREADS, bytes, stream(), g);
  return true;
}
bool forward_fitting(const GroupNorm& g, int V) {
  return V == 4 ? forward_fitting<4>(g) : V == 2 ? forward_fitting<2>(g) : forward_fitting<1>(g);
}

template <int V>
bool backward_fitting(const GroupNorm& g) {
  long slots = slots_of(g, V);
  size_t bytes = (2 * slots + 2) * THREADS * V * sizeof(float);
  if (!on_chip(g, bytes)) return false;
  LAUNCH(backward_on_chip<V>, g.B * g.groups, THREADS, bytes, stream(), g, int(slots));
  return true;
}
bool backward_fitting(const GroupNorm& g, int V) {
  return V == 4 ? backward_fitting<4>(g) : V == 2 ? backward_fitting<2>(g) : backward_fitting<1>(g);
}

}  // namespace

void group_norm_forward(const GroupNorm& g) {
  if (g.B == 0 || g.C == 0) return;
  int rung = g.N ? group_norm.rung() : 2;  // of no positions the mean is 0 / 0
  int V = widest_load(g);
  if (rung == 1) {
    LAUNCH(forward_naive, blocks_for((long)g.B * g.groups, 64), 64, 0, stream(), g);
  } else if (rung == 2) {
    LAUNCH(forward_block, g.B * g.groups, THREADS, 0, stream(), g);
  } else if (rung < 5 || !forward_fitting(g, std::gcd(V, g.C / g.groups))) {
    int images = images_at_a_time(g, rung, 1);
    V == 4 ? forward_split<4>(g, images) : forward_split<1>(g, images);
  }
}

void group_norm_backward(const GroupNorm& g) {
  if (g.B == 0 || g.C == 0) return;
  int rung = g.N ? group_norm.rung() : 2;  // of no positions the sums are 0
  int V = widest_load(g);
  if (rung == 1) {
    LAUNCH(backward_naive, blocks_for((long)g.B * g.groups, 64), 64, 0, stream(), g);
  } else if (rung == 2) {
    LAUNCH(backward_block, g.B * g.groups, THREADS, 0, stream(), g);
  } else if (rung < 5 || !backward_fitting(g, std::gcd(V, g.C / g.groups))) {
    int images = images_at_a_time(g, rung, 2);
    V == 4 ? backward_split<4>(g, images) : backward_split<1>(g, images);
  }
}

}  // namespace minidiff::cuda
