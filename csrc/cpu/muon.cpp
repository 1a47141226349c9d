// Muon's orthogonalisation of many small matrices: a task is a matrix, and everything between reading g and writing x
// stays in its thread's second-level cache.
//
//   A = g^T g / |g|^2,   five times:  P = a + b A + c A^2,  S = P S,  A = P A P,   then  x = g S / |g|
//
//   g (m x n) in bands of BAND rows             n x n, in the second-level cache
//   ┌───────┐                                   ┌───┐  ┌───┐  ┌───┐
//   │ band  │ ──► A += band^T band  ──────────► │ A │  │ P │  │ S │  five rounds of products of n x n matrices
//   ├───────┤                                   └───┘  └───┘  └───┘
//   │ band  │ ──► x = band S / |g|  ◄───────────────────────┘
//   └───────┘
//
// The equations stand in minidiff/optim.py, `orthogonalised`. All matrices but g are n x n, symmetric, n the shorter side of
// g; where that is its rows, A = g g^T / |g|^2 and x = S g / |g|.
#include "gemm.h"
#include "../kernels.h"
#include "pool.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

constexpr int BAND = 256;

// A (n x n, rows `ld` apart) = g g^T
void squares_of_rows(const Orthogonal& o, float* A, int ld, float* packed) {
  int n = o.n;
  long channel = (long)n * BLOCK + BLOCK, offsets[BAND / BLOCK];
  float* panel = packed + BAND / BLOCK * channel;
  for (int k = 0; k < BAND / BLOCK; k++) offsets[k] = k * channel;
  for (long c0 = 0; c0 < o.rows; c0 += BAND) {
    int columns = least(BAND, o.rows - c0), kb = (columns + BLOCK - 1) / BLOCK;
    pack_rows(o.g + c0, o.rows, columns, n, 1, packed, channel);
    Weights w{o.g + c0, columns, n, o.rows, true};
    for (int n0 = 0; n0 < n; n0 += PANEL) {
      int width = panel_width(n, n0);
      for (int k = 0; k < kb; k++) pack_block(w, k * BLOCK, n0, width, panel + (long)k * BLOCK * width);
      multiply(packed, n, offsets, kb, panel, width, Tile{A + n0, 0, ld, n - n0, c0 > 0, nullptr, nullptr});
    }
  }
}

// x = S g
void times_columns(const Orthogonal& o, const float* S, int ld, float* packed) {
  int n = o.n, kb = ld / BLOCK;
  long channel = (long)n * BLOCK + BLOCK, offsets[MAX_CHANNELS / BLOCK];
  float* panel = packed + kb * channel;
  for (int k = 0; k < kb; k++) offsets[k] = k * channel;
  pack_rows(S, ld, n, n, 1, packed, channel);
  Weights w{o.g, n, (int)o.rows, o.rows, false};
  for (int c0 = 0; c0 < o.rows; c0 += PANEL) {
    int width = panel_width(o.rows, c0);
    for (int k = 0; k < kb; k++) pack_block(w, k * BLOCK, c0, width, panel + (long)k * BLOCK * width);
    multiply(packed, n, offsets, kb, panel, width, Tile{o.x + c0, 0, o.rows, (int)o.rows - c0, false, nullptr, nullptr});
  }
}

// y (n x n, rows `ld` apart) = a b, both symmetric and stored like y; packed: scratch for both.
void square_product(float* y, const float* a, const float* b, int n, int ld, float* packed) {
  int kb = (n + BLOCK - 1) / BLOCK;
  long channel = (long)n * BLOCK + BLOCK;
  float* panel = packed + kb * channel;
  long offsets[MAX_CHANNELS / BLOCK];
  for (int k = 0; k < kb; k++) offsets[k] = k * channel;
  pack_rows(a, ld, n, n, 1, packed, channel);
  Weights w{b, n, n, ld, false};
  for (int n0 = 0; n0 < n; n0 += PANEL) {
    int width = panel_width(n, n0);
    for (int k = 0; k < kb; k++) pack_block(w, k * BLOCK, n0, width, panel + (long)k * BLOCK * width);
    multiply(packed, n, offsets, kb, panel, width, Tile{y + n0, 0, ld, least(ld, n) - n0, false, nullptr, nullptr});
  }
}

void one(const Orthogonal& o, float* work) {
  constexpr float a = 3.4445f, b = -4.7750f, c = 2.0315f;
  int n = o.n, ld = (int)round_up(n, BLOCK), kb = ld / BLOCK;
  long square = (long)ld * ld;
  float *A = work, *P = A + square, *S = P + square, *T = S + square, *packed = T + square;
  memset(work, 0, sizeof(float) * 4 * square);
  // A = g^T g, over bands of rows; or g g^T, over bands of columns
  long channel = BAND * BLOCK + BLOCK, panel = (long)BAND * PANEL + BLOCK;
  float* wide = packed + kb * channel;
  if (o.wide) squares_of_rows(o, A, ld, packed);
  for (long r0 = 0; r0 < o.rows && !o.wide; r0 += BAND) {
    int rows = least(BAND, o.rows - r0);
    for (int r = 0; r < rows; r++) {
      const float* p = o.g + (r0 + r) * n;
      for (int k = 0; k < ld; k += VL) store(packed + k / BLOCK * channel + r * BLOCK + k % BLOCK, load_first(p + k, n - k));
      for (int k = 0; k < n; k += VL) store(wide + k / PANEL * panel + r * PANEL + k % PANEL, load_first(p + k, n - k));
    }
    for (int n0 = 0; n0 < n; n0 += PANEL)
      for (int k = 0; k < kb; k++)
        outer_block(packed + k * channel, 0, wide + n0 / PANEL * panel, 0, 1, rows, A + (long)k * BLOCK * ld + n0, ld,
                    n - k * BLOCK, panel_width(n, n0), n - n0, r0 > 0);
  }
  float trace = 0;
  for (int i = 0; i < n; i++) trace += A[(long)i * ld + i];
  float norm = __builtin_sqrtf(trace) + 1e-7f, scale = 1 / (norm * norm);
  for (long i = 0; i < square; i += VL) store(A + i, load(A + i) * scale);
  for (int step = 0; step < 5; step++) {
    square_product(P, A, A, n, ld, packed);
    for (long i = 0; i < square; i += VL) store(P + i, b * load(A + i) + c * load(P + i));
    for (int i = 0; i < n; i++) P[(long)i * ld + i] += a;
    if (step == 0) {
      memcpy(S, P, sizeof(float) * square);
    } else {
      square_product(T, P, S, n, ld, packed);
      float* old = S;
      S = T, T = old;
    }
    if (step == 4) break;
    square_product(T, P, A, n, ld, packed);
    square_product(A, T, P, n, ld, packed);
  }
  for (long i = 0; i < square; i += VL) store(S + i, load(S + i) * (1 / norm));
  if (o.wide) return times_columns(o, S, ld, packed);
  // x = g S, over bands of rows
  float* panels_of_S = wide;
  Weights w{S, n, n, ld, false};
  long s_panel = (long)ld * PANEL, offsets[MAX_CHANNELS / BLOCK];
  for (int k = 0; k < kb; k++) offsets[k] = k * channel;
  for (int n0 = 0; n0 < n; n0 += PANEL)
    for (int k = 0; k < kb; k++)
      pack_block(w, k * BLOCK, n0, panel_width(n, n0),
                 panels_of_S + n0 / PANEL * s_panel + (long)k * BLOCK * panel_width(n, n0));
  for (long r0 = 0; r0 < o.rows; r0 += BAND) {
    int rows = least(BAND, o.rows - r0);
    for (int r = 0; r < rows; r++)
      for (int k = 0; k < ld; k += VL)
        store(packed + k / BLOCK * channel + r * BLOCK + k % BLOCK, load_first(o.g + (r0 + r) * n + k, n - k));
    for (int n0 = 0; n0 < n; n0 += PANEL)
      multiply(packed, rows, offsets, kb, panels_of_S + n0 / PANEL * s_panel, panel_width(n, n0),
               Tile{o.x + r0 * n + n0, 0, n, n - n0, false, nullptr, nullptr});
  }
}

}  // namespace

void orthogonalise(const Orthogonal* list, int count) {
  long size = 0;
  for (int i = 0; i < count; i++) {
    long ld = round_up(list[i].n, BLOCK), np = panels(list[i].n);
    long bands = ld / BLOCK * (256 * BLOCK + BLOCK) + np * (256L * PANEL + BLOCK), squares = ld / BLOCK * (ld * BLOCK + BLOCK);
    long need = 4 * ld * ld + (bands > squares + np * ld * PANEL ? bands : squares + np * ld * PANEL) +
                ld / BLOCK * (256 * BLOCK + BLOCK) + np * ld * PANEL;
    if (list[i].wide) need += BAND / BLOCK * (ld * BLOCK + BLOCK) + BAND * PANEL;
    size = need > size ? need : size;
  }
  float* lanes = scratch(num_threads() * round_up(size, BLOCK));
  parallel(count, [&](int i, int lane) { one(list[i], lanes + lane * round_up(size, BLOCK)); });
}

}  // namespace minidiff::MINIDIFF_ISA
