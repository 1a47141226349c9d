// What is computed number by number: SiLU, the GELUs, GEGLU, sums and squared distances; and the optimizer's step.
//
// All of it is bound by memory: one read of each input, one write of each output, in pieces that the threads share.
//
//   a  ├── piece 0 ──┼── piece 1 ──┼── ... ──┤      a piece is a task: 8192 numbers of every array, so that what the
//   b  ├─────────────┼─────────────┼── ... ──┤      optimizer reads and writes of one parameter (weight, gradient, two
//   y  ├─────────────┼─────────────┼── ... ──┤      moments, average) passes through the caches together, once
#include <cmath>

#include "activations.h"
#include "../kernels.h"
#include "pool.h"
#include "simd.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

constexpr long PIECE = 1 << 13;  // numbers a task works on; fixed, so that sums do not depend on the threads

template <class F>
void pieces(long n, const F& f) {
  parallel((int)((n + PIECE - 1) / PIECE), [&](int task, int) {
    long end = (task + 1) * PIECE < n ? (task + 1) * PIECE : n;
    for (long i = task * PIECE; i < end; i += VL) f(i, least(VL, end - i));
  });
}

template <int KIND>
void forward_of(float* y, const float* x, long n) {
  pieces(n, [&](long i, int m) {
    store_first(y + i, activated<KIND>(load_first(x + i, m)), m);
  });
}
template <int KIND>
void backward_of(float* dx, const float* dy, const float* x, long n) {
  pieces(n, [&](long i, int m) {
    store_first(dx + i, load_first(dy + i, m) * derivative<KIND>(load_first(x + i, m)), m);
  });
}

template <class F>
double sum_pieces(long n, const F& f) {
  int tasks = (int)((n + PIECE - 1) / PIECE);
  float* partial = scratch(most(1, tasks));
  parallel(tasks, [&](int task, int) {
    long end = (task + 1) * PIECE < n ? (task + 1) * PIECE : n;
    vf s[4] = {};
    long i = task * PIECE;
    for (; i + 4 * VL <= end; i += 4 * VL)
      UNROLL for (int j = 0; j < 4; j++) s[j] += f(i + j * VL, VL);
    for (; i < end; i += VL) s[0] += f(i, least(VL, end - i));
    partial[task] = sum((s[0] + s[1]) + (s[2] + s[3]));
  });
  double total = 0;
  for (int i = 0; i < tasks; i++) total += partial[i];
  return total;
}

}  // namespace

void pointwise_forward(float* y, const float* x, long n, int kind) {
  (kind == SILU         ? forward_of<SILU>
   : kind == GELU_EXACT ? forward_of<GELU_EXACT>
   : kind == GELU_TANH  ? forward_of<GELU_TANH>
                        : forward_of<GELU_QUICK>)(y, x, n);
}
void pointwise_backward(float* dx, const float* dy, const float* x, long n, int kind) {
  (kind == SILU         ? backward_of<SILU>
   : kind == GELU_EXACT ? backward_of<GELU_EXACT>
   : kind == GELU_TANH  ? backward_of<GELU_TANH>
                        : backward_of<GELU_QUICK>)(dx, dy, x, n);
}

void geglu_forward(float* y, const float* x, long rows, int D) {
  parallel(least(rows, 64), [&](int task, int) {
    int tasks = least(rows, 64);
    for (long r = rows * task / tasks; r < rows * (task + 1) / tasks; r++)
      for (int c = 0; c < D; c += VL) {
        vf a = load_first(x + r * 2 * D + c, D - c), g = load_first(x + r * 2 * D + D + c, D - c);
        store_first(y + r * D + c, geglu(a, g), D - c);
      }
  });
}
void geglu_backward(float* dx, const float* dy, const float* x, long rows, int D) {
  parallel(least(rows, 64), [&](int task, int) {
    int tasks = least(rows, 64);
    for (long r = rows * task / tasks; r < rows * (task + 1) / tasks; r++)
      for (int c = 0; c < D; c += VL) {
        vf a = load_first(x + r * 2 * D + c, D - c), g = load_first(x + r * 2 * D + D + c, D - c), da, dg;
        geglu_gradient(load_first(dy + r * D + c, D - c), a, g, da, dg);
        store_first(dx + r * 2 * D + c, da, D - c);
        store_first(dx + r * 2 * D + D + c, dg, D - c);
      }
  });
}

void add(float* y, const float* a, const float* b, long n) {
  pieces(n, [&](long i, int m) { store_first(y + i, load_first(a + i, m) + load_first(b + i, m), m); });
}
void mse_forward(float* y, const float* a, const float* b, long n) {
  *y = (float)(sum_pieces(n, [&](long i, int m) {
         vf d = load_first(a + i, m) - load_first(b + i, m);
         return d * d;
       }) / n);
}
void mse_backward(float* da, const float* dy, const float* a, const float* b, long n) {
  float factor = (float)(2.0 * *dy / n);
  pieces(n, [&](long i, int m) { store_first(da + i, factor * (load_first(a + i, m) - load_first(b + i, m)), m); });
}
void gradient_norm(float* y, const Update* list, int count) {
  double total = 0;
  for (int k = 0; k < count; k++)
    total += sum_pieces(list[k].n, [&](long i, int m) {
      vf v = load_first(list[k].g + i, m);
      return v * v;
    });
  *y = (float)__builtin_sqrt(total);
}

namespace {

// f(array, first number, how many) over all arrays, cut into pieces of equal size for the threads.
template <class F>
void over_all(const Update* updates, int count, const F& f) {
  long total = 0;
  for (int i = 0; i < count; i++) total += (updates[i].n + PIECE - 1) / PIECE;
  parallel((int)total, [&](int task, int) {
    const Update* u = updates;
    long piece = task;
    for (long here; piece >= (here = (u->n + PIECE - 1) / PIECE); u++) piece -= here;
    long end = (piece + 1) * PIECE < u->n ? (piece + 1) * PIECE : u->n;
    for (long i = piece * PIECE; i < end; i += VL) f(*u, i, least(VL, end - i));
  });
}

}  // namespace

// AdamW and the moving average of all parameters: one pass.
void adamw(const Update* updates, int count, const StepNumbers* numbers) {
  const StepNumbers s = *numbers;
  if (std::isnan(s.g_factor)) return;
  over_all(updates, count, [&](const Update& u, long i, int n) {
    vf g = load_first(u.g + i, n) * s.g_factor, m = load_first(u.m + i, n), v = load_first(u.v + i, n);
    vf p = load_first(u.p + i, n), ema = load_first(u.ema + i, n);
    m += (1 - s.beta1) * (g - m);
    v += (1 - s.beta2) * (g * g - v);
    p -= s.lr * (m * s.m_factor / (vsqrt(v * s.v_factor) + s.eps) + u.decay * p);
    ema += s.ema_share * (p - ema);
    store_first(u.m + i, m, n);
    store_first(u.v + i, v, n);
    store_first(u.p + i, p, n);
    store_first(u.ema + i, ema, n);
  });
}

// Muon's momentum: m is updated, the direction goes to p.
void momentum(const Update* updates, int count, const StepNumbers* numbers) {
  const float g_factor = numbers->g_factor, mu = numbers->beta1;
  if (std::isnan(g_factor)) return;
  over_all(updates, count, [&](const Update& u, long i, int n) {
    vf g = load_first(u.g + i, n) * g_factor, m = load_first(u.m + i, n);
    m += (1 - mu) * (g - m);
    store_first(u.m + i, m, n);
    store_first(u.p + i, (1 - mu) * g + mu * m, n);
  });
}

void descend(const Update* updates, int count, const StepNumbers* numbers) {
  const float lr = numbers->lr, ema_share = numbers->ema_share;
  if (std::isnan(numbers->g_factor)) return;
  over_all(updates, count, [&](const Update& u, long i, int n) {
    vf p = load_first(u.p + i, n), ema = load_first(u.ema + i, n);
    p -= lr * (u.length * load_first(u.g + i, n) + u.decay * p);
    ema += ema_share * (p - ema);
    store_first(u.p + i, p, n);
    store_first(u.ema + i, ema, n);
  });
}

// Guidance, the predicted image and the step to the next noise level: each array is read or written once.
void reverse_step(const ReverseStep& s) {
  pieces(s.n, [&](long i, int m) {
    vf x_t = load_first(s.x_t + i, m), eps = load_first(s.eps_cond + i, m);
    if (s.eps_uncond) {
      vf uncond = load_first(s.eps_uncond + i, m);
      eps = uncond + s.w * (eps - uncond);
    }
    vf x0 = (x_t - s.noise * eps) / s.signal;
    if (s.clip > 0) {
      x0 = vmin(all(s.clip), vmax(all(-s.clip), x0));  // NaN stays
      eps = (x_t - s.signal * x0) / s.noise;
    }
    vf x_prev = s.of_x0 * x0 + s.of_eps * eps;
    if (s.z) x_prev += s.of_z * load_first(s.z + i, m);
    store_first(s.x_prev + i, x_prev, m);
    store_first(s.x0 + i, x0, m);
    store_first(s.eps + i, eps, m);
  });
}

}  // namespace minidiff::MINIDIFF_ISA
