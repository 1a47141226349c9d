// The kernels of csrc/cuda, gathered; what is null is left to the reference.
#include "../kernels.h"

namespace minidiff {
namespace cuda {

void conv2d_forward(const Conv&);
void conv2d_backward(const Conv&, const float* dy, float* dx, float* dx2, float* dw, float* dshift);
void linear_forward(const Linear&);
void linear_backward(const Linear&, const float* dy, float* dx, float* dw, float* db);
void group_norm_forward(const GroupNorm&);
void group_norm_backward(const GroupNorm&);
void layer_norm_forward(float* y, float* mean, float* rstd, const float* x, const float* gamma, const float* beta, long rows,
                        int D, double eps);
void layer_norm_backward(float* dx, float* dgamma, float* dbeta, const float* dy, const float* x, const float* gamma,
                         const float* mean, const float* rstd, long rows, int D);
void attention_forward(const Attention&);
void attention_backward(const Attention&);
void pointwise_forward(float* y, const float* x, long n, int kind);
void pointwise_backward(float* dx, const float* dy, const float* x, long n, int kind);
void geglu_forward(float* y, const float* x, long rows, int D);
void geglu_backward(float* dx, const float* dy, const float* x, long rows, int D);
void add(float* y, const float* a, const float* b, long n);
void mse_forward(float* y, const float* a, const float* b, long n);
void mse_backward(float* da, const float* dy, const float* a, const float* b, long n);
void gradient_norm(float* y, const Update*, int count);
void adamw(const Update*, int count, const StepNumbers*);
void momentum(const Update*, int count, const StepNumbers*);
void descend(const Update*, int count, const StepNumbers*);
void reverse_step(const ReverseStep&);
void reverse_step_drawn(const ReverseStep&, const Draws&);
void q_sample_drawn(const QSample&, const Draws&);
void normal(float* out, const Draws&, long elements);

namespace {

Kernels table() {
  Kernels k = {};
  k.name = "cuda";
  k.conv2d_forward = conv2d_forward, k.conv2d_backward = conv2d_backward;
  k.linear_forward = linear_forward, k.linear_backward = linear_backward;
  k.group_norm_forward = group_norm_forward, k.group_norm_backward = group_norm_backward;
  k.layer_norm_forward = layer_norm_forward, k.layer_norm_backward = layer_norm_backward;
  k.attention_forward = attention_forward, k.attention_backward = attention_backward;
  k.pointwise_forward = pointwise_forward, k.pointwise_backward = pointwise_backward;
  k.geglu_forward = geglu_forward, k.geglu_backward = geglu_backward;
  k.add = add, k.mse_forward = mse_forward, k.mse_backward = mse_backward, k.gradient_norm = gradient_norm;
  k.adamw = adamw, k.momentum = momentum, k.descend = descend;
  k.reverse_step = reverse_step, k.reverse_step_drawn = reverse_step_drawn;
  k.q_sample_drawn = q_sample_drawn, k.normal = normal;
  return k;
}

}  // namespace
}  // namespace cuda

const Kernels* kernels_in_use() {
  static const Kernels kernels = cuda::table();
  return &kernels;
}

}  // namespace minidiff
