// Linear layers: y = activation(x W + bias + residual), its input gradient (the same with W transposed), and dW = x^T dy.
//
//        W in panels [n/PANEL][k][PANEL]
//        ┌────┬────┬────┐      many rows: W is packed once for all; a task is a block of rows, packed into its thread's
//   x    │    │    │    │                 second-level cache, that meets one panel after the other
//  ┌──┐  └────┴────┴────┘      few rows:  x is packed once; a task is a panel of W, packed as it is needed
//  │  │  ┌────┬────┬────┐
//  └──┘  │    │    │    │ y    in passes over k of at most K_PASS, so that a panel's rows stay in cache
//        └────┴────┴────┘
//
// An activation is applied to a block of y right after its products. GEGLU takes the panels of both halves of the outputs
// together: its products never leave the cache.
#include "activations.h"
#include "gemm.h"
#include "kernels.h"
#include "pool.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

constexpr int K_PASS = 1024, FEW_ROWS = 192;
constexpr long ROWS_BYTES = 192 << 10;  // of packed x that a task works on

INLINE int blocks(int K) { return (K + BLOCK - 1) / BLOCK; }

struct Problem {
  const float *bias, *residual;
  int K, N, activation;
  float* y;
  long row;  // floats from one row of y to the next
};

// `rows` packed rows from row r0 of y, times the panel of columns n0.. < N, in passes over k; bias from b0.
void rows_by_panel(const Problem& p, const float* a, long channel, long r0, int rows, const float* panel, int n0, int N,
                   int b0) {
  int width = panel_width(N, n0);
  long offsets[K_PASS / BLOCK];
  float bias[PANEL];
  if (p.bias)
    for (int v = 0; v < PANEL; v += VL) store(bias + v, load_first(p.bias + b0 + n0 + v, N - n0 - v));
  long at = r0 * p.row + n0;
  for (int k = 0; k == 0 || k < blocks(p.K); k += K_PASS / BLOCK) {  // one pass even with nothing to add up
    int count = least(K_PASS / BLOCK, blocks(p.K) - k);
    for (int i = 0; i < count; i++) offsets[i] = (k + i) * channel;
    multiply(a, rows, offsets, count, panel + (long)k * BLOCK * width, width,
             Tile{p.y + at, 0, p.row, N - n0, k > 0, k == 0 && p.bias ? bias : nullptr,
                  k == 0 && p.residual ? p.residual + at : nullptr});
  }
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

// y = a gelu(g): the block of a comes from the panel n0 of the first half of the outputs, that of g from the second's.
void geglu_block(const Problem& p, const float* packed, long channel, long r0, int rows, const float* of_a,
                 const float* of_g, int n0, float* a, float* g) {
  int half = p.N / 2;
  Problem to{p.bias, nullptr, p.K, p.N, NO_ACTIVATION, a - n0, PANEL};
  rows_by_panel(to, packed, channel, 0, rows, of_a, n0, half, 0);
  to.y = g - n0;
  rows_by_panel(to, packed, channel, 0, rows, of_g, n0, half, half);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < least(PANEL, half - n0); v += VL)
      store_first(p.y + (r0 + r) * p.row + n0 + v, load(a + r * PANEL + v) * activated<GELU_EXACT>(load(g + r * PANEL + v)),
                  half - n0 - v);
}

void pack_panel(const Weights& w, int n0, float* out) {
  int width = panel_width(w.N, n0);
  for (int k = 0; k < w.K; k += BLOCK) pack_block(w, k, n0, width, out + (long)k * width);
}

}  // namespace

void linear(float* y, const float* x, const float* w, const float* bias, const float* residual, long M, int K, int N,
            bool transposed, int activation) {
  bool halves = activation == GEGLU;
  int columns = halves ? N / 2 : N;
  if (M * columns == 0) return;
  Weights weights{w, K, columns, transposed ? K : N, transposed};
  Weights second{w + columns, K, columns, N, false};  // of GEGLU
  Problem p{bias, residual, K, N, activation, y, columns};
  int kb = blocks(K), np = panels(columns), T = num_threads();
  long panel = (long)kb * BLOCK * PANEL, of_panel = panel * (halves ? 2 : 1);
  auto pack = [&](int n, float* out) {
    pack_panel(weights, n * PANEL, out);
    if (halves) pack_panel(second, n * PANEL, out + panel);
  };
  auto block = [&](const float* packed, long channel, long r0, int rows, const float* panels, int n, float* products) {
    if (halves)
      return geglu_block(p, packed, channel, r0, rows, panels, panels + panel, n * PANEL, products, products + rows * PANEL);
    rows_by_panel(p, packed, channel, r0, rows, panels, n * PANEL, N, 0);
    if (activation != NO_ACTIVATION) activate_block(p, r0, rows, n * PANEL);
  };
  if (M <= FEW_ROWS) {
    long channel = M * BLOCK + BLOCK, products = halves ? 2 * M * PANEL : 0;
    float* packed = scratch(kb * channel + T * (of_panel + products));
    float* lanes = packed + kb * channel;
    pack_rows(x, K, K, M, 1, packed, channel);
    parallel(np, [&](int n, int lane) {
      float* mine = lanes + lane * (of_panel + products);
      pack(n, mine);
      block(packed, channel, 0, M, mine, n, mine + of_panel);
    });
    return;
  }
  long per_task = most(ROWS, least(16 * ROWS, ROWS_BYTES / (4L * most(1, kb) * BLOCK)) / ROWS * ROWS);
  long tasks = (M + per_task - 1) / per_task;
  if (tasks < 4 * T) tasks = least(4 * T, (M + ROWS - 1) / ROWS);
  per_task = (M + tasks - 1) / tasks;
  long channel = per_task * BLOCK + BLOCK, products = halves ? 2 * per_task * PANEL : 0;
  float* packed = scratch(np * of_panel + T * (kb * channel + products));
  float* lanes = packed + np * of_panel;
  parallel(np, [&](int n, int) { pack(n, packed + n * of_panel); });
  parallel(tasks, [&](int task, int lane) {
    long r0 = M * task / tasks, r1 = M * (task + 1) / tasks;
    float* mine = lanes + lane * (kb * channel + products);
    pack_rows(x + r0 * K, K, K, r1 - r0, 1, mine, channel);
    for (int n = 0; n < np; n++) block(mine, channel, r0, r1 - r0, packed + n * of_panel, n, mine + kb * channel);
  });
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
