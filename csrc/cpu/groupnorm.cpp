// GroupNorm (+ SiLU): x (B, N, C), groups of C / groups channels, gain and offset (B, C) or (1, C).
//
//   xhat = (x - mean) * rstd,   z = gain * xhat + offset,   y = z or silu(z)
//
// An image is cut into chunks of rows that stay in a core's cache. Each chunk finds its channels' means and its squared
// distances from them; Chan's formula joins chunks and channels into groups, without the cancellation of E[x^2] - E[x]^2.
//
//   chunks (rows x C)      per channel            per group               chunks again
//   ┌──────────────┐       mean, M2 ─┐
//   │              │ ───►            ├──►  mean, rstd (B, C)  ───►  y = act((x - mean) * (rstd * gain) + offset)
//   ├──────────────┤       mean, M2 ─┘
//   └──────────────┘
//
// The backward goes over the same chunks twice: sums of dz and dz * xhat, then dx. dz is computed again rather than kept:
// an exponential costs less than a number written and read.
#include "kernels.h"
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

// Calls f(channel, vector of the first n channels there) with n = VL but at the end.
template <class F>
INLINE void over_channels(int C, const F& f) {
  int c = 0;
  for (; c + VL <= C; c += VL) f(c, VL);
  if (c < C) f(c, C - c);
}

// Sums over rows of f(row pointer offset, channel, n) into out (C,), eight rows of one vector column at a time.
template <class F>
INLINE void sum_rows(long r0, long r1, int C, float* out, const F& f) {
  over_channels(C, [&](int c, int n) {
    vf s[4] = {};
    long r = r0;
    for (; r + 4 <= r1; r += 4)
      UNROLL for (int i = 0; i < 4; i++) s[i] += f((r + i) * C + c, c, n);
    for (; r < r1; r++) s[0] += f(r * C + c, c, n);
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
  if ((long)B * N * C == 0) return;
  Cut cuts = cut(N, C);
  float* stats = scratch((long)B * cuts.parts * 2 * C);
  auto chunk_stats = [&](int b, int part) {
    long r0 = cuts.first(part), r1 = cuts.first(part + 1);
    const float* x = g.x + b * N * C;
    float *mean = stats + ((long)b * cuts.parts + part) * 2 * C, *m2 = mean + C;
    sum_rows(r0, r1, C, mean, [&](long at, int, int n) { return load_first(x + at, n); });
    for (int c = 0; c < C; c++) mean[c] /= (float)(r1 - r0);
    sum_rows(r0, r1, C, m2, [&](long at, int c, int n) {
      vf d = load_first(x + at, n) - load_first(mean + c, n);
      return d * d;
    });
  };
  auto join = [&](int b) {
    for (int k = 0; k < g.groups; k++) {
      double count = 0, mean = 0, m2 = 0;
      for (int part = 0; part < cuts.parts; part++) {
        double rows = (double)(cuts.first(part + 1) - cuts.first(part));
        const float* s = stats + ((long)b * cuts.parts + part) * 2 * C;
        for (int c = k * per_group; c < (k + 1) * per_group; c++) {
          double delta = s[c] - mean, total = count + rows;
          mean += delta * rows / total;
          m2 += s[C + c] + delta * delta * count * rows / total;
          count = total;
        }
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
    for (long r = cuts.first(part); r < cuts.first(part + 1); r++) {
      const float* x = g.x + (b * N + r) * C;
      float* y = g.y + (b * N + r) * C;
      over_channels(C, [&](int c, int n) {
        vf a = load_first(rstd + c, n) * load_first(gain + c, n);
        vf z = (load_first(x + c, n) - load_first(mean + c, n)) * a + load_first(offset + c, n);
        store_first(y + c, g.silu ? z * vsigmoid(z) : z, n);
      });
    }
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
  auto point = [&](int b, long at, int c, int n) {
    const float *gain = g.gain + b * g.gain_step, *offset = g.offset + b * g.gain_step;
    vf xhat = (load_first(g.x + at, n) - load_first(g.mean + b * C + c, n)) * load_first(g.rstd + b * C + c, n);
    vf dz = load_first(g.dy + at, n), a = load_first(gain + c, n);
    if (g.silu) dz *= silu_slope(xhat * a + load_first(offset + c, n));
    return Point{xhat, dz, a};
  };
  auto chunk_sums = [&](int b, int part) {
    float *of_dz = sums + ((long)b * cuts.parts + part) * 2 * C, *of_dz_xhat = of_dz + C;
    over_channels(C, [&](int c, int n) {
      vf s = {}, t = {};
      for (long r = cuts.first(part); r < cuts.first(part + 1); r++) {
        Point p = point(b, (b * N + r) * C + c, c, n);
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
    for (long r = cuts.first(part); r < cuts.first(part + 1); r++)
      over_channels(C, [&](int c, int n) {
        long at = (b * N + r) * C + c;
        Point p = point(b, at, c, n);
        vf dx = (p.gain * p.dz - load_first(m1 + c, n) - p.xhat * load_first(m2 + c, n)) *
                load_first(g.rstd + b * C + c, n);
        store_first(g.dx + at, dx, n);
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
