// The two micro-kernels that convolutions, linear layers and attention are made of, and the packed layouts they read.
//
//   product          y[m][n] (+)= sum over k of a[m][k] * b[k][n]        ROWS x PANEL sums live in registers
//
//        b: one panel, [k][PANEL] ──►  ┌────────┬────────┐
//        a: blocks of 16 channels      │ vector │ vector │  one row m of the tile: its a[m][k] is
//        [k/16][position][16]  ───►    ├────────┼────────┤  broadcast and meets both vectors of b
//        so that row m, channel k      │  ...   │  ...   │
//        is at p[16 m + k]             └────────┴────────┘
//
//   outer_product    w[k][n] (+)= sum over positions of a[position][k] * b[position][n]   (weight gradients)
//
// With activations in blocks of 16 channels every displacement is a constant, whatever the number of channels, and
// neighbours are never a power of two apart (which would put them all into the same few sets of the cache).
#pragma once

#include "simd.h"

namespace minidiff::MINIDIFF_ISA {

// Where a micro-tile goes: `groups` apart in memory, rows in a group `row` apart, the first `cols` columns of a panel.
struct Tile {
  float* y;
  long group, row;
  int cols;
  bool add;               // onto what is there
  const float* bias;      // PANEL floats, or none
  const float* residual;  // laid out like y, or none
  int last = BLOCK;       // channels that count in the last block
};

template <int G, int M, int NV>
static void product(const float* a, long group, const long* offsets, int blocks, const float* b, const Tile& t) {
  vf acc[G][M][NV];
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int v = 0; v < NV; v++) acc[g][m][v] = (vf){};
  auto channel = [&](const float* p) __attribute__((always_inline)) {
    vf bs[NV];
    UNROLL for (int v = 0; v < NV; v++) bs[v] = load(b + v * VL);
    b += NV * VL;
    UNROLL for (int g = 0; g < G; g++)
      UNROLL for (int m = 0; m < M; m++) {
        vf s = all(p[g * group + m * BLOCK]);
        UNROLL for (int v = 0; v < NV; v++) acc[g][m][v] += s * bs[v];
      }
  };
  int whole = t.last == BLOCK ? blocks : blocks - 1;
  for (int i = 0; i < whole; i++) {
    const float* p = a + offsets[i];
    _Pragma("GCC unroll 4") for (int j = 0; j < BLOCK; j++) channel(p + j);
  }
  if (whole < blocks) {
    const float* p = a + offsets[whole];
    _Pragma("GCC unroll 4") for (int j = 0; j < t.last; j++) channel(p + j);
  }
  if (!t.bias && !t.residual && t.cols >= NV * VL) {  // the commonest cases, without a question for each vector
    UNROLL for (int g = 0; g < G; g++)
      UNROLL for (int m = 0; m < M; m++) {
        float* y = t.y + g * t.group + m * t.row;
        if (t.add) UNROLL for (int v = 0; v < NV; v++) acc[g][m][v] += load(y + v * VL);
        UNROLL for (int v = 0; v < NV; v++) store(y + v * VL, acc[g][m][v]);
      }
    return;
  }
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int v = 0; v < NV; v++) {
        long at = g * t.group + m * t.row + v * VL;
        int n = t.cols - v * VL;
        vf sums = acc[g][m][v];
        if (t.bias) sums += load(t.bias + v * VL);
        if (t.residual) sums += load_first(t.residual + at, n);
        if (t.add) sums += load_first(t.y + at, n);
        store_first(t.y + at, sums, n);
      }
}

using Product = void (*)(const float*, long, const long*, int, const float*, const Tile&);
template <int NV>
struct Products {
  static constexpr Product rows[15] = {
      nullptr, product<1, 1, NV>, product<1, 2, NV>, product<1, 3, NV>, product<1, 4, NV>, product<1, 5, NV>,
      product<1, 6, NV>,
#if defined(__AVX512F__)
      product<1, 7, NV>, product<1, 8, NV>, product<1, 9, NV>, product<1, 10, NV>, product<1, 11, NV>,
      product<1, 12, NV>, product<1, 13, NV>, product<1, 14, NV>,
#endif
  };
  // Groups of four positions, for images four wide.
  static constexpr Product fours[4] = {nullptr, product<1, 4, NV>,
#if defined(__AVX512F__)
                                       product<2, 4, NV>, product<3, 4, NV>
#endif
  };
};
#if defined(__AVX512F__)
constexpr int MAX_GROUPS = 3;
#else
constexpr int MAX_GROUPS = 1;
#endif

INLINE int blocks(int K) { return (K + BLOCK - 1) / BLOCK; }

// Panels: N output channels in panels of PANEL, the last one half as wide where that is enough.
INLINE int panels(int N) { return (N + PANEL - 1) / PANEL; }
INLINE int panel_width(int N, int n0) { return N - n0 > VL ? PANEL : VL; }
INLINE Product product_of(int width, int rows) {
  return width == PANEL ? Products<2>::rows[rows] : Products<1>::rows[rows];
}

// `rows` consecutive positions of a (from its first block) times one panel.
INLINE void multiply(const float* a, int rows, const long* offsets, int blocks, const float* b, int width, Tile t) {
  int parts = (rows + ROWS - 1) / ROWS;
  for (int q = 0; q < parts; q++) {
    int m0 = (long)rows * q / parts, m1 = (long)rows * (q + 1) / parts;
    Tile here = t;
    here.y += m0 * t.row;
    if (t.residual) here.residual += m0 * t.row;
    product_of(width, m1 - m0)(a + m0 * BLOCK, 0, offsets, blocks, b, here);
  }
}

// w[m][0..cols) (+)= sum over r < R, q < Q of a[r * a_row + 16 q + m] * b[r * b_row + PANEL q ...], m < rows <= WROWS
template <int NV>
static void outer_product(const float* a, long a_row, const float* b, long b_row, int R, int Q, float* w, long ldw,
                          int rows, int cols, bool add) {
  vf acc[WROWS][NV];
  UNROLL for (int m = 0; m < WROWS; m++)
    UNROLL for (int v = 0; v < NV; v++) acc[m][v] = (vf){};
  for (int r = 0; r < R; r++) {
    const float *p = a + r * a_row, *q = b + r * b_row;
    _Pragma("GCC unroll 4") for (int k = 0; k < Q; k++) {
      vf bs[NV];
      UNROLL for (int v = 0; v < NV; v++) bs[v] = load(q + v * VL);
      UNROLL for (int m = 0; m < WROWS; m++) {
        vf s = all(p[m]);
        UNROLL for (int v = 0; v < NV; v++) acc[m][v] += s * bs[v];
      }
      p += BLOCK;
      q += PANEL;
    }
  }
  UNROLL for (int m = 0; m < WROWS; m++)
    if (m < rows)
      UNROLL for (int v = 0; v < NV; v++) {
        float* o = w + m * ldw + v * VL;
        int n = cols - v * VL;
        vf s = acc[m][v];
        if (add) s += load_first(o, n);
        store_first(o, s, n);
      }
}

// A 16-channel block of a against one panel of b: w rows k0.. of K.
INLINE void outer_block(const float* a, long a_row, const float* b, long b_row, int R, int Q, float* w, long ldw,
                        int rows, int width, int cols, bool add) {
  for (int m = 0; m < BLOCK && m < rows; m += WROWS)
    (width == PANEL ? outer_product<2> : outer_product<1>)(a + m, a_row, b, b_row, R, Q, w + m * ldw, ldw, rows - m,
                                                           cols, add);
}

// `rows` rows of x (.., C), `step` floats apart, as a product reads them: [c/16][row][16], times `factor`; zero behind the
// last channel.
INLINE void pack_rows(const float* x, long step, int C, long rows, float factor, float* out, long channel) {
  for (long r = 0; r < rows; r++, x += step, out += BLOCK) {
    int c = 0;
    for (; c + BLOCK <= C; c += BLOCK)
      for (int v = 0; v < BLOCK; v += VL) store(out + c / BLOCK * channel + v, factor * load(x + c + v));
    if (c < C)
      for (int v = 0; v < BLOCK; v += VL) store(out + c / BLOCK * channel + v, factor * load_first(x + c + v, C - c - v));
  }
}

// Transpose of VL vectors of VL floats, in log2(VL) rounds of two-source shuffles.
template <int S>
INLINE void transpose_round(vf* r) {
#if defined(__clang__)
  for (int i = 0; i < VL; i++)
    if (!(i & S))
      for (int j = 0; j < VL; j++)
        if (j & S) {
          float x = r[i][j];
          r[i][j] = r[i + S][j - S];
          r[i + S][j - S] = x;
        }
#else
  vi low, high;
  for (int i = 0; i < VL; i++) {
    low[i] = i & S ? VL + i - S : i;
    high[i] = i & S ? VL + i : i + S;
  }
  UNROLL for (int i = 0; i < VL; i++)
    if (!(i & S)) {
      vf x = r[i], y = r[i + S];
      r[i] = __builtin_shuffle(x, y, low);
      r[i + S] = __builtin_shuffle(x, y, high);
    }
#endif
}
INLINE void transpose(vf* r) {
  if constexpr (VL == 16) transpose_round<8>(r);
  if constexpr (VL >= 8) transpose_round<4>(r);
  transpose_round<2>(r);
  transpose_round<1>(r);
}

// A matrix B (K, N) that is read as B[k][n] = w[k * N_stride + n], or, transposed, w[n * stride + k].
struct Weights {
  const float* w;
  int K, N;
  long stride;      // floats from one stored row to the next
  bool transposed;  // stored rows are n, not k
};

// Asks for rows k0..k1 of columns n0..n1, as far as they exist. They are a whole row of the matrix apart, which the hardware's
// own prefetcher does not follow.
INLINE void prefetch(const Weights& b, int k0, int k1, int n0, int n1) {
  constexpr int LINE = 16;
  k1 = least(k1, b.K), n1 = least(n1, b.N);
  int r0 = b.transposed ? n0 : k0, r1 = b.transposed ? n1 : k1, c0 = b.transposed ? k0 : n0, c1 = b.transposed ? k1 : n1;
  for (int r = r0; r < r1; r++)
    for (int c = c0; c < c1; c += LINE) __builtin_prefetch(b.w + r * b.stride + c, 0, 2);
}

// BLOCK rows from k0 of columns n0..n0+VL; what lies outside K and N is zero.
INLINE void read_block(const Weights& b, int k0, int n0, vf out[BLOCK]) {
  if (!b.transposed) {
    const float* p = b.w + k0 * b.stride + n0;
    if (k0 + BLOCK <= b.K && n0 + VL <= b.N)
      UNROLL for (int j = 0; j < BLOCK; j++) out[j] = load(p + j * b.stride);
    else
      for (int j = 0; j < BLOCK; j++) out[j] = k0 + j < b.K ? load_first(p + j * b.stride, b.N - n0) : (vf){};
    return;
  }
  const float* p = b.w + n0 * b.stride + k0;
  for (int h = 0; h < BLOCK; h += VL) {
    if (k0 + BLOCK <= b.K && n0 + VL <= b.N)
      UNROLL for (int i = 0; i < VL; i++) out[h + i] = load(p + i * b.stride + h);
    else
      for (int i = 0; i < VL; i++) out[h + i] = n0 + i < b.N ? load_first(p + i * b.stride + h, b.K - k0 - h) : (vf){};
    transpose(out + h);
  }
}

// Rows k0..k0+16 of panel n0 as [16][width].
INLINE void pack_block(const Weights& b, int k0, int n0, int width, float* out) {
  for (int v = 0; v < width; v += VL) {
    vf rows[BLOCK];
    read_block(b, k0, n0 + v, rows);
    UNROLL for (int j = 0; j < BLOCK; j++) store(out + j * width + v, rows[j]);
  }
}

}  // namespace minidiff::MINIDIFF_ISA
