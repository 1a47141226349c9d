// Convolution: forward, input gradient (the forward with the kernel flipped) and weight gradient, each
//
//   directly       as a product over taps and channels, without the im2col array: every tap reads the same packed image,
//                  a little further on;
//   by Winograd    F(2x2, 3x3) or F(4x4, 3x3): 16 or 36 products of transformed tiles in place of 36 or 144, that is 2.25
//                  or 4 times fewer multiplications.  Lavin and Gray 2015, arXiv 1509.09308.
//
//   image        tiles of 6x6, 2 apart      V: 36 products,           M             output tiles
//   ┌──────┐     ┌──────┐                   each tiles x channels     ┌────┐
//   │ ┌──┐ │ ──► │B^T d B│ ──►  [36][channels/16][tile][16] @ U ──►  │    │ ──►  A^T M A  (+ bias, shift, residual)
//   │ └──┘ │     └──────┘       U = G g G^T [panel][36][k][PANEL]     └────┘
//   └──────┘
//
// What keeps it fast. A thread's transformed tiles, weights and products stay in its second-level cache: with many tiles
// each thread walks through blocks of tiles and streams the weights; with few tiles (and many weights) the transformed
// input is shared, and each thread owns output panels whose weights it transforms just in time. Distances between the 36
// positions are an odd number of cache lines, so that writing one value to each does not hit the same few sets.
#include "activations.h"
#include "gemm.h"
#include "../kernels.h"
#include "pool.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

alignas(64) const float zeros[MAX_CHANNELS] = {};

// ---- the image as the convolution sees it

struct Pixel {
  const float *a, *b;  // its channels in x and x2
};

// Which row (of h) or column (of w) of x lies at i of the image that is seen; -1 for padding, and between spread pixels.
INLINE int source(const Conv& c, int i, int n) {
  if (i < 0) return -1;
  if (c.spread > 1) return i % c.spread == 0 && i / c.spread < n ? i / c.spread : -1;
  return i < n * c.up ? i / c.up : -1;
}

INLINE Pixel pixel(const Conv& c, int b, int row, int column) {
  if ((row | column) < 0) return {zeros, zeros};
  long at = ((long)b * c.h + row) * c.w + column;
  return {c.x + at * c.C1, c.x2 ? c.x2 + at * c.C2 : zeros};
}

// Channels k..k+VL of a pixel; beyond the last channel zero.
INLINE vf channels(const Conv& c, Pixel p, int k) {
  if (k + VL <= c.C1) return load(p.a + k);
  if (k >= c.C1) return load_first(p.b + (k - c.C1), c.C1 + c.C2 - k);
  vf v = load_first(p.a + k, c.C1 - k);
  for (int i = c.C1 - k; i < VL && k + i < c.C1 + c.C2; i++) v[i] = p.b[k + i - c.C1];
  return v;
}

INLINE int depth(const Conv& c) { return c.C1 + c.C2; }

// The kernel's matrix (K, N) of one tap.
INLINE Weights tap_weights(const Conv& c, int tap) {
  int K = depth(c), taps = c.kh * c.kw;
  if (!c.flipped) return {c.weights + (long)tap * K * c.N, K, c.N, c.N, false};
  return {c.weights + ((long)(taps - 1 - tap) * c.all_N + c.first_N) * K, K, c.N, K, true};
}

// bias + shift of image b for one panel; null if there is neither.
INLINE const float* panel_bias(const Conv& c, int b, int n0, float* buffer) {
  if (!c.bias && !c.shift) return nullptr;
  for (int v = 0; v < PANEL; v += VL) {
    vf s = {};
    if (c.bias) s += load_first(c.bias + n0 + v, c.N - n0 - v);
    if (c.shift) s += load_first(c.shift + (long)b * c.N + n0 + v, c.N - n0 - v);
    store(buffer + v, s);
  }
  return buffer;
}

// ---- direct

// The padded image in blocks of 16 channels, [c/16][b][row][column][16]. With a stride, the columns of a row are sorted
// by their remainder, so that the positions one tap reads for neighbouring outputs are neighbours: [column % s][column / s].
struct Slab {
  int rows, columns;         // of the padded image
  long row, image, channel;  // floats from one to the next
  int images;                // at a time
};

Slab slab_of(const Conv& c, long limit) {
  Slab s;
  s.rows = (c.H - 1) * c.stride + c.kh;
  s.columns = ((c.W - 1) * c.stride + c.kw + c.stride - 1) / c.stride;
  s.row = (long)c.stride * s.columns * BLOCK;
  s.image = s.rows * s.row;
  s.images = least(c.B, most(1, limit / (s.image * blocks(depth(c)))));
  s.channel = s.images * s.image + 3 * BLOCK;
  return s;
}

void fill_slab_row(const Conv& c, const Slab& s, int b, int r, float* out) {
  int row = source(c, r - c.top, c.h);
  for (int j = 0; j < s.columns * c.stride; j++) {
    Pixel p = pixel(c, b, row, source(c, j - c.left, c.w));
    float* o = out + ((long)(j % c.stride) * s.columns + j / c.stride) * BLOCK;
    for (int k = 0; k < depth(c); k += BLOCK, o += s.channel)
      for (int v = 0; v < BLOCK; v += VL) store(o + v, channels(c, p, k + v));
  }
}

// One of `parts` equal parts of the padded rows of nb images from b0.
void fill_slab(const Conv& c, const Slab& s, int b0, int nb, int part, int parts, float* slab) {
  long rows = (long)nb * s.rows;
  for (int r = rows * part / parts; r < rows * (part + 1) / parts; r++)
    fill_slab_row(c, s, b0 + r / s.rows, r % s.rows, slab + r / s.rows * s.image + r % s.rows * s.row);
}

INLINE long tap_offset(const Conv& c, const Slab& s, int tap) {
  int p = tap / c.kw, q = tap % c.kw;
  return p * s.row + ((long)(q % c.stride) * s.columns + q / c.stride) * BLOCK;
}

// Output rows r0..r1 (counted through the images from b0) of one panel.
void direct_rows(const Conv& c, const Slab& s, const float* slab, const float* packed, int b0, int n0, int r0, int r1) {
  int taps = c.kh * c.kw, width = panel_width(c.N, n0), all = blocks(depth(c));
  int per_pass = most(1, 288 / taps);  // blocks of channels: a panel's weights for them stay in the second-level cache
  long offsets[MAX_TAPS > 288 ? MAX_TAPS : 288];
  float bias[PANEL];
  for (int k = 0; k < all; k += per_pass) {
    int count = least(per_pass, all - k);
    for (int i = 0; i < count * taps; i++) offsets[i] = (k + i / taps) * s.channel + tap_offset(c, s, i % taps);
    const float* w = packed + (long)k * taps * BLOCK * width;
    for (int r = r0; r < r1;) {
      int b = r / c.H, h = r % c.H;
      const float* a = slab + b * s.image + (long)h * c.stride * s.row;
      long at = (((long)(b0 + b) * c.H + h) * c.W) * c.N + n0;
      Tile t{c.y + at, (long)c.W * c.N, c.N, c.N - n0, k > 0, nullptr, nullptr};
      if (k == 0) {
        t.bias = panel_bias(c, b0 + b, n0, bias);
        if (c.residual) t.residual = c.residual + at;
      }
      if (c.W == 4) {
        int g = least(MAX_GROUPS, least(r1 - r, c.H - h));
        (width == PANEL ? Products<2>::fours[g] : Products<1>::fours[g])(a, c.stride * s.row, offsets, count * taps, w, t);
        r += g;
      } else {
        multiply(a, c.W, offsets, count * taps, w, width, t);
        r++;
      }
    }
  }
  if (c.silu)
    for (long at = ((long)b0 * c.H + r0) * c.W; at < ((long)b0 * c.H + r1) * c.W; at++)
      for (int v = n0; v < n0 + width; v += VL) {
        vf y = load_first(c.y + at * c.N + v, c.N - v);
        store_first(c.y + at * c.N + v, activated<SILU>(y), c.N - v);
      }
}

void direct(const Conv& c) {
  int taps = c.kh * c.kw, kb = blocks(depth(c)), np = panels(c.N), T = num_threads();
  Slab s = slab_of(c, 4 << 20);
  long panel = (long)taps * kb * BLOCK * PANEL;
  float* packed = scratch(np * panel + kb * s.channel);
  float* slab = packed + np * panel;
  parallel(np * kb, [&](int task, int) {
    int n0 = task / kb * PANEL, k = task % kb, width = panel_width(c.N, n0);
    for (int tap = 0; tap < taps; tap++)
      pack_block(tap_weights(c, tap), k * BLOCK, n0, width,
                 packed + task / kb * panel + ((long)k * taps + tap) * BLOCK * width);
  });
  for (int b0 = 0; b0 < c.B; b0 += s.images) {
    int nb = least(s.images, c.B - b0);
    int fills = least(nb * s.rows, 4 * T);
    parallel(fills, [&](int task, int) { fill_slab(c, s, b0, nb, task, fills, slab); });
    int rows = nb * c.H, parts = least(rows, np % T == 0 ? 1 : (4 * T + np - 1) / np);
    parallel(np * parts, [&](int task, int) {
      int n = task / parts, q = task % parts;
      direct_rows(c, s, slab, packed + n * panel, b0, n * PANEL, (long)rows * q / parts, (long)rows * (q + 1) / parts);
    });
  }
}

// dy in panels, [n/PANEL][position][PANEL]; zero behind the last channel.
void pack_gradient(const float* dy, int N, long p0, long p1, float* out, long panel) {
  for (long p = p0; p < p1; p++)
    for (int n = 0; n < N; n += VL)
      store(out + n / PANEL * panel + p * PANEL + n % PANEL, load_first(dy + p * N + n, N - n));
}

void direct_weight_gradient(const Conv& c, const float* dy, float* dw) {
  int taps = c.kh * c.kw, K = depth(c), kb = blocks(K), np = panels(c.N), T = num_threads();
  Slab s = slab_of(c, 2 << 20);
  long positions = (long)s.images * c.H * c.W, panel = positions * PANEL + 3 * BLOCK;
  float* slab = scratch(kb * s.channel + np * panel);
  float* d = slab + kb * s.channel;
  int band = most(1, 256 / c.W);  // rows whose gradient stays in the first-level cache
  int kparts = least(kb, np % T == 0 && np >= T ? 1 : (2 * T + np - 1) / np);
  for (int b0 = 0; b0 < c.B; b0 += s.images) {
    int nb = least(s.images, c.B - b0);
    int fills = least(nb * s.rows, 4 * T);
    parallel(fills, [&](int task, int) {
      fill_slab(c, s, b0, nb, task, fills, slab);
      long n = (long)nb * c.H * c.W;
      pack_gradient(dy + (long)b0 * c.H * c.W * c.N, c.N, n * task / fills, n * (task + 1) / fills, d, panel);
    });
    parallel(np * kparts, [&](int task, int) {
      int n = task / kparts, n0 = n * PANEL, width = panel_width(c.N, n0);
      int c0 = kb * (task % kparts) / kparts, c1 = kb * (task % kparts + 1) / kparts;
      for (int b = 0; b < nb; b++)
        for (int h = 0; h < c.H; h += band) {
          const float* g = d + n * panel + ((long)b * c.H + h) * c.W * PANEL;
          for (int k = c0; k < c1; k++)
            for (int tap = 0; tap < taps; tap++)
              outer_block(slab + k * s.channel + b * s.image + (long)h * c.stride * s.row + tap_offset(c, s, tap),
                          c.stride * s.row, g, (long)c.W * PANEL, least(band, c.H - h), c.W,
                          dw + ((long)tap * K + k * BLOCK) * c.N + n0, c.N, K - k * BLOCK, width, c.N - n0,
                          b0 + b + h > 0);
        }
    });
  }
}

// ---- Winograd's transforms in one dimension, on vectors of channels that lie S apart in, T apart out

// F(4, 3) with interpolation points 0, +-5/8, +-3/2, infinity: half the rms error of the usual +-1, +-2, all constants
// exact in float32 or rounded once.
struct F4 {
  static constexpr int OUT = 4, IN = 6;
  static constexpr double A_ = 0.625, B_ = 1.5;
  static constexpr float A = A_, B = B_, A2 = A_ * A_, B2 = B_ * B_, A3 = A_ * A_ * A_, B3 = B_ * B_ * B_;
  static constexpr float g0 = 1 / (A_ * A_ * B_ * B_), ga = 1 / (2 * A_ * A_ * (A_ * A_ - B_ * B_)),
                         gb = 1 / (2 * B_ * B_ * (B_ * B_ - A_ * A_));
  template <int S, int T>
  INLINE void input(const vf* d, vf* o) {  // B^T
    vf d1 = d[S], d2 = d[2 * S], d3 = d[3 * S], d4 = d[4 * S];
    o[0] = A2 * B2 * d[0] - (A2 + B2) * d2 + d4;
    vf e = d4 - B2 * d2, f = A * (d3 - B2 * d1);
    o[T] = e + f, o[2 * T] = e - f;
    e = d4 - A2 * d2, f = B * (d3 - A2 * d1);
    o[3 * T] = e + f, o[4 * T] = e - f;
    o[5 * T] = A2 * B2 * d1 - (A2 + B2) * d3 + d[5 * S];
  }
  template <int S, int T>
  INLINE void kernel(const vf* d, vf* o) {  // G
    o[0] = g0 * d[0];
    vf e = ga * (d[0] + A2 * d[2 * S]), f = (ga * A) * d[S];
    o[T] = e + f, o[2 * T] = e - f;
    e = gb * (d[0] + B2 * d[2 * S]), f = (gb * B) * d[S];
    o[3 * T] = e + f, o[4 * T] = e - f;
    o[5 * T] = d[2 * S];
  }
  template <int S, int T>
  INLINE void output(const vf* d, vf* o) {  // A^T
    vf p = d[S] + d[2 * S], m = d[S] - d[2 * S], P = d[3 * S] + d[4 * S], M = d[3 * S] - d[4 * S];
    o[0] = d[0] + p + P;
    o[T] = A * m + B * M;
    o[2 * T] = A2 * p + B2 * P;
    o[3 * T] = A3 * m + B3 * M + d[5 * S];
  }
  template <int S, int T>
  INLINE void output_gradient(const vf* d, vf* o) {  // A
    o[0] = d[0];
    vf e = d[0] + A2 * d[2 * S], f = A * d[S] + A3 * d[3 * S];
    o[T] = e + f, o[2 * T] = e - f;
    e = d[0] + B2 * d[2 * S], f = B * d[S] + B3 * d[3 * S];
    o[3 * T] = e + f, o[4 * T] = e - f;
    o[5 * T] = d[3 * S];
  }
  template <int S, int T>
  INLINE void kernel_gradient(const vf* d, vf* o) {  // G^T
    vf p = ga * (d[S] + d[2 * S]), m = (ga * A) * (d[S] - d[2 * S]);
    vf P = gb * (d[3 * S] + d[4 * S]), M = (gb * B) * (d[3 * S] - d[4 * S]);
    o[0] = g0 * d[0] + p + P;
    o[T] = m + M;
    o[2 * T] = A2 * p + B2 * P + d[5 * S];
  }
};

// F(2, 3) with points 0, +-1, infinity.
struct F2 {
  static constexpr int OUT = 2, IN = 4;
  template <int S, int T>
  INLINE void input(const vf* d, vf* o) {
    o[0] = d[0] - d[2 * S], o[T] = d[S] + d[2 * S], o[2 * T] = d[2 * S] - d[S], o[3 * T] = d[S] - d[3 * S];
  }
  template <int S, int T>
  INLINE void kernel(const vf* d, vf* o) {
    vf e = 0.5f * (d[0] + d[2 * S]), f = 0.5f * d[S];
    o[0] = d[0], o[T] = e + f, o[2 * T] = e - f, o[3 * T] = d[2 * S];
  }
  template <int S, int T>
  INLINE void output(const vf* d, vf* o) {
    o[0] = d[0] + d[S] + d[2 * S], o[T] = d[S] - d[2 * S] - d[3 * S];
  }
  template <int S, int T>
  INLINE void output_gradient(const vf* d, vf* o) {
    o[0] = d[0], o[T] = d[0] + d[S], o[2 * T] = d[0] - d[S], o[3 * T] = -d[S];
  }
  template <int S, int T>
  INLINE void kernel_gradient(const vf* d, vf* o) {
    vf p = 0.5f * (d[S] + d[2 * S]), m = 0.5f * (d[S] - d[2 * S]);
    o[0] = d[0] + p, o[T] = m, o[2 * T] = p + d[3 * S];
  }
};

// ---- Winograd: tiles

template <class F>
struct Tiling {
  int down, across, count;  // tiles in an image's height and width, and in all images
  explicit Tiling(const Conv& c)
      : down((c.H + F::OUT - 1) / F::OUT), across((c.W + F::OUT - 1) / F::OUT), count(c.B * down * across) {}
  void place(int t, int& b, int& i, int& j) const {  // first output pixel of tile t
    b = t / (down * across), i = t % (down * across) / across * F::OUT, j = t % across * F::OUT;
  }
};

// A stride of an odd number of cache lines, at least n floats.
INLINE long odd_lines(long n) {
  n = round_up(n, BLOCK);
  return n / BLOCK % 2 ? n : n + BLOCK;
}

// V[position][k/16][tile][16] = B^T d B of tiles t0..t1, counted from `out`
template <class F>
void input_tiles(const Conv& c, int t0, int t1, float* out, long position, long channel) {
  constexpr int N = F::IN;
  Tiling<F> g(c);
  for (int t = t0; t < t1; t++, out += BLOCK) {
    int b, i0, j0;
    g.place(t, b, i0, j0);
    Pixel p[N * N];
    int columns[N];
    for (int j = 0; j < N; j++) columns[j] = source(c, j0 + j - c.left, c.w);
    for (int i = 0; i < N; i++) {
      int row = source(c, i0 + i - c.top, c.h);
      for (int j = 0; j < N; j++) p[i * N + j] = pixel(c, b, row, columns[j]);
    }
    for (int k = 0; k < depth(c); k += VL) {
      float* o = out + k / BLOCK * channel + k % BLOCK;
      vf d[N * N], e[N * N];
      UNROLL for (int j = 0; j < N; j++) {
        vf q[N];
        if (k + VL <= c.C1)
          UNROLL for (int i = 0; i < N; i++) q[i] = load(p[i * N + j].a + k);
        else
          UNROLL for (int i = 0; i < N; i++) q[i] = channels(c, p[i * N + j], k);
        F::template input<1, N>(q, e + j);
      }
      UNROLL for (int i = 0; i < N; i++) {
        F::template input<1, 1>(e + i * N, d);
        UNROLL for (int j = 0; j < N; j++) store(o + (i * N + j) * position, d[j]);
      }
    }
    if (int tail = depth(c) % BLOCK; tail)  // the rest of the last block must not hold old numbers: NaN times 0 is NaN
      for (int k = (int)round_up(tail, VL); k < BLOCK; k += VL)
        for (int i = 0; i < N * N; i++) store(out + depth(c) / BLOCK * channel + k + i * position, (vf){});
  }
}

// D[position][n/PANEL][tile][PANEL] = A dy A^T
template <class F>
void gradient_tiles(const Conv& c, const float* dy, int t0, int t1, float* out, long position, long panel) {
  constexpr int N = F::IN, M = F::OUT;
  Tiling<F> g(c);
  for (int t = t0; t < t1; t++, out += PANEL) {
    int b, i0, j0;
    g.place(t, b, i0, j0);
    const float* p[M * M];
    for (int i = 0; i < M; i++)
      for (int j = 0; j < M; j++)
        p[i * M + j] = i0 + i < c.H && j0 + j < c.W ? dy + (((long)b * c.H + i0 + i) * c.W + j0 + j) * c.N : zeros;
    for (int n = 0; n < c.N; n += VL) {
      float* o = out + n / PANEL * panel + n % PANEL;
      vf e[N * M], d[N];
      UNROLL for (int j = 0; j < M; j++) {
        vf q[M];
        UNROLL for (int i = 0; i < M; i++) q[i] = load_first(p[i * M + j] + n, c.N - n);
        F::template output_gradient<1, M>(q, e + j);
      }
      UNROLL for (int i = 0; i < N; i++) {
        F::template output_gradient<1, 1>(e + i * M, d);
        UNROLL for (int j = 0; j < N; j++) store(o + (i * N + j) * position, d[j]);
      }
    }
  }
}

// U[position][k - k0][width] = G g G^T of panel n0, rows k0..k1
template <class F>
void kernel_panel(const Conv& c, int k0, int k1, int n0, float* out, long position) {
  constexpr int N = F::IN;
  int width = panel_width(c.N, n0);
  for (int k = k0; k < k1; k += BLOCK) {
    for (int v = 0; v < width; v += VL) {
      vf taps[9][BLOCK];
      for (int tap = 0; tap < 9; tap++) {
        Weights w = tap_weights(c, tap);
        if (v == 0) prefetch(w, k + BLOCK, k + 2 * BLOCK, n0, n0 + width);
        read_block(w, k, n0 + v, taps[tap]);
      }
      for (int j = 0; j < BLOCK; j++) {
        float* o = out + (long)(k - k0 + j) * width + v;
        vf e[N * 3], d[N];
        UNROLL for (int s = 0; s < 3; s++) F::template kernel<3 * BLOCK, 3>(&taps[s][j], e + s);
        UNROLL for (int i = 0; i < N; i++) {
          F::template kernel<1, 1>(e + i * 3, d);
          UNROLL for (int s = 0; s < N; s++) store(o + (i * N + s) * position, d[s]);
        }
      }
    }
  }
}

// y = A^T M A of tiles t0..t1 for panel n0, + bias + shift + residual
template <class F>
void output_tiles(const Conv& c, const float* products, long position, int t0, int t1, int n0) {
  constexpr int N = F::IN, M = F::OUT;
  int width = panel_width(c.N, n0);
  Tiling<F> g(c);
  for (int t = t0; t < t1; t++) {
    int b, i0, j0;
    g.place(t, b, i0, j0);
    long at = (((long)b * c.H + i0) * c.W + j0) * c.N + n0;
    int rows = least(M, c.H - i0), columns = least(M, c.W - j0);
    for (int v = 0; v < width; v += VL) {
      int n = c.N - n0 - v;
      const float* p = products + (long)(t - t0) * width + v;
      vf e[N * M], d[M], added = {};
      if (c.bias) added += load_first(c.bias + n0 + v, n);
      if (c.shift) added += load_first(c.shift + (long)b * c.N + n0 + v, n);
      UNROLL for (int j = 0; j < N; j++) {
        vf q[N];
        UNROLL for (int i = 0; i < N; i++) q[i] = load(p + (i * N + j) * position);
        F::template output<1, N>(q, e + j);
      }
      float* y = c.y + at + v;
      const float* residual = c.residual ? c.residual + at + v : nullptr;
      long row = (long)c.W * c.N;
      if (rows == M && columns == M && n >= VL && !c.silu) {  // the commonest case, without a question for each pixel
        UNROLL for (int i = 0; i < M; i++) {
          F::template output<1, 1>(e + i * N, d);
          if (residual)
            UNROLL for (int j = 0; j < M; j++) d[j] += load(residual + i * row + j * c.N);
          UNROLL for (int j = 0; j < M; j++) store(y + i * row + j * c.N, d[j] + added);
        }
        continue;
      }
      for (int i = 0; i < rows; i++) {
        F::template output<1, 1>(e + i * N, d);
        for (int j = 0; j < columns; j++) {
          vf sums = d[j] + added;
          if (residual) sums += load_first(residual + i * row + j * c.N, n);
          store_first(y + i * row + j * c.N, c.silu ? activated<SILU>(sums) : sums, n);
        }
      }
    }
  }
}

// How many blocks of channels are summed in registers before they are added to what is in memory. A sum's rounding grows with
// its length, and the output transform multiplies it: one sum over 64 channels has an error a half larger than two over 32.
// With many channels a direct convolution's error is as large, and longer sums are quicker.
INLINE int chain(const Conv& c) { return depth(c) <= 48 ? 3 : depth(c) <= 128 ? 2 : 4; }

// All products of one panel: out[position][tile][width] (+)= V[position][k][tile] U[position][k][width]. before(p) is called
// before those of position p.
template <class F, class Before>
void tile_products(const float* V, long v_position, const long* offsets, int kblocks, int step, const float* U,
                   long u_position, int tiles, int width, float* out, long position, bool add, const Before& before) {
  for (int p = 0; p < F::IN * F::IN; p++) {
    before(p);
    for (int k = 0; k < kblocks; k += step)
      multiply(V + p * v_position, tiles, offsets + k, least(step, kblocks - k), U + p * u_position + (long)k * BLOCK * width,
               width, Tile{out + p * position, 0, width, width, add || k > 0, nullptr, nullptr});
  }
}

INLINE long kernel_position(int K) { return round_up(K, BLOCK) * PANEL + BLOCK; }

constexpr int FEW_TILES = 200, TILE_GROUP = 128, KERNEL_ROWS = 64;  // measured: see docs/performance.md

// Few tiles, many weights: the transformed input is shared; a task is a panel and a group of tiles, and transforms the
// weights of KERNEL_ROWS channels at a time into a buffer that never leaves its thread's second-level cache.
template <class F>
void winograd_few(const Conv& c) {
  constexpr int P = F::IN * F::IN;
  int K = depth(c), kb = blocks(K), np = panels(c.N), T = num_threads(), tiles = Tiling<F>(c).count;
  int groups = (tiles + TILE_GROUP - 1) / TILE_GROUP, per_group = (tiles + groups - 1) / groups;
  int rows = least(round_up(K, BLOCK), KERNEL_ROWS);
  long channel = (long)tiles * BLOCK, v_position = channel * kb + 3 * BLOCK, position = odd_lines((long)per_group * PANEL);
  long u_position = kernel_position(c.prepared ? K : rows), u_size = c.prepared ? 0 : P * u_position;
  float* V = scratch(P * v_position + T * (P * position + u_size));
  float* lanes = V + P * v_position;
  int fills = least(tiles, 4 * T);
  parallel(fills, [&](int task, int) {
    int t0 = (long)tiles * task / fills, t1 = (long)tiles * (task + 1) / fills;
    input_tiles<F>(c, t0, t1, V + (long)t0 * BLOCK, v_position, channel);
  });
  parallel(np * groups, [&](int task, int lane) {
    int n = task / groups, n0 = n * PANEL, width = panel_width(c.N, n0);
    int t0 = (long)tiles * (task % groups) / groups, t1 = (long)tiles * (task % groups + 1) / groups;
    float *products = lanes + lane * (P * position + u_size), *buffer = products + P * position;
    long offsets[KERNEL_ROWS / BLOCK];
    for (int k = 0; k < K; k += rows) {
      int k1 = least(round_up(K, BLOCK), k + rows);
      for (int i = 0; i < (k1 - k) / BLOCK; i++) offsets[i] = (k / BLOCK + i) * channel;
      const float* U = buffer;
      if (c.prepared)
        U = c.prepared + n * P * u_position + (long)k * width;
      else
        kernel_panel<F>(c, k, k1, n0, buffer, u_position);
      // What is transformed next, here or in the task that likely follows in this lane, is on its way meanwhile, a little
      // with each position: asked for at once it would be waited for.
      bool same = k1 < K;
      int k_ahead = same ? k1 : 0, n_ahead = same ? n0 : (task + T) / groups * PANEL, parts = 9 * rows / BLOCK;
      tile_products<F>(V + t0 * BLOCK, v_position, offsets, (k1 - k) / BLOCK, chain(c), U, u_position, t1 - t0, width,
                       products, position, k > 0, [&](int p) {
                         for (int i = parts * p / P; !c.prepared && i < parts * (p + 1) / P; i++) {
                           int from = k_ahead + i % (rows / BLOCK) * BLOCK;
                           prefetch(tap_weights(c, i / (rows / BLOCK)), from, from + BLOCK, n_ahead, n_ahead + PANEL);
                         }
                       });
    }
    output_tiles<F>(c, products, position, t0, t1, n0);
  });
}

// All panels' transformed weights, [panel][position][k][width].
template <class F>
void transform_kernels(const Conv& c, float* U) {
  int kb = blocks(depth(c));
  parallel(panels(c.N) * kb, [&](int task, int) {
    int n = task / kb, k = task % kb * BLOCK;
    long position = kernel_position(depth(c));
    kernel_panel<F>(c, k, k + BLOCK, n * PANEL,
                    U + n * F::IN * F::IN * position + (long)k * panel_width(c.N, n * PANEL), position);
  });
}

// Many tiles: the weights are transformed once, and each thread walks through blocks of tiles whose transformed input,
// about a quarter of its second-level cache, meets one panel after the other.
template <class F>
void winograd_many(const Conv& c) {
  constexpr int P = F::IN * F::IN;
  constexpr long V_BYTES = 192 << 10;
  int K = depth(c), kb = blocks(K), np = panels(c.N), T = num_threads(), tiles = Tiling<F>(c).count;
  int per_block = least(4 * ROWS, most(ROWS, V_BYTES / ((long)P * K * 4) / ROWS * ROWS));
  int count = (int)round_up((tiles + per_block - 1) / per_block, T);
  per_block = (tiles + count - 1) / count;
  long channel = (long)per_block * BLOCK, v_position = channel * kb + 3 * BLOCK;
  long position = odd_lines((long)per_block * PANEL), u_position = kernel_position(K);
  long u_size = c.prepared ? 0 : np * P * u_position, lane_size = P * (position + v_position);
  float* own = scratch(u_size + T * lane_size);
  const float* U = c.prepared ? c.prepared : own;
  if (!c.prepared) transform_kernels<F>(c, own);
  parallel(count, [&](int task, int lane) {
    long offsets[MAX_CHANNELS / BLOCK];
    for (int i = 0; i < kb; i++) offsets[i] = i * channel;
    float *products = own + u_size + lane * lane_size, *V = products + P * position;
    int t0 = (long)tiles * task / count, t1 = (long)tiles * (task + 1) / count;
    if (t0 == t1) return;
    input_tiles<F>(c, t0, t1, V, v_position, channel);
    for (int n = 0; n < np; n++) {
      int width = panel_width(c.N, n * PANEL);
      tile_products<F>(V, v_position, offsets, kb, chain(c), U + n * P * u_position, u_position, t1 - t0, width, products,
                       position, false, [](int) {});
      output_tiles<F>(c, products, position, t0, t1, n * PANEL);
    }
  });
}

// dU = V^T D over all tiles, dw = G^T dU G.
//
// A pass takes as many tiles as let V and D stay in the last-level cache. With one pass a task is a panel and 64 input
// channels: its 36 products stay in the second-level cache until they are transformed. With more, dU is kept for all.
template <class F>
void winograd_weight_gradient(const Conv& c, const float* dy, float* dw) {
  constexpr int N = F::IN, P = N * N;
  constexpr long PASS_BYTES = 6 << 20, DU_LIMIT = 16 << 20;
  int K = depth(c), kb = blocks(K), np = panels(c.N), T = num_threads(), tiles = Tiling<F>(c).count;
  long per_pass = most(32, PASS_BYTES / ((long)P * (K + c.N) * 4));
  int passes = (int)((tiles + per_pass - 1) / per_pass);
  if ((long)P * K * c.N * 4 > DU_LIMIT) passes = least(passes, most(1, tiles / 256));  // dU goes to memory in each pass
  per_pass = (tiles + passes - 1) / passes;
  long channel = per_pass * BLOCK, v_position = channel * kb + 3 * BLOCK;
  long panel = per_pass * PANEL, d_position = panel * np + 3 * BLOCK;
  int kparts = passes == 1 ? (K + 63) / 64 : np % T == 0 ? 1 : least(2 * T, kb);
  long u_position = kernel_position(passes == 1 ? (kb + kparts - 1) / kparts * BLOCK : K);
  float* V = scratch(P * (v_position + d_position) + P * u_position * (passes > 1 ? np : T));
  float *D = V + P * v_position, *dU = D + P * d_position;
  for (int pass = 0; pass < passes; pass++) {
    int first = (long)tiles * pass / passes, n_tiles = (int)((long)tiles * (pass + 1) / passes) - first;
    int fills = least(n_tiles, 4 * T);
    parallel(fills, [&](int task, int) {
      int t0 = (long)n_tiles * task / fills, t1 = (long)n_tiles * (task + 1) / fills;
      input_tiles<F>(c, first + t0, first + t1, V + (long)t0 * BLOCK, v_position, channel);
      gradient_tiles<F>(c, dy, first + t0, first + t1, D + (long)t0 * PANEL, d_position, panel);
    });
    parallel(np * kparts, [&](int task, int lane) {
      int n = task / kparts, n0 = n * PANEL, width = panel_width(c.N, n0);
      int c0 = kb * (task % kparts) / kparts, c1 = kb * (task % kparts + 1) / kparts;
      float* u = passes > 1 ? dU + n * P * u_position + (long)c0 * BLOCK * width : dU + lane * P * u_position;
      for (int p = 0; p < P; p++)
        for (int k = c0; k < c1; k++)
          outer_block(V + p * v_position + k * channel, 0, D + p * d_position + n * panel, 0, 1, n_tiles,
                      u + p * u_position + (long)(k - c0) * BLOCK * width, width, BLOCK, width, width, pass > 0);
      if (pass < passes - 1) return;
      for (int k = c0 * BLOCK; k < least(K, c1 * BLOCK); k++)
        for (int v = 0; v < width; v += VL) {
          const float* from = u + (long)(k - c0 * BLOCK) * width + v;
          vf e[3 * N], d[3];
          UNROLL for (int j = 0; j < N; j++) {
            vf q[N];
            UNROLL for (int i = 0; i < N; i++) q[i] = load(from + (i * N + j) * u_position);
            F::template kernel_gradient<1, N>(q, e + j);
          }
          for (int i = 0; i < 3; i++) {
            F::template kernel_gradient<1, 1>(e + i * N, d);
            for (int j = 0; j < 3; j++)
              store_first(dw + ((long)(i * 3 + j) * K + k) * c.N + n0 + v, d[j], c.N - n0 - v);
          }
        }
    });
  }
}

// ---- the choice

// Multiplications decide, with what the transforms cost added: they pay only where channels are many.
int choose(const Conv& c) {
  if (c.algorithm != CHOOSE) return c.algorithm;
  if (c.kh != 3 || c.kw != 3 || c.stride != 1 || depth(c) < 24 || c.N < 24) return DIRECT;
  auto cost = [&](int out, double transform) {
    double tiles = (double)((c.H + out - 1) / out) * ((c.W + out - 1) / out);
    return tiles * (out + 2) * (out + 2) * (1 + transform * (1.0 / depth(c) + 1.0 / c.N));
  };
  double direct = 9.0 * c.H * c.W, two = cost(2, 16), four = cost(4, 16);
  if (four <= two && four < direct) return WINOGRAD4;
  return two < direct ? WINOGRAD2 : DIRECT;
}

template <class F>
void winograd(const Conv& c) {
  Tiling<F>(c).count <= FEW_TILES ? winograd_few<F>(c) : winograd_many<F>(c);
}

}  // namespace

// A convolution of no channels: what is added to it is all there is.
static void only_added(const Conv& c) {
  for (long p = 0; p < (long)c.B * c.H * c.W; p++)
    for (int n = 0; n < c.N; n += VL) {
      vf y = {};
      if (c.bias) y += load_first(c.bias + n, c.N - n);
      if (c.shift) y += load_first(c.shift + p / ((long)c.H * c.W) * c.N + n, c.N - n);
      if (c.residual) y += load_first(c.residual + p * c.N + n, c.N - n);
      store_first(c.y + p * c.N + n, c.silu ? activated<SILU>(y) : y, c.N - n);
    }
}

void conv2d(const Conv& c) {
  if ((long)c.B * c.H * c.W * c.N == 0) return;
  if (depth(c) == 0 || c.h == 0 || c.w == 0) return only_added(c);
  int a = choose(c);
  a == WINOGRAD4 ? winograd<F4>(c) : a == WINOGRAD2 ? winograd<F2>(c) : direct(c);
}

void conv2d_weight_gradient(const Conv& c, const float* dy, float* dw) {
  int a = choose(c);
  if ((long)c.B * c.H * c.W * c.N * depth(c) * c.h * c.w == 0)
    memset(dw, 0, sizeof(float) * c.kh * c.kw * depth(c) * c.N);
  else if (a == DIRECT)
    direct_weight_gradient(c, dy, dw);
  else
    a == WINOGRAD4 ? winograd_weight_gradient<F4>(c, dy, dw) : winograd_weight_gradient<F2>(c, dy, dw);
}

void columns(const Conv& c, float* out) {
  int C = c.C1;
  parallel(c.B * c.H, [&](int row, int) {
    int b = row / c.H, i0 = row % c.H * c.stride - c.top;
    float* o = out + (long)row * c.W * c.kh * c.kw * C;
    for (int j = 0; j < c.W; j++)
      for (int p = 0; p < c.kh; p++)
        for (int q = 0; q < c.kw; q++, o += C) {
          const float* from = pixel(c, b, source(c, i0 + p, c.h), source(c, j * c.stride + q - c.left, c.w)).a;
          for (int k = 0; k < C; k++) o[k] = from[k];
        }
  });
}

void pool_sum(float* y, const float* x, int B, int h, int w, int C, int factor) {
  parallel(B * h, [&](int row, int) {
    for (int j = 0; j < w; j++)
      for (int c = 0; c < C; c += VL) {
        vf s = {};
        for (int p = 0; p < factor; p++)
          for (int q = 0; q < factor; q++)
            s += load_first(x + (((long)row * factor + p) * w * factor + j * factor + q) * C + c, C - c);
        store_first(y + ((long)row * w + j) * C + c, s, C - c);
      }
  });
}

long conv2d_prepared_size(const Conv& c) {
  int a = choose(c);
  return a == DIRECT ? 0 : (a == WINOGRAD4 ? 36 : 16) * panels(c.N) * kernel_position(depth(c));
}

void conv2d_prepare(const Conv& c, float* out) {
  choose(c) == WINOGRAD4 ? transform_kernels<F4>(c, out) : transform_kernels<F2>(c, out);
}

}  // namespace minidiff::MINIDIFF_ISA
