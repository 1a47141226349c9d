// LayerNorm: every row of x (rows, D) to mean 0 and variance 1, then gamma and beta. A row fits into the first-level
// cache, so it is read from memory once and written once, forward and backward.
//
//     x (rows, D)              a row, three times through the first-level cache        backward: each of PARTS groups of rows
//   ┌──────────────┐ a task    ┌────────────────────┐  sum      ──► mean              has sums of its own
//   │──────────────│ ───────►  │ x0 x1 x2 ... xD-1  │  squares  ──► rstd                 ┌──────────┐
//   │──────────────│           └────────────────────┘  write    ──► y                  │ dgamma   │ x PARTS ──► added up in
//   └──────────────┘                                                                 │ dbeta    │             fixed order
//                                                                                    └──────────┘
#include "../kernels.h"
#include "pool.h"
#include "simd.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

constexpr int PARTS = 64;  // of the rows, each with sums of its own for dgamma and dbeta; fixed, whatever the threads

template <class F>
INLINE float sum_over(int D, const F& f) {
  vf s = {};
  int c = 0;
  for (; c + VL <= D; c += VL) s += f(c, VL);
  if (c < D) {
    vf last = f(c, D - c);
    for (int i = 0; i < D - c; i++) s[i] += last[i];  // beyond the row f need not be zero
  }
  return sum(s);
}

}  // namespace

void layer_norm_forward(float* y, float* mean, float* rstd, const float* x, const float* gamma, const float* beta,
                        long rows, int D, double eps) {
  int parts = least(rows, PARTS);
  parallel(parts, [&](int part, int) {
    for (long r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      const float* p = x + r * D;
      float* o = y + r * D;
      float m = sum_over(D, [&](int c, int n) { return load_first(p + c, n); }) / D;
      float var = sum_over(D, [&](int c, int n) {
                    vf d = load_first(p + c, n) - m;
                    return d * d;
                  }) / D;
      float s = (float)(1 / __builtin_sqrt(var + eps));
      mean[r] = m, rstd[r] = s;
      for (int c = 0; c < D; c += VL) {
        int n = D - c;
        vf xhat = (load_first(p + c, n) - m) * s;
        store_first(o + c, xhat * load_first(gamma + c, n) + load_first(beta + c, n), n);
      }
    }
  });
}

void layer_norm_backward(float* dx, float* dgamma, float* dbeta, const float* dy, const float* x, const float* gamma,
                         const float* mean, const float* rstd, long rows, int D) {
  int parts = least(rows, PARTS);
  float* partial = scratch((long)most(1, parts) * 2 * D);
  parallel(parts, [&](int part, int) {
    float *of_gamma = partial + (long)part * 2 * D, *of_beta = of_gamma + D;
    memset(of_gamma, 0, sizeof(float) * 2 * D);
    for (long r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      const float *p = x + r * D, *g = dy + r * D;
      float m = mean[r], s = rstd[r];
      float m1 = sum_over(D, [&](int c, int n) { return load_first(g + c, n) * load_first(gamma + c, n); }) / D;
      float m2 = sum_over(D, [&](int c, int n) {
                   return load_first(g + c, n) * load_first(gamma + c, n) * ((load_first(p + c, n) - m) * s);
                 }) / D;
      for (int c = 0; c < D; c += VL) {
        int n = D - c;
        vf xhat = (load_first(p + c, n) - m) * s, d = load_first(g + c, n);
        store_first(dx + r * D + c, (d * load_first(gamma + c, n) - m1 - xhat * m2) * s, n);
        store_first(of_gamma + c, load_first(of_gamma + c, n) + d * xhat, n);
        store_first(of_beta + c, load_first(of_beta + c, n) + d, n);
      }
    }
  });
  for (int c = 0; c < D; c++) {
    float a = 0, b = 0;
    for (int part = 0; part < parts; part++)
      a += partial[(long)part * 2 * D + c], b += partial[(long)part * 2 * D + D + c];
    dgamma[c] = a, dbeta[c] = b;
  }
}

}  // namespace minidiff::MINIDIFF_ISA
