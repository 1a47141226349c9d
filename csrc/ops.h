// Every kernel, declared once: what the compiled modules offer to Python, under these names and in this order of
// arguments. Outputs come first and are allocated by the caller; an output is overwritten, never added to, unless said
// otherwise. Arrays are float32 and contiguous; `?` marks those that may be None. What a module lacks is left to the
// reference in minidiff/ops.
#pragma once

#include <string>
#include <vector>

#include "view.h"

namespace minidiff {

using Sides = std::vector<std::vector<int>>;  // ((top, bottom), (left, right))

// y (B, H', W', N) = conv(x (B, h, w, C) [beside x2? (B, h, w, C2)], every pixel repeated `upsample` times both ways)
// with w (kh, kw, C + C2, N), + b? (N,) + shift? (B, N) + residual? like y; SiLU of all that if asked.
// prepared?: from conv2d_prepare.
void conv2d_forward(View y, View x, View x2, View w, View b, View shift, View residual, int stride, Sides sides,
                    int upsample, bool silu, View prepared, int algorithm);
// dx? like x, dx2? like x2, dw? like w, dshift? (B, N): the sums of dy over positions.
void conv2d_backward(View dx, View dx2, View dw, View dshift, View dy, View x, View x2, View w, int stride, Sides sides,
                     int upsample, int algorithm);
// How many floats conv2d_prepare writes for images of these sizes; 0: nothing to prepare.
int64_t conv2d_prepared_size(View w, int B, int height, int width, int stride, Sides sides, int upsample);
void conv2d_prepare(View prepared, View w, int B, int height, int width, int stride, Sides sides, int upsample);

// y (M, N) = activation(z), z? (M, N) = x (M, K) w (K, N) + b? (N,) + residual? (M, N)
// activation: "" (none: no z), silu, gelu_exact, gelu_tanh, gelu_quick; or geglu, which halves: y (M, N / 2), no residual
void linear_forward(View y, View z, View x, View w, View b, View residual, const std::string& activation);
// dx? (M, K), dw (K, N), db? (N,) from dy like y; z? is wanted with an activation
void linear_backward(View dx, View dw, View db, View dy, View z, View x, View w, const std::string& activation);

// x (B, N, C1) [beside x2? (B, N, C2)], C = C1 + C2, y (B, N, C); gain, offset (B, C) or (1, C); mean, rstd (B, C)
void group_norm_forward(View y, View mean, View rstd, View x, View x2, View gain, View offset, int groups, double eps,
                        bool silu);
// dx like x, dx2? like x2; dgain, doffset (B, C)
void group_norm_backward(View dx, View dx2, View dgain, View doffset, View dy, View x, View x2, View gain, View offset,
                         View mean, View rstd, int groups, bool silu);
// x, y (rows, D); mean, rstd (rows,)
void layer_norm_forward(View y, View mean, View rstd, View x, View gamma, View beta, double eps);
void layer_norm_backward(View dx, View dgamma, View dbeta, View dy, View x, View gamma, View mean, View rstd);

// q (B, Lq, D), k (B, Lk, D), v (B, Lk, Dv), y (B, Lq, Dv), lse? (B, heads, Lq); bias? (B, heads, Lq, Lk), any strides
void attention_forward(View y, View lse, View q, View k, View v, View bias, int heads, double scale, bool causal);
void attention_backward(View dq, View dk, View dv, View dy, View y, View lse, View q, View k, View v, View bias, int heads,
                        double scale, bool causal);

// One-dimensional, all of one length. kind: silu, gelu_exact, gelu_tanh, gelu_quick
void pointwise_forward(View y, View x, const std::string& kind);
void pointwise_backward(View dx, View dy, View x, const std::string& kind);
// x (rows, 2 D) -> y (rows, D)
void geglu_forward(View y, View x);
void geglu_backward(View dx, View dy, View x);
void add(View y, View a, View b);
// y (1,): the mean of (a - b)^2, which must have elements; da from dy (1,)
void mse_forward(View y, View a, View b);
void mse_backward(View da, View dy, View a, View b);
// y (1,): the square root of the sum of squares of arrays of any shapes
void gradient_norm(View y, std::vector<View> g);

// The optimizers' steps, for lists of arrays of any shapes, one a parameter. numbers (8,): what differs from step to step,
//   g_factor, lr, beta1, beta2, eps, m_factor = 1 / (1 - beta1^step), v_factor = 1 / (1 - beta2^step), ema_share = 1 - decay
// p, m, v and ema are updated in place; nothing is changed where g_factor is NaN.
void adamw_update(std::vector<View> p, std::vector<View> g, std::vector<View> m, std::vector<View> v,
                  std::vector<View> ema, std::vector<double> decay, View numbers);
// Muon, mu = beta1: m is updated in place, u <- (1 - mu) g_factor g + mu m
void muon_momentum(std::vector<View> u, std::vector<View> g, std::vector<View> m, View numbers);
// p <- p - lr (length u + decay p) and ema <- ema + ema_share (p - ema), in place
void descend(std::vector<View> p, std::vector<View> u, std::vector<View> ema, std::vector<double> length,
             std::vector<double> decay, View numbers);
// For each g (rows, columns) the x of the same shape with its singular vectors and singular values near 1.
void orthogonalise(std::vector<View> x, std::vector<View> g);

// Guidance, the predicted image and the step, of one-dimensional arrays; eps_uncond? and z? may be missing:
//   eps = eps_uncond + w (eps_cond - eps_uncond),   x0 = (x_t - noise eps) / signal,
//   with a clip: x0 held within it and eps = (x_t - signal x0) / noise,   x_prev = of_x0 x0 + of_eps eps + of_z z
void reverse_step(View x_prev, View x0, View eps, View x_t, View eps_cond, View eps_uncond, View z, double w, double signal,
                  double noise, double clip, double of_x0, double of_eps, double of_z);

// Standard normal numbers, which samples, seed, step and purpose choose, the elements of a sample counted in C order; see
// minidiff/random.py. out (samples, elements)
void normal(View out, uint64_t seed, std::vector<int64_t> samples, uint32_t step, uint32_t purpose);
// reverse_step with such z, its arrays (samples, elements)
void reverse_step_drawn(View x_prev, View x0, View eps, View x_t, View eps_cond, View eps_uncond, double w, double signal,
                        double noise, double clip, double of_x0, double of_eps, double of_z, uint64_t seed,
                        std::vector<int64_t> samples, uint32_t step, uint32_t purpose);
// The jump to the noise levels of training and the target, with such eps: x_t = signal x0 + noise eps; target? = eps, or
// signal eps - noise x0 where it is v. x_t, target, x0 (samples, elements); signal, noise (samples,)
void q_sample_drawn(View x_t, View target, View x0, View signal, View noise, bool of_v, uint64_t seed,
                    std::vector<int64_t> samples, uint32_t step, uint32_t purpose);

}  // namespace minidiff
