// Linear layers: y = x W + bias + residual, its input gradient (the same with W transposed), and dW = x^T dy.
//
//        W in panels [n/PANEL][k][PANEL]
//        ┌────┬────┬────┐      many rows: W is packed once for all; a task is a block of rows, packed into its thread's
//   x    │    │    │    │                 second-level cache, that meets one panel after the other
//  ┌──┐  └────┴────┴────┘      few rows:  x is packed once; a task is a panel of W, packed as it is needed
//  │  │  ┌────┬────┬────┐
//  └──┘  │    │    │    │ y    in passes over k of at most K_PASS, so that a panel's rows stay in cache
//        └────┴────┴────┘
#include "gemm.h"
#include "kernels.h"
#include "pool.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

constexpr int K_PASS = 1024, FEW_ROWS = 192;
constexpr long ROWS_BYTES = 192 << 10;  // of packed x that a task works on

INLINE int blocks(int K) { return (K + BLOCK - 1) / BLOCK; }

// Rows r0..r1 of x (M, K) as [k/16][row][16], rows counted from `out`; zero behind the last channel.
void pack_rows(const float* x, int K, long r0, long r1, float* out, long channel) {
  for (long r = r0; r < r1; r++, out += BLOCK) {
    const float* p = x + r * K;
    int k = 0;
    for (; k + BLOCK <= K; k += BLOCK)
      for (int v = 0; v < BLOCK; v += VL) store(out + k / BLOCK * channel + v, load(p + k + v));
    if (k < K)
      for (int v = 0; v < BLOCK; v += VL) store(out + k / BLOCK * channel + v, load_first(p + k + v, K - k - v));
  }
}

struct Problem {
  float* y;
  const float *bias, *residual;
  int K, N;
};

// `rows` packed rows from row r0 of y, times one panel, in passes over k.
void rows_by_panel(const Problem& p, const float* a, long channel, long r0, int rows, const float* panel, int n0) {
  int width = panel_width(p.N, n0);
  long offsets[K_PASS / BLOCK];
  float bias[PANEL];
  if (p.bias)
    for (int v = 0; v < PANEL; v += VL) store(bias + v, load_first(p.bias + n0 + v, p.N - n0 - v));
  long at = r0 * p.N + n0;
  for (int k = 0; k < blocks(p.K); k += K_PASS / BLOCK) {
    int count = least(K_PASS / BLOCK, blocks(p.K) - k);
    for (int i = 0; i < count; i++) offsets[i] = (k + i) * channel;
    multiply(a, rows, offsets, count, panel + (long)k * BLOCK * width, width,
             Tile{p.y + at, 0, p.N, p.N - n0, k > 0, k == 0 && p.bias ? bias : nullptr,
                  k == 0 && p.residual ? p.residual + at : nullptr});
  }
}

void pack_panel(const Weights& w, int n0, float* out) {
  int width = panel_width(w.N, n0);
  for (int k = 0; k < w.K; k += BLOCK) pack_block(w, k, n0, width, out + (long)k * width);
}

}  // namespace

void linear(float* y, const float* x, const float* w, const float* bias, const float* residual, long M, int K, int N,
            bool transposed) {
  if (M * N == 0) return;
  Weights weights{w, K, N, transposed ? K : N, transposed};
  Problem p{y, bias, residual, K, N};
  int kb = blocks(K), np = panels(N), T = num_threads();
  long panel = (long)kb * BLOCK * PANEL;
  if (K == 0) {  // nothing to add up: one empty pass sets y to bias + residual
    for (long r = 0; r < M; r++)
      for (int n = 0; n < N; n++) y[r * N + n] = (bias ? bias[n] : 0) + (residual ? residual[r * N + n] : 0);
    return;
  }
  if (M <= FEW_ROWS) {
    long channel = M * BLOCK + BLOCK;
    float* packed = scratch(kb * channel + T * panel);
    float* lanes = packed + kb * channel;
    pack_rows(x, K, 0, M, packed, channel);
    parallel(np, [&](int n, int lane) {
      float* mine = lanes + lane * panel;
      pack_panel(weights, n * PANEL, mine);
      rows_by_panel(p, packed, channel, 0, M, mine, n * PANEL);
    });
    return;
  }
  long per_task = most(ROWS, least(16 * ROWS, ROWS_BYTES / (4L * kb * BLOCK)) / ROWS * ROWS);
  long tasks = (M + per_task - 1) / per_task;
  if (tasks < 4 * T) tasks = least(4 * T, (M + ROWS - 1) / ROWS);
  per_task = (M + tasks - 1) / tasks;
  long channel = per_task * BLOCK + BLOCK;
  float* packed = scratch(np * panel + T * kb * channel);
  float* lanes = packed + np * panel;
  parallel(np, [&](int n, int) { pack_panel(weights, n * PANEL, packed + n * panel); });
  parallel(tasks, [&](int task, int lane) {
    long r0 = M * task / tasks, r1 = M * (task + 1) / tasks;
    float* mine = lanes + lane * kb * channel;
    pack_rows(x, K, r0, r1, mine, channel);
    for (int n = 0; n < np; n++) rows_by_panel(p, mine, channel, r0, r1 - r0, packed + n * panel, n * PANEL);
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
      pack_rows(x + r0 * K, K, q0, q1, a + q0 * BLOCK, channel);
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
