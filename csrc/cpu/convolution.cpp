// Which of the ways a convolution goes, by its shape, and its gradients as other convolutions and matrix products.
//
//   1x1                          a linear layer a row; with two inputs two of them
//   few input channels           the windows as rows (im2col), then one matrix product
//   few output channels, back    the same from the other side: both gradients by one pass over the windows of dy
//   all else                     conv2d.cpp: direct, or by Winograd's algorithm
#include "../kernels.h"
#include "module.h"
#include "simd.h"

namespace minidiff::MINIDIFF_ISA {

void conv2d(const Conv&);
void conv2d_weight_gradient(const Conv&, const float* dy, float* dw);
void columns(const Conv&, float* out);
void pool_sum(float* y, const float* x, int B, int h, int w, int C, int factor);
void linear_forward(const Linear&);
void linear_backward(const Linear&, const float* dy, float* dx, float* dw, float* db);
void column_sums(float* out, const float* x, int groups, long rows, int N);

namespace {

// A 1x1 convolution is a linear layer; with two inputs it is two.
bool is_linear(const Conv& c) {
  return c.kh == 1 && c.kw == 1 && c.stride == 1 && c.up == 1 && !c.shift && c.H == c.h && c.W == c.w;
}

// Of its first input or its second, as a linear layer.
Linear one_by_one(const Conv& c, int input) {
  Linear l;
  l.x = input ? c.x2 : c.x, l.w = c.weights + (input ? (long)c.C1 * c.N : 0);
  l.M = (long)c.B * c.H * c.W, l.K = input ? c.C2 : c.C1, l.N = c.N;
  return l;
}

// With few channels a block of 16 would hold little but zeros; the windows as rows (im2col) are small, and one product.
constexpr int FEW = 5;
bool few_inputs(const Conv& c) { return c.kh * c.kw > 1 && c.C1 <= FEW && !c.x2 && !c.shift && c.N > FEW; }
bool few_outputs(const Conv& c) {
  return c.kh * c.kw > 1 && c.N <= FEW && c.C1 > FEW && !c.x2 && c.stride == 1 && c.up == 1;
}
size_t columns_size(const Conv& c) { return (size_t)c.B * c.H * c.W * c.kh * c.kw * c.C1; }

// The convolution whose result is the gradient of x (or x2): that of dy, its pixels `stride` apart, with the kernel turned
// round, at the size of the upsampled image.
Conv turned_round(const Conv& c, const float* dy, int first, int channels) {
  Conv d;
  d.x = dy, d.B = c.B, d.h = c.H, d.w = c.W, d.C1 = c.N, d.spread = c.stride;
  d.weights = c.weights, d.kh = c.kh, d.kw = c.kw, d.flipped = true, d.all_N = c.C1 + c.C2, d.first_N = first;
  d.top = c.kh - 1 - c.top, d.left = c.kw - 1 - c.left;
  d.H = c.h * c.up, d.W = c.w * c.up, d.N = channels, d.algorithm = c.algorithm;
  return d;
}

Linear of_columns(const Conv& c, const float* rows) {
  Linear l;
  l.x = rows, l.w = c.weights, l.M = (long)c.B * c.H * c.W, l.K = c.kh * c.kw * c.C1, l.N = c.N;
  return l;
}

// Both gradients at once: a layer from x to the windows of dy, whose weights are the kernel turned round.
void backward_of_few_outputs(const Conv& c, const float* dy, float* dx, float* dw) {
  Conv d = turned_round(c, dy, 0, c.C1);
  int taps = c.kh * c.kw, width = taps * c.N;
  Temporary rows(columns_size(d)), w((size_t)c.C1 * width), gradient((size_t)c.C1 * width);
  columns(d, rows.data);
  auto at = [&](int k, int tap, int n) { return ((long)(taps - 1 - tap) * c.C1 + k) * c.N + n; };
  for (int k = 0; k < c.C1; k++)
    for (int tap = 0; tap < taps; tap++)
      for (int n = 0; n < c.N; n++) w.data[(long)k * width + tap * c.N + n] = c.weights[at(k, tap, n)];
  Linear l;
  l.x = c.x, l.w = w.data, l.M = (long)c.B * c.h * c.w, l.K = c.C1, l.N = width;
  linear_backward(l, rows.data, dx, gradient.data, nullptr);
  for (int k = 0; k < c.C1 && dw; k++)
    for (int tap = 0; tap < taps; tap++)
      for (int n = 0; n < c.N; n++) dw[at(k, tap, n)] = gradient.data[(long)k * width + tap * c.N + n];
}

}  // namespace

void conv2d_forward(const Conv& c) {
  if (few_inputs(c) && c.algorithm == CHOOSE) {
    Temporary rows(columns_size(c));
    columns(c, rows.data);
    Linear l = of_columns(c, rows.data);
    l.bias = c.bias, l.residual = c.residual, l.y = c.y;
    if (c.silu) l.activation = SILU;
    return linear_forward(l);
  }
  if (!is_linear(c)) return conv2d(c);
  Linear l = one_by_one(c, 0);
  l.bias = c.bias, l.residual = c.residual, l.y = c.y;
  if (c.silu && !c.x2) l.activation = SILU;
  linear_forward(l);
  if (!c.x2) return;
  l = one_by_one(c, 1);
  l.residual = l.y = c.y;
  if (c.silu) l.activation = SILU;
  linear_forward(l);
}

void conv2d_backward(const Conv& c, const float* dy, float* dx, float* dx2, float* dw, float* dshift) {
  if (dshift) column_sums(dshift, dy, c.B, (long)c.H * c.W, c.N);
  if (is_linear(c)) {
    linear_backward(one_by_one(c, 0), dy, dx, dw, nullptr);
    if (c.x2) linear_backward(one_by_one(c, 1), dy, dx2, dw ? dw + (long)c.C1 * c.N : nullptr, nullptr);
    return;
  }
  if (few_outputs(c) && c.algorithm == CHOOSE) return backward_of_few_outputs(c, dy, dx, dw);
  if (dw && few_inputs(c) && c.algorithm == CHOOSE) {
    Temporary rows(columns_size(c));
    columns(c, rows.data);
    linear_backward(of_columns(c, rows.data), dy, nullptr, dw, nullptr);
  } else if (dw) {
    conv2d_weight_gradient(c, dy, dw);
  }
  float* into[2] = {dx, dx2};
  for (int input = 0; input < 2; input++)
    if (into[input]) {
      int channels = input ? c.C2 : c.C1, first = input ? c.C1 : 0;
      Conv d = turned_round(c, dy, first, channels);
      Temporary large(c.up > 1 ? (size_t)d.B * d.H * d.W * d.N : 0);
      d.y = c.up > 1 ? large.data : into[input];
      conv2d(d);
      // each square of an upsampled image is summed
      if (c.up > 1) pool_sum(into[input], large.data, d.B, c.h, c.w, channels, c.up);
    }
}

}  // namespace minidiff::MINIDIFF_ISA
