// Linear layers: y = activation(x W + bias + residual), and back: dz = dy through the activation, dx = dz W^T,
// dW = x^T dz, db = the sum of dz over rows.
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
// together. The backward walks over bands of rows that stay in the last-level cache: dy is read from memory once, and dz,
// which is twice as wide for GEGLU, never written to it.
#include "activations.h"
#include "gemm.h"
#include "../kernels.h"
#include "pool.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

constexpr int K_PASS = 1024, FEW_K_PASS = 512, FEW_ROWS = 192, FEW_PANELS = 4;
constexpr long ROWS_BYTES = 192 << 10;                   // of packed x that a task works on
constexpr long LARGE_W = 4 << 20, X_IN_CACHE = 8 << 20;  // bytes

// Rows k..k + 16 count of the panel n0 as [k][width].
void pack_panel(const Weights& w, int n0, int k, int count, float* out) {
  int width = panel_width(w.N, n0);
  for (int i = 0; i < count; i++) pack_block(w, (k + i) * BLOCK, n0, width, out + (long)i * BLOCK * width);
}

// Where the sums of a panel go, from some row on.
struct Sums {
  float* to;
  long row;
};

// `rows` packed rows times `count` blocks of 16 rows from block k of a panel whose first `columns` columns count.
void one_pass(const float* a, long channel, int rows, int k, int count, const float* panel, int columns, const Sums& s,
              const float* bias, const float* residual) {
  long offsets[K_PASS / BLOCK];
  for (int i = 0; i < count; i++) offsets[i] = (k + i) * channel;
  float added[PANEL];
  bool first = k == 0;
  if (bias && first)
    for (int v = 0; v < PANEL; v += VL) store(added + v, load_first(bias + v, columns - v));
  multiply(a, rows, offsets, count, panel, panel_width(columns, 0), Tile{s.to, 0, s.row, columns, !first,
           first && bias ? added : nullptr, first ? residual : nullptr});
}

// The same over all kb blocks of k, one pass after the other; one even if there is nothing to add up.
void all_passes(const float* a, long channel, int rows, int kb, const float* panel, int columns, const Sums& s,
                const float* bias, const float* residual) {
  for (int k = 0; k == 0 || k < kb; k += K_PASS / BLOCK)
    one_pass(a, channel, rows, k, least(K_PASS / BLOCK, kb - k), panel + (long)k * BLOCK * panel_width(columns, 0), columns,
             s, bias, residual);
}

// A layer's forward pass as its tasks see it. A side is one half of the outputs of GEGLU; other layers have one side.
struct Layer {
  const Linear& l;
  int sides, columns, kb, np;  // columns of y and of each side, blocks of K, panels of a side
  explicit Layer(const Linear& l)
      : l(l), sides(l.activation == GEGLU ? 2 : 1), columns(l.N / sides), kb(blocks(l.K)), np(panels(columns)) {}
  Weights weights(int side) const {
    return {l.w + side * columns, l.K, columns, l.transposed ? l.K : l.N, l.transposed};
  }
  int left(int n) const { return columns - n * PANEL; }
  const float* bias(int side, int n) const { return l.bias ? l.bias + side * columns + n * PANEL : nullptr; }
  const float* residual(long r0, int n) const { return l.residual ? l.residual + r0 * l.N + n * PANEL : nullptr; }
  // z if it is kept; else y, but for GEGLU a buffer [row][PANEL] of this side.
  Sums sums(int side, long r0, int n, float* buffer) const {
    if (l.z) return {l.z + r0 * l.N + side * columns + n * PANEL, l.N};
    if (sides == 2) return {buffer, PANEL};
    return {l.y + r0 * columns + n * PANEL, columns};
  }
};

template <int KIND>
void activate(const Sums& z, const Sums& g, float* y, long row, int rows, int n) {
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < least(PANEL, n); v += VL) {
      vf a = load_first(z.to + r * z.row + v, n - v);
      if constexpr (KIND == GEGLU)
        a = geglu(a, load_first(g.to + r * g.row + v, n - v));
      else
        a = activated<KIND>(a);
      store_first(y + r * row + v, a, n - v);
    }
}

// What follows the products of a panel, while they are in cache.
void finish(const Layer& d, long r0, int rows, int n, const Sums& z, const Sums& g) {
  if (d.l.activation == NO_ACTIVATION) return;
  auto f = d.l.activation == SILU         ? activate<SILU>
           : d.l.activation == GELU_EXACT ? activate<GELU_EXACT>
           : d.l.activation == GELU_TANH  ? activate<GELU_TANH>
           : d.l.activation == GELU_QUICK ? activate<GELU_QUICK>
                                          : activate<GEGLU>;
  f(z, g, d.l.y + r0 * d.columns + n * PANEL, d.columns, rows, d.left(n));
}

void few_rows(const Layer& d) {
  const Linear& l = d.l;
  int T = num_threads(), pass = FEW_K_PASS / BLOCK, M = (int)l.M;
  int together = most(1, least(FEW_PANELS / d.sides, d.np / (2 * T)));  // panels of y a task
  int tiles = (M + ROWS - 1) / ROWS;
  long channel = (long)M * BLOCK + BLOCK, chunk = (long)least(pass, d.kb) * BLOCK * PANEL;
  long products = d.sides == 2 && !l.z ? (long)M * PANEL : 0, lane_size = d.sides * together * (chunk + products);
  float* packed = scratch(d.kb * channel + T * lane_size);
  float* lanes = packed + d.kb * channel;
  int fills = least(M, 4 * T);
  parallel(fills, [&](int task, int) {
    long r0 = (long)M * task / fills, r1 = (long)M * (task + 1) / fills;
    pack_rows(l.x + r0 * l.K, l.K, l.K, r1 - r0, 1, packed + r0 * BLOCK, channel);
  });
  parallel((d.np + together - 1) / together, [&](int task, int lane) {
    int first = task * together, count = least(together, d.np - first);
    float* chunks = lanes + lane * lane_size;
    float* buffer = chunks + d.sides * together * chunk;
    for (int k = 0; k == 0 || k < d.kb; k += pass) {
      int depth = least(pass, d.kb - k);
      for (int i = 0; i < d.sides * count; i++)
        pack_panel(d.weights(i / count), (first + i % count) * PANEL, k, depth, chunks + i * chunk);
      // What is packed next, here or in the task that likely follows in this lane, is on its way meanwhile.
      bool same = k + pass < d.kb;
      int ahead = (same ? first : first + T * together) * PANEL, k_ahead = (same ? k + pass : 0) * BLOCK;
      for (int t = 0; t < tiles; t++) {
        long r0 = (long)M * t / tiles, r1 = (long)M * (t + 1) / tiles;
        for (int side = 0; side < d.sides; side++)
          prefetch(d.weights(side), k_ahead + pass * BLOCK * t / tiles, k_ahead + pass * BLOCK * (t + 1) / tiles, ahead,
                   ahead + together * PANEL);
        for (int i = 0; i < d.sides * count; i++) {
          int side = i / count, n = first + i % count;
          one_pass(packed + r0 * BLOCK, channel, r1 - r0, k, depth, chunks + i * chunk, d.left(n),
                   d.sums(side, r0, n, buffer + i * products + r0 * PANEL), d.bias(side, n), d.residual(r0, n));
        }
      }
    }
    for (int i = 0; i < count; i++)
      finish(d, 0, M, first + i, d.sums(0, 0, first + i, buffer + i * products),
             d.sums(1, 0, first + i, buffer + (count + i) * products));
  });
}

void many_rows(const Layer& d) {
  const Linear& l = d.l;
  int T = num_threads();
  long panel = (long)d.kb * BLOCK * PANEL, per_task = ROWS_BYTES / (4L * most(1, d.kb) * BLOCK);
  per_task = most(ROWS, least(16 * ROWS, per_task) / ROWS * ROWS);
  long tasks = (l.M + per_task - 1) / per_task;
  if (tasks < 4 * T) tasks = least(4 * T, (l.M + ROWS - 1) / ROWS);
  per_task = (l.M + tasks - 1) / tasks;
  long channel = per_task * BLOCK + BLOCK, products = d.sides == 2 && !l.z ? per_task * PANEL : 0;
  long lane_size = d.kb * channel + 2 * products;
  float* packed = scratch(d.sides * d.np * panel + T * lane_size);
  float* lanes = packed + d.sides * d.np * panel;
  parallel(d.sides * d.np, [&](int i, int) {
    pack_panel(d.weights(i / d.np), i % d.np * PANEL, 0, d.kb, packed + i * panel);
  });
  parallel(tasks, [&](int task, int lane) {
    long r0 = l.M * task / tasks, r1 = l.M * (task + 1) / tasks;
    float *mine = lanes + lane * lane_size, *buffer = mine + d.kb * channel;
    pack_rows(l.x + r0 * l.K, l.K, l.K, r1 - r0, 1, mine, channel);
    for (int n = 0; n < d.np; n++) {
      Sums s[2] = {d.sums(0, r0, n, buffer), d.sums(1, r0, n, buffer + products)};
      for (int side = 0; side < d.sides; side++)
        all_passes(mine, channel, r1 - r0, d.kb, packed + (side * d.np + n) * panel, d.left(n), s[side], d.bias(side, n),
                   d.residual(r0, n));
      finish(d, r0, r1 - r0, n, s[0], s[1]);
    }
  });
}

template <int KIND>
void gradient_row(const float* dy, const float* z, int columns, float* dz) {
  for (int c = 0; c < columns; c += VL) {
    vf d = load_first(dy + c, columns - c), a = load_first(z + c, columns - c);
    if constexpr (KIND == GEGLU) {
      vf da, dg;
      geglu_gradient(d, a, load_first(z + columns + c, columns - c), da, dg);
      store_first(dz + c, da, columns - c);
      store_first(dz + columns + c, dg, columns - c);
    } else {
      store_first(dz + c, d * derivative<KIND>(a), columns - c);
    }
  }
}

}  // namespace

void linear_forward(const Linear& l) {
  Layer d(l);
  if (l.M * d.columns == 0) return;
  bool large_w = 4L * l.K * l.N > LARGE_W && 4L * l.M * l.K <= X_IN_CACHE;
  l.M <= FEW_ROWS || large_w ? few_rows(d) : many_rows(d);
}

void linear_backward(const Linear& l, const float* dy, float* dx, float* dw, float* db) {
  constexpr long BAND_BYTES = 4 << 20, STEP = 256;  // STEP rows of a panel stay in the first-level cache
  constexpr int FILL = 32;                          // rows a task packs and sums; fixed, whatever the threads
  int K = l.K, N = l.N, kb = blocks(K), nb = blocks(N), np = panels(N), kp = panels(K), T = num_threads();
  if (db) memset(db, 0, sizeof(float) * N);
  if (l.M == 0 || N == 0) {
    if (dw) memset(dw, 0, sizeof(float) * K * N);
    if (dx) memset(dx, 0, sizeof(float) * l.M * K);
    return;
  }
  int columns = l.activation == GEGLU ? N / 2 : N;
  auto gradient = l.activation == SILU         ? gradient_row<SILU>
                  : l.activation == GELU_EXACT ? gradient_row<GELU_EXACT>
                  : l.activation == GELU_TANH  ? gradient_row<GELU_TANH>
                  : l.activation == GELU_QUICK ? gradient_row<GELU_QUICK>
                                               : gradient_row<GEGLU>;
  long band = BAND_BYTES / (4L * (kb * BLOCK + np * PANEL + (dx ? nb * BLOCK : 0)));
  band = least(most(STEP, band / STEP * STEP), round_up(l.M, FILL));
  long x_channel = band * BLOCK + BLOCK, z_panel = band * PANEL + BLOCK, z_channel = x_channel;
  long w_panel = dx ? (long)nb * BLOCK * PANEL : 0, row = l.activation != NO_ACTIVATION ? round_up(N, BLOCK) : 0;
  int fills_of_band = (int)((band + FILL - 1) / FILL);
  float* xs = scratch(kb * x_channel + np * z_panel + (dx ? nb * z_channel : 0) + kp * w_panel +
                      (long)fills_of_band * np * PANEL + T * row);
  float* zs = xs + kb * x_channel;                // dz in panels, for dW
  float* zb = zs + np * z_panel;                  // dz in blocks, for dx
  float* wt = zb + (dx ? nb * z_channel : 0);     // W^T in panels
  float* sums = wt + kp * w_panel;                // of dz over the rows of each fill
  float* rows = sums + (long)fills_of_band * np * PANEL;
  Weights transposed{l.w, N, K, N, true};
  if (dx) parallel(kp, [&](int n, int) { pack_panel(transposed, n * PANEL, 0, nb, wt + n * w_panel); });
  int kparts = least(kb, (4 * T + np - 1) / np);
  for (long r0 = 0; r0 < l.M; r0 += band) {
    long many = least(band, l.M - r0);
    int fills = (int)((many + FILL - 1) / FILL);
    parallel(fills, [&](int task, int lane) {
      long q0 = (long)task * FILL, q1 = least(many, q0 + FILL);
      pack_rows(l.x + (r0 + q0) * K, K, K, q1 - q0, 1, xs + q0 * BLOCK, x_channel);
      for (long q = q0; q < q1; q++) {
        const float* dz = dy + (r0 + q) * columns;
        if (row) {
          gradient(dz, l.z + (r0 + q) * N, columns, rows + lane * row);
          dz = rows + lane * row;
        }
        for (int n = 0; n < N; n += VL) {
          vf v = load_first(dz + n, N - n);
          store(zs + n / PANEL * z_panel + q * PANEL + n % PANEL, v);
          if (dx) store(zb + n / BLOCK * z_channel + q * BLOCK + n % BLOCK, v);
        }
        if (dx)  // the last block's channels behind N
          for (int n = (int)round_up(N, VL); n < nb * BLOCK; n += VL)
            store(zb + n / BLOCK * z_channel + q * BLOCK + n % BLOCK, (vf){});
      }
      if (db)
        for (int n = 0; n < N; n += VL) {
          vf s = {};
          for (long q = q0; q < q1; q++) s += load(zs + n / PANEL * z_panel + q * PANEL + n % PANEL);
          store(sums + (long)task * np * PANEL + n, s);
        }
    });
    if (db)
      for (int task = 0; task < fills; task++)
        for (int n = 0; n < N; n += VL)
          store_first(db + n, load_first(db + n, N - n) + load(sums + (long)task * np * PANEL + n), N - n);
    if (dw) parallel(np * kparts, [&](int task, int) {
      int n = task / kparts, n0 = n * PANEL, width = panel_width(N, n0);
      int c0 = kb * (task % kparts) / kparts, c1 = kb * (task % kparts + 1) / kparts;
      for (long q = 0; q < many; q += STEP)
        for (int k = c0; k < c1; k++)
          outer_block(xs + k * x_channel + q * BLOCK, 0, zs + n * z_panel + q * PANEL, 0, 1, least(STEP, many - q),
                      dw + (long)k * BLOCK * N + n0, N, K - k * BLOCK, width, N - n0, r0 + q > 0);
    });
    if (!dx) continue;
    int parts = (int)round_up((many + 4 * ROWS - 1) / (4 * ROWS), T);
    parallel(parts, [&](int task, int) {
      long q0 = many * task / parts, q1 = many * (task + 1) / parts;
      if (q1 > q0)
        for (int n = 0; n < kp; n++)
          all_passes(zb + q0 * BLOCK, z_channel, q1 - q0, nb, wt + n * w_panel, K - n * PANEL,
                     {dx + (r0 + q0) * K + n * PANEL, K}, nullptr, nullptr);
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
