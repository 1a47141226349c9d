// GroupNorm (+ SiLU): x (B, N, C), groups of C / groups channels, gain and offset (B, C) or (1, C). The channels may come
// from two inputs, a level's features and its skip: their concatenation is never made.
//
//   xhat = (x - mean) * rstd,   z = gain * xhat + offset,   y = z or silu(z)
//
// An image is cut into chunks of rows that stay in a core's cache. Each chunk finds its channels' means and its squared
// distances from them; Chan's formula joins the chunks of a group, without the cancellation of E[x^2] - E[x]^2.
//
//   chunks (rows x C)      per channel            per group               chunks again
//   ┌──────────────┐       mean, M2 ─┐
//   │              │ ───►            ├──►  mean, rstd (B, C)  ───►  y = act((x - mean) * (rstd * gain) + offset)
//   ├──────────────┤       mean, M2 ─┘
//   └──────────────┘
//
// The backward goes over the same chunks twice: sums of dz and dz * xhat, then dx. dz is computed again rather than kept:
// an exponential costs less than a number written and read.
#include "activations.h"
#include "../kernels.h"
#include "pool.h"
#include "simd.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

constexpr long CHUNK_BYTES = 128 << 10;

struct Cut {
  int parts;
  long N;
  long first(int part) const { return N * part / parts; }
};

Cut cut(long N, int C) {
  long rows = CHUNK_BYTES / (4L * C);
  if (rows < 1) rows = 1;
  return {(int)((N + rows - 1) / rows), N};
}

using Input = GroupNorm::Input;

// Calls f(input, its channel, channel of y, n) for vectors of n channels, n = VL but at an input's end.
template <class F>
INLINE void over_channels(const GroupNorm& g, const F& f) {
  for (const Input& in : g.inputs) {
    int c = 0;
    for (; c + VL <= in.C; c += VL) f(in, c, in.first + c, VL);
    if (c < in.C) f(in, c, in.first + c, in.C - c);
  }
}

// Sums over rows of f(vector of x, channel of y, n) into out (C,), four rows of one vector column at a time.
template <class F>
INLINE void sum_rows(const GroupNorm& g, long r0, long r1, float* out, const F& f) {
  over_channels(g, [&](const Input& in, int k, int c, int n) {
    vf s[4] = {};
    long r = r0;
    for (; r + 4 <= r1; r += 4)
      UNROLL for (int i = 0; i < 4; i++) s[i] += f(load_first(in.x + (r + i) * in.C + k, n), c, n);
    for (; r < r1; r++) s[0] += f(load_first(in.x + r * in.C + k, n), c, n);
    store_first(out + c, (s[0] + s[1]) + (s[2] + s[3]), n);
  });
}

INLINE vf silu_slope(vf z) {  // d silu(z) / dz
  vf s = vsigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

}  // namespace

void group_norm_forward(const GroupNorm& g) {
  int B = g.B, C = g.C, per_group = C / g.groups;
  long N = g.N;
  if ((long)B * N * C == 0) {  // of nothing there is no mean
    for (long i = 0; i < (long)B * C; i++) g.mean[i] = g.rstd[i] = __builtin_nanf("");
    return;
  }
  Cut cuts = cut(N, C);
  float* stats = scratch((long)B * cuts.parts * 2 * C);
  auto chunk_stats = [&](int b, int part) {
    long r0 = b * N + cuts.first(part), r1 = b * N + cuts.first(part + 1);
    float *mean = stats + ((long)b * cuts.parts + part) * 2 * C, *m2 = mean + C;
    sum_rows(g, r0, r1, mean, [](vf x, int, int) { return x; });
    for (int c = 0; c < C; c++) mean[c] /= (float)(r1 - r0);
    sum_rows(g, r0, r1, m2, [&](vf x, int c, int n) {
      vf d = x - load_first(mean + c, n);
      return d * d;
    });
  };
  auto join = [&](int b) {
    for (int k = 0; k < g.groups; k++) {
      double count = 0, mean = 0, m2 = 0;
      for (int part = 0; part < cuts.parts; part++) {
        double rows = (double)(cuts.first(part + 1) - cuts.first(part)), here = 0, around = 0;
        const float* s = stats + ((long)b * cuts.parts + part) * 2 * C;
        for (int c = k * per_group; c < (k + 1) * per_group; c++) here += s[c];
        here /= per_group;
        for (int c = k * per_group; c < (k + 1) * per_group; c++) around += s[C + c] + rows * (s[c] - here) * (s[c] - here);
        double many = rows * per_group, delta = here - mean, total = count + many;
        mean += delta * many / total;
        m2 += around + delta * delta * count * many / total;
        count = total;
      }
      for (int c = k * per_group; c < (k + 1) * per_group; c++) {
        g.mean[b * C + c] = (float)mean;
        g.rstd[b * C + c] = (float)(1 / __builtin_sqrt(m2 / count + g.eps));
      }
    }
  };
  auto apply = [&](int b, int part) {
    const float *mean = g.mean + b * C, *rstd = g.rstd + b * C;
    const float *gain = g.gain + b * g.gain_step, *offset = g.offset + b * g.gain_step;
    for (long r = b * N + cuts.first(part); r < b * N + cuts.first(part + 1); r++)
      over_channels(g, [&](const Input& in, int k, int c, int n) {
        vf a = load_first(rstd + c, n) * load_first(gain + c, n);
        vf z = (load_first(in.x + r * in.C + k, n) - load_first(mean + c, n)) * a + load_first(offset + c, n);
        store_first(g.y + r * C + c, g.silu ? activated<SILU>(z) : z, n);
      });
  };
  if (B >= num_threads()) {  // an image a task: its chunks are still in cache when they are read again
    parallel(B, [&](int b, int) {
      for (int part = 0; part < cuts.parts; part++) chunk_stats(b, part);
      join(b);
      for (int part = cuts.parts - 1; part >= 0; part--) apply(b, part);
    });
    return;
  }
  parallel(B * cuts.parts, [&](int task, int) { chunk_stats(task / cuts.parts, task % cuts.parts); });
  for (int b = 0; b < B; b++) join(b);
  parallel(B * cuts.parts, [&](int task, int) { apply(task / cuts.parts, task % cuts.parts); });
}

void group_norm_backward(const GroupNorm& g) {
  int B = g.B, C = g.C, per_group = C / g.groups;
  long N = g.N;
  Cut cuts = cut(N, C);
  if ((long)B * N * C == 0) {
    memset(g.dgain, 0, sizeof(float) * B * C);
    memset(g.doffset, 0, sizeof(float) * B * C);
    return;
  }
  float* sums = scratch((long)B * (cuts.parts * 2 + 2) * C);
  float* means = sums + (long)B * cuts.parts * 2 * C;
  struct Point {
    vf xhat, dz, gain;
  };
  auto point = [&](const Input& in, int k, int b, long r, int c, int n) {
    const float *gain = g.gain + b * g.gain_step, *offset = g.offset + b * g.gain_step;
    vf x = load_first(in.x + r * in.C + k, n);
    vf xhat = (x - load_first(g.mean + b * C + c, n)) * load_first(g.rstd + b * C + c, n);
    vf dz = load_first(g.dy + r * C + c, n), a = load_first(gain + c, n);
    if (g.silu) dz *= silu_slope(xhat * a + load_first(offset + c, n));
    return Point{xhat, dz, a};
  };
  auto chunk_sums = [&](int b, int part) {
    float *of_dz = sums + ((long)b * cuts.parts + part) * 2 * C, *of_dz_xhat = of_dz + C;
    over_channels(g, [&](const Input& in, int k, int c, int n) {
      vf s = {}, t = {};
      for (long r = b * N + cuts.first(part); r < b * N + cuts.first(part + 1); r++) {
        Point p = point(in, k, b, r, c, n);
        s += p.dz;
        t += p.dz * p.xhat;
      }
      store_first(of_dz + c, s, n);
      store_first(of_dz_xhat + c, t, n);
    });
  };
  auto join = [&](int b) {
    const float* gain = g.gain + b * g.gain_step;
    for (int c = 0; c < C; c++) {
      float s = 0, t = 0;
      for (int part = 0; part < cuts.parts; part++) {
        const float* p = sums + ((long)b * cuts.parts + part) * 2 * C;
        s += p[c], t += p[C + c];
      }
      g.doffset[b * C + c] = s, g.dgain[b * C + c] = t;
    }
    for (int k = 0; k < g.groups; k++) {
      double s = 0, t = 0;
      for (int c = k * per_group; c < (k + 1) * per_group; c++)
        s += (double)gain[c] * g.doffset[b * C + c], t += (double)gain[c] * g.dgain[b * C + c];
      for (int c = k * per_group; c < (k + 1) * per_group; c++) {
        means[(long)b * 2 * C + c] = (float)(s / ((double)N * per_group));
        means[(long)b * 2 * C + C + c] = (float)(t / ((double)N * per_group));
      }
    }
  };
  auto apply = [&](int b, int part) {
    const float *m1 = means + (long)b * 2 * C, *m2 = m1 + C;
    for (long r = b * N + cuts.first(part); r < b * N + cuts.first(part + 1); r++)
      over_channels(g, [&](const Input& in, int k, int c, int n) {
        Point p = point(in, k, b, r, c, n);
        vf dx = (p.gain * p.dz - load_first(m1 + c, n) - p.xhat * load_first(m2 + c, n)) *
                load_first(g.rstd + b * C + c, n);
        store_first(in.dx + r * in.C + k, dx, n);
      });
  };
  if (B >= num_threads()) {
    parallel(B, [&](int b, int) {
      for (int part = 0; part < cuts.parts; part++) chunk_sums(b, part);
      join(b);
      for (int part = cuts.parts - 1; part >= 0; part--) apply(b, part);
    });
    return;
  }
  parallel(B * cuts.parts, [&](int task, int) { chunk_sums(task / cuts.parts, task % cuts.parts); });
  for (int b = 0; b < B; b++) join(b);
  parallel(B * cuts.parts, [&](int task, int) { apply(task / cuts.parts, task % cuts.parts); });
}

}  // namespace minidiff::MINIDIFF_ISA
