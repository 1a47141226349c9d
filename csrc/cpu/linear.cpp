// Linear layers: y = activation(x W + bias + residual), its input gradient (the same with W transposed), and dW = x^T dy.
//
//        W in panels [n/PANEL][k][PANEL]
//        ┌────┬────┬────┐      small W:  it is packed once for all; a task is a block of rows, packed into its thread's
//   x    │    │    │    │                second-level cache, that meets one panel after the other
//  ┌──┐  └────┴────┴────┘      large W, or few rows:  x is packed once; a task is a few panels of W, packed K_PASS rows at
//  │  │  ┌────┬────┬────┐                a time as they are needed, that meet one row tile after the other
//  └──┘  │    │    │    │ y
//        └────┴────┴────┘      in passes over k, so that what a tile needs stays in cache
//
// An activation is applied to a block of y right after its products. GEGLU takes the panels of both halves of the outputs
// together: its products never leave the cache.
#include "activations.h"
#include "gemm.h"
#include "kernels.h"
#include "pool.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

constexpr int K_PASS = 1024, FEW_K_PASS = 512, FEW_ROWS = 192, FEW_PANELS = 4;
constexpr long ROWS_BYTES = 192 << 10;                     // of packed x that a task works on
constexpr long LARGE_W = 4 << 20, X_IN_CACHE = 8 << 20;  // bytes

INLINE int blocks(int K) { return (K + BLOCK - 1) / BLOCK; }

struct Problem {
  const float *bias, *residual;
  int K, N, activation;
  float* y;
  long row;  // floats from one row of y to the next
};

// `rows` packed rows from row r0 of y, times `count` blocks of 16 rows from block k of the panel of columns n0.. < N; bias
// from b0.
void one_pass(const Problem& p, const float* a, long channel, long r0, int rows, int k, int count, const float* panel,
              int n0, int N, int b0) {
  int width = panel_width(N, n0);
  long offsets[K_PASS / BLOCK];
  for (int i = 0; i < count; i++) offsets[i] = (k + i) * channel;
  float bias[PANEL];
  bool first = k == 0;
  if (p.bias && first)
    for (int v = 0; v < PANEL; v += VL) store(bias + v, load_first(p.bias + b0 + n0 + v, N - n0 - v));
  long at = r0 * p.row + n0;
  multiply(a, rows, offsets, count, panel, width,
           Tile{p.y + at, 0, p.row, N - n0, !first, first && p.bias ? bias : nullptr,
                first && p.residual ? p.residual + at : nullptr});
}

// The same over all of k, one pass after the other; one even if there is nothing to add up.
void rows_by_panel(const Problem& p, const float* a, long channel, long r0, int rows, const float* panel, int n0, int N,
                   int b0) {
  for (int k = 0; k == 0 || k < blocks(p.K); k += K_PASS / BLOCK)
    one_pass(p, a, channel, r0, rows, k, least(K_PASS / BLOCK, blocks(p.K) - k),
             panel + (long)k * BLOCK * panel_width(N, n0), n0, N, b0);
}

template <int KIND>
void activate(float* y, long row, int rows, int columns) {
  for (int r = 0; r < rows; r++, y += row)
    for (int v = 0; v < columns; v += VL) store_first(y + v, activated<KIND>(load_first(y + v, columns - v)), columns - v);
}

// What follows the products of a block, while it is in cache.
void activate_block(const Problem& p, long r0, int rows, int n0) {
  auto f = p.activation == SILU         ? activate<SILU>
           : p.activation == GELU_EXACT ? activate<GELU_EXACT>
           : p.activation == GELU_TANH  ? activate<GELU_TANH>
                                        : activate<GELU_QUICK>;
  f(p.y + r0 * p.row + n0, p.row, rows, least(panel_width(p.N, n0), p.N - n0));
}

// y = a gelu(g) for `rows` rows and the columns of the panel n0; a and g [row][PANEL]
void gate_block(const Problem& p, long r0, int rows, int n0, const float* a, const float* g) {
  int half = p.N / 2;
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < least(PANEL, half - n0); v += VL)
      store_first(p.y + (r0 + r) * p.row + n0 + v, load(a + r * PANEL + v) * activated<GELU_EXACT>(load(g + r * PANEL + v)),
                  half - n0 - v);
}

// Rows k..k + 16 count of the panel n0 as [k][width].
void pack_panel(const Weights& w, int n0, int k, int count, float* out) {
  int width = panel_width(w.N, n0);
  for (int i = 0; i < count; i++) pack_block(w, (k + i) * BLOCK, n0, width, out + (long)i * BLOCK * width);
}

// Both ways to compute y: see the top. `first` and `second` are W, or its halves of outputs for GEGLU.
struct Layer {
  Problem p;
  const float* x;
  long M;
  Weights first, second;
  bool halves;
  int columns, kb, np;
};

void few_rows(const Layer& d) {
  const Problem& p = d.p;
  int T = num_threads(), sides = d.halves ? 2 : 1, pass = FEW_K_PASS / BLOCK;
  int together = most(1, least(FEW_PANELS / sides, d.np / (2 * T)));  // panels of y a task
  int tiles = (d.M + ROWS - 1) / ROWS;
  long channel = d.M * BLOCK + BLOCK, chunk = (long)least(pass, d.kb) * BLOCK * PANEL;
  long products = d.halves ? d.M * PANEL : 0, lane_size = sides * together * (chunk + products);
  float* packed = scratch(d.kb * channel + T * lane_size);
  float* lanes = packed + d.kb * channel;
  int fills = least(d.M, 4 * T);
  parallel(fills, [&](int task, int) {
    long r0 = d.M * task / fills, r1 = d.M * (task + 1) / fills;
    pack_rows(d.x + r0 * p.K, p.K, p.K, r1 - r0, 1, packed + r0 * BLOCK, channel);
  });
  parallel((d.np + together - 1) / together, [&](int task, int lane) {
    int n = task * together, count = least(together, d.np - n);
    float* panels = lanes + lane * lane_size;
    float* buffer = panels + sides * together * chunk;  // of GEGLU: the products of each panel, [row][PANEL]
    for (int k = 0; k == 0 || k < d.kb; k += pass) {
      int depth = least(pass, d.kb - k);
      for (int i = 0; i < sides * count; i++)
        pack_panel(i < count ? d.first : d.second, (n + i % count) * PANEL, k, depth, panels + i * chunk);
      for (int t = 0; t < tiles; t++) {
        long r0 = d.M * t / tiles, r1 = d.M * (t + 1) / tiles;
        for (int i = 0; i < sides * count; i++) {
          int n0 = (n + i % count) * PANEL, half = i < count ? 0 : d.columns;
          Problem to = p;
          if (d.halves) to.y = buffer + i * products - n0, to.row = PANEL;
          one_pass(to, packed + r0 * BLOCK, channel, r0, r1 - r0, k, depth, panels + i * chunk, n0, d.columns, half);
        }
      }
    }
    for (int i = 0; i < count; i++)
      if (d.halves)
        gate_block(p, 0, d.M, (n + i) * PANEL, buffer + i * products, buffer + (count + i) * products);
      else if (p.activation != NO_ACTIVATION)
        activate_block(p, 0, d.M, (n + i) * PANEL);
  });
}

void many_rows(const Layer& d) {
  const Problem& p = d.p;
  int T = num_threads();
  long panel = (long)d.kb * BLOCK * PANEL, of_panel = panel * (d.halves ? 2 : 1);
  long per_task = most(ROWS, least(16 * ROWS, ROWS_BYTES / (4L * most(1, d.kb) * BLOCK)) / ROWS * ROWS);
  long tasks = (d.M + per_task - 1) / per_task;
  if (tasks < 4 * T) tasks = least(4 * T, (d.M + ROWS - 1) / ROWS);
  per_task = (d.M + tasks - 1) / tasks;
  long channel = per_task * BLOCK + BLOCK, products = d.halves ? per_task * PANEL : 0;
  long lane_size = d.kb * channel + 2 * products;
  float* packed = scratch(d.np * of_panel + T * lane_size);
  float* lanes = packed + d.np * of_panel;
  parallel(d.np, [&](int n, int) {
    pack_panel(d.first, n * PANEL, 0, d.kb, packed + n * of_panel);
    if (d.halves) pack_panel(d.second, n * PANEL, 0, d.kb, packed + n * of_panel + panel);
  });
  parallel(tasks, [&](int task, int lane) {
    long r0 = d.M * task / tasks, r1 = d.M * (task + 1) / tasks;
    float *mine = lanes + lane * lane_size, *a = mine + d.kb * channel, *g = a + products;
    pack_rows(d.x + r0 * p.K, p.K, p.K, r1 - r0, 1, mine, channel);
    for (int n = 0; n < d.np; n++) {
      int n0 = n * PANEL;
      const float* w = packed + n * of_panel;
      if (!d.halves) {
        rows_by_panel(p, mine, channel, r0, r1 - r0, w, n0, d.columns, 0);
        if (p.activation != NO_ACTIVATION) activate_block(p, r0, r1 - r0, n0);
        continue;
      }
      Problem to{p.bias, nullptr, p.K, p.N, NO_ACTIVATION, a - n0, PANEL};
      rows_by_panel(to, mine, channel, 0, r1 - r0, w, n0, d.columns, 0);
      to.y = g - n0;
      rows_by_panel(to, mine, channel, 0, r1 - r0, w + panel, n0, d.columns, d.columns);
      gate_block(p, r0, r1 - r0, n0, a, g);
    }
  });
}

}  // namespace

void linear(float* y, const float* x, const float* w, const float* bias, const float* residual, long M, int K, int N,
            bool transposed, int activation) {
  bool halves = activation == GEGLU;
  int columns = halves ? N / 2 : N;
  if (M * columns == 0) return;
  Layer d{{bias, residual, K, N, activation, y, columns},
             x,
             M,
             {w, K, columns, transposed ? K : N, transposed},
             {w + columns, K, columns, N, false},
             halves,
             columns,
             blocks(K),
             panels(columns)};
  bool large_w = 4L * K * N > LARGE_W && 4L * M * K <= X_IN_CACHE;
  M <= FEW_ROWS || large_w ? few_rows(d) : many_rows(d);
}

void linear_weight_gradient(float* dw, const float* x, const float* dy, long M, int K, int N) {
  if (M == 0) {
    memset(dw, 0, sizeof(float) * K * N);
    return;
  }
  constexpr long PASS_BYTES = 4 << 20, BAND = 256;  // rows whose gradient stays in the first-level cache
  int kb = blocks(K), np = panels(N), T = num_threads();
  long rows = most(BAND, PASS_BYTES / (4L * (kb * BLOCK + np * PANEL)) / BAND * BAND);
  rows = least(rows, round_up(M, BAND));
  long channel = rows * BLOCK + BLOCK, panel = rows * PANEL + BLOCK;
  float* a = scratch(kb * channel + np * panel);
  float* d = a + kb * channel;
  int kparts = least(kb, (4 * T + np - 1) / np);
  for (long r0 = 0; r0 < M; r0 += rows) {
    long n_rows = least(rows, M - r0);
    int fills = least(n_rows, 4 * T);
    parallel(fills, [&](int task, int) {
      long q0 = n_rows * task / fills, q1 = n_rows * (task + 1) / fills;
      pack_rows(x + (r0 + q0) * K, K, K, q1 - q0, 1, a + q0 * BLOCK, channel);
      for (long r = q0; r < q1; r++)
        for (int n = 0; n < N; n += VL)
          store(d + n / PANEL * panel + r * PANEL + n % PANEL, load_first(dy + (r0 + r) * N + n, N - n));
    });
    parallel(np * kparts, [&](int task, int) {
      int n0 = task / kparts * PANEL, width = panel_width(N, n0);
      int c0 = kb * (task % kparts) / kparts, c1 = kb * (task % kparts + 1) / kparts;
      for (long q = 0; q < n_rows; q += BAND)
        for (int k = c0; k < c1; k++)
          outer_block(a + k * channel + q * BLOCK, 0, d + n0 / PANEL * panel + q * PANEL, 0, 1, least(BAND, n_rows - q),
                      dw + (long)k * BLOCK * N + n0, N, K - k * BLOCK, width, N - n0, r0 + q > 0);
    });
  }
}

void column_sums(float* out, const float* x, int groups, long rows, int N) {
  constexpr long CHUNK = 1 << 14;  // numbers a task adds up; fixed, so that the threads do not change the sum
  int parts = most(1, rows * N / CHUNK);
  float* partial = scratch((long)groups * parts * N);
  parallel(groups * parts, [&](int task, int) {
    int g = task / parts, q = task % parts;
    float* s = partial + (long)task * N;
    memset(s, 0, sizeof(float) * N);
    for (long r = rows * q / parts; r < rows * (q + 1) / parts; r++) {
      const float* p = x + (g * rows + r) * N;
      int n = 0;
      for (; n + VL <= N; n += VL) store(s + n, load(s + n) + load(p + n));
      for (; n < N; n++) s[n] += p[n];
    }
  });
  for (int g = 0; g < groups; g++)
    for (int n = 0; n < N; n++) {
      float s = 0;
      for (int q = 0; q < parts; q++) s += partial[((long)g * parts + q) * N + n];
      out[(long)g * N + n] = s;
    }
}

}  // namespace minidiff::MINIDIFF_ISA
