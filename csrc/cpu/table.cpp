// The kernels of one instruction set, gathered.
#include "module.h"
#include "pool.h"
#include "simd.h"

namespace minidiff {
namespace MINIDIFF_ISA {

void conv2d_forward(const Conv&);
void conv2d_backward(const Conv&, const float*, float*, float*, float*, float*);
long conv2d_prepared_size(const Conv&);
void conv2d_prepare(const Conv&, float*);
void linear_forward(const Linear&);
void linear_backward(const Linear&, const float*, float*, float*, float*);
void group_norm_forward(const GroupNorm&);
void group_norm_backward(const GroupNorm&);
void layer_norm_forward(float*, float*, float*, const float*, const float*, const float*, long, int, double);
void layer_norm_backward(float*, float*, float*, const float*, const float*, const float*, const float*, const float*, long,
                         int);
void attention_forward(const Attention&);
void attention_backward(const Attention&);
void pointwise_forward(float*, const float*, long, int);
void pointwise_backward(float*, const float*, const float*, long, int);
void geglu_forward(float*, const float*, long, int);
void geglu_backward(float*, const float*, const float*, long, int);
void add(float*, const float*, const float*, long);
void mse_forward(float*, const float*, const float*, long);
void mse_backward(float*, const float*, const float*, const float*, long);
void gradient_norm(float*, const Update*, int);
void adamw(const Update*, int, const StepNumbers*);
void momentum(const Update*, int, const StepNumbers*);
void descend(const Update*, int, const StepNumbers*);
void orthogonalise(const Orthogonal*, int);
void reverse_step(const ReverseStep&);
void normal(float*, const Draws&, long);

// Multiply-adds in registers alone, in every thread: floating-point operations done. Twelve chains hide their latency.
static double peak(long repeats) {
  constexpr int CHAINS = 12;
  int T = num_threads();
  parallel(T, [&](int, int) {
    vf sums[CHAINS], factor = all(0.999f), term = all(0.001f);
    UNROLL for (int i = 0; i < CHAINS; i++) sums[i] = all((float)i);
    for (long i = 0; i < repeats; i++)
      UNROLL for (int j = 0; j < CHAINS; j++) sums[j] = sums[j] * factor + term;
    [[maybe_unused]] static thread_local volatile float kept;
    vf total = {};
    UNROLL for (int i = 0; i < CHAINS; i++) total += sums[i];
    kept = sum(total);
  });
  return 2.0 * T * repeats * CHAINS * VL;
}

static const Kernels table = {
#define MINIDIFF_NAME(x) #x
#define MINIDIFF_STRING(x) MINIDIFF_NAME(x)
    MINIDIFF_STRING(MINIDIFF_ISA), conv2d_forward, conv2d_backward, conv2d_prepared_size, conv2d_prepare, linear_forward,
    linear_backward, group_norm_forward, group_norm_backward, layer_norm_forward, layer_norm_backward, attention_forward,
    attention_backward, pointwise_forward, pointwise_backward, geglu_forward, geglu_backward, add, mse_forward, mse_backward,
    gradient_norm, adamw, momentum, descend, orthogonalise, reverse_step,
    nullptr, nullptr,  // reverse_step_drawn and q_sample_drawn: on a CPU noise is drawn beside the step
    normal, peak};

}  // namespace MINIDIFF_ISA

#define MINIDIFF_JOIN(a, b) a##b
#define MINIDIFF_TABLE(isa) MINIDIFF_JOIN(kernels_, isa)
const Kernels* const MINIDIFF_TABLE(MINIDIFF_ISA) = &MINIDIFF_ISA::table;

}  // namespace minidiff
