// The kernels as a module offers them, whichever device it is for: plain pointers, sizes already checked, float32,
// contiguous. Here they are declared once for all modules; csrc/cpu and csrc/cuda define them.
#pragma once

#include <cstdint>

namespace minidiff {

constexpr int MAX_CHANNELS = 16384;  // of one convolution's input: there is a zero pixel of this width
constexpr int MAX_TAPS = 1024;       // kh * kw

enum Algorithm { CHOOSE = -1, DIRECT = 0, WINOGRAD2 = 2, WINOGRAD4 = 4 };

// y[b, i, j] = sum over taps (p, q) of  X[b, stride i + p - top, stride j + q - left] @ W[p, q]  + bias + shift[b] + residual
//
// X is the image as the convolution sees it: stored (B, h, w, C1), and C2 more channels from x2 if there are two inputs,
// every pixel `up` times in both directions, `spread - 1` zeros between pixels (the input gradient of a strided
// convolution), and zeros all around.
struct Conv {
  const float *x = nullptr, *x2 = nullptr;
  int B = 0, h = 0, w = 0, C1 = 0, C2 = 0, up = 1, spread = 1;
  const float* weights = nullptr;  // (kh, kw, C1 + C2, N)
  int kh = 1, kw = 1;
  bool flipped = false;         // the stored kernel is (kh, kw, all_N, C1 + C2), read back to front (input gradient)
  int all_N = 0, first_N = 0;   // its channels, and the first of the N that are wanted
  int stride = 1, top = 0, left = 0;
  int H = 0, W = 0, N = 0;  // of y
  float* y = nullptr;
  const float *bias = nullptr, *shift = nullptr, *residual = nullptr;  // (N,), (B, N), like y
  bool silu = false;                                                   // of the sum
  const float* prepared = nullptr;                                     // weights transformed in advance
  int algorithm = CHOOSE;
};

// One or two inputs x (B, N, their C), which lie beside each other in y and dy (B, N, C); gain and offset (B, C), or (1, C)
// with gain_step = 0; mean, rstd, dgain, doffset (B, C)
struct GroupNorm {
  struct Input {
    const float* x = nullptr;
    float* dx = nullptr;
    int first = 0, C = 0;  // its channels in y
  };
  Input inputs[2];
  int B = 0, C = 0, groups = 1;
  long N = 0;
  const float *gain = nullptr, *offset = nullptr, *dy = nullptr;
  float *mean = nullptr, *rstd = nullptr, *y = nullptr, *dgain = nullptr, *doffset = nullptr;
  long gain_step = 0;
  double eps = 0;
  bool silu = false;
};

// q (B, Lq, heads * d), k (B, Lk, heads * d), v and y (.., heads * dv); lse (B, heads, Lq), the logarithm of the sum of
// exponentials of a row of scores; bias over (B, heads, Lq, Lk) with its strides in floats, 0 where it is broadcast
struct Attention {
  int B = 0, heads = 1, Lq = 0, Lk = 0, d = 0, dv = 0;
  const float *q = nullptr, *k = nullptr, *v = nullptr, *bias = nullptr, *dy = nullptr;
  long bias_strides[4] = {0, 0, 0, 0};
  float scale = 1;
  bool causal = false;
  float *y = nullptr, *lse = nullptr, *dq = nullptr, *dk = nullptr, *dv_out = nullptr;
};

// z (M, N) = x (M, K) @ w (K, N) + bias (N,) + residual (M, N), y = activation(z); with GEGLU y (M, N / 2)
struct Linear {
  const float *x = nullptr, *w = nullptr, *bias = nullptr, *residual = nullptr;
  long M = 0;
  int K = 0, N = 0;
  bool transposed = false;  // w is stored (N, K); not with GEGLU
  int activation = -1;      // of Pointwise
  float *y = nullptr, *z = nullptr;  // z: kept if not null
};

enum Pointwise { NO_ACTIVATION = -1, SILU, GELU_EXACT, GELU_TANH, GELU_QUICK, GEGLU };

// What differs from one step of an optimizer to the next, in memory like its arrays; see ops.h.
struct StepNumbers {
  float g_factor, lr, beta1, beta2, eps, m_factor, v_factor, ema_share;
};

// One parameter of an optimizer's step; all arrays have n elements.
struct Update {
  long n;
  float *p, *m, *v, *ema;
  const float* g;
  float decay, length = 1;
};

// g and x (rows, n), or (n, rows) where they are wide; rows >= n: x has g's singular vectors, and singular values near 1.
struct Orthogonal {
  long rows;
  int n;
  const float* g;
  float* x;
  bool wide;
};

// x_prev, x0 and eps from x_t, the predictions and fresh noise; all arrays have n elements. See ops.h.
struct ReverseStep {
  long n = 0;
  float *x_prev = nullptr, *x0 = nullptr, *eps = nullptr;
  const float *x_t = nullptr, *eps_cond = nullptr, *eps_uncond = nullptr, *z = nullptr;
  float w = 1, signal = 1, noise = 0, clip = 0, of_x0 = 0, of_eps = 0, of_z = 0;  // clip 0: none
};

// Which normal numbers: those of `count` samples with these numbers (in the computer's memory); see minidiff/random.py.
struct Draws {
  const int64_t* samples = nullptr;
  long count = 0;
  uint64_t seed = 0;
  uint32_t step = 0, purpose = 0;
};

// x_t = signal x0 + noise eps; target, if wanted: eps, or v = signal eps - noise x0. x0, x_t, target (count, elements);
// signal and noise (count,)
struct QSample {
  long elements = 0;
  float *x_t = nullptr, *target = nullptr;
  const float *x0 = nullptr, *signal = nullptr, *noise = nullptr;
  bool of_v = false;
};

// What a module computes with: one entry an op of ops.h, whose arguments ops.cpp has checked. A null entry: this module lacks
// the op, and Python never sees it.
struct Kernels {
  const char* name;
  void (*conv2d_forward)(const Conv&);
  // dx, dx2, dw, dshift: may be null
  void (*conv2d_backward)(const Conv&, const float* dy, float* dx, float* dx2, float* dw, float* dshift);
  long (*conv2d_prepared_size)(const Conv&);  // floats, 0: nothing to prepare
  void (*conv2d_prepare)(const Conv&, float*);

  void (*linear_forward)(const Linear&);
  void (*linear_backward)(const Linear&, const float* dy, float* dx, float* dw, float* db);  // dx, dw, db: may be null

  void (*group_norm_forward)(const GroupNorm&);
  void (*group_norm_backward)(const GroupNorm&);
  // x, y (rows, D); mean, rstd (rows,)
  void (*layer_norm_forward)(float* y, float* mean, float* rstd, const float* x, const float* gamma, const float* beta,
                             long rows, int D, double eps);
  void (*layer_norm_backward)(float* dx, float* dgamma, float* dbeta, const float* dy, const float* x, const float* gamma,
                              const float* mean, const float* rstd, long rows, int D);
  void (*attention_forward)(const Attention&);
  void (*attention_backward)(const Attention&);

  void (*pointwise_forward)(float* y, const float* x, long n, int kind);
  void (*pointwise_backward)(float* dx, const float* dy, const float* x, long n, int kind);
  void (*geglu_forward)(float* y, const float* x, long rows, int D);  // x (rows, 2 D)
  void (*geglu_backward)(float* dx, const float* dy, const float* x, long rows, int D);
  void (*add)(float* y, const float* a, const float* b, long n);
  void (*mse_forward)(float* y, const float* a, const float* b, long n);                     // n > 0
  void (*mse_backward)(float* da, const float* dy, const float* a, const float* b, long n);  // dy: one number
  void (*gradient_norm)(float* y, const Update*, int count);  // of every g; in float64 from piece to piece

  void (*adamw)(const Update*, int count, const StepNumbers*);
  void (*momentum)(const Update*, int count, const StepNumbers*);
  void (*descend)(const Update*, int count, const StepNumbers*);
  void (*orthogonalise)(const Orthogonal*, int count);

  void (*reverse_step)(const ReverseStep&);
  void (*reverse_step_drawn)(const ReverseStep&, const Draws&);  // its arrays (count, n / count), z drawn
  void (*q_sample_drawn)(const QSample&, const Draws&);

  void (*normal)(float* out, const Draws&, long elements);  // out (count, elements)

  double (*peak)(long repeats);  // multiply-adds in registers: operations done
};

const Kernels* kernels_in_use();

}  // namespace minidiff
