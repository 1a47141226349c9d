// SiLU, the GELUs, GEGLU and sums: each result comes from the numbers at its place.
//
// The rungs are those of elementwise.cuh: one thread a number, threads that stride, four numbers at a time. What is read
// and written, in bytes a number of the result, against at most 50 operations:
//
//   pointwise  forward  8   y = x phi(x)                 backward 12   dx = dy (phi + x phi')
//   add                12   y = a + b
//   geglu      forward 12   y = a gelu(g)                backward 20   da, dg from dy, a, g
//
//   x, dx  (rows, 2 D)  ┌────── a ──────┬────── g ──────┐      y, dy  (rows, D)  ┌───────────────┐
//                       └───────────────┴───────────────┘                        └───────────────┘
#include "../kernels.h"
#include "activations.cuh"
#include "elementwise.cuh"

namespace minidiff::cuda {
namespace {

Ladder pointwise_ladder("pointwise", ELEMENTWISE_RUNGS);
Ladder geglu_ladder("geglu", ELEMENTWISE_RUNGS);
Ladder add_ladder("add", ELEMENTWISE_RUNGS);

template <int KIND>
struct Forward {
  float* y;
  const float* x;

  bool vectors() const { return aligned(y, x); }
  template <class V>
  __device__ void at(long i) const {
    V v = load<V>(x, i);
    each([](float& v) { v = activated<KIND>(v); }, v);
    store(y, i, v);
  }
};

template <int KIND>
struct Backward {
  float* dx;
  const float *dy, *x;

  bool vectors() const { return aligned(dx, dy, x); }
  template <class V>
  __device__ void at(long i) const {
    V d = load<V>(dy, i), v = load<V>(x, i);
    each([](float& d, float v) { d *= derivative<KIND>(v); }, d, v);
    store(dx, i, d);
  }
};

struct Add {
  float* y;
  const float *a, *b;

  bool vectors() const { return aligned(y, a, b); }
  template <class V>
  __device__ void at(long i) const {
    V sum = load<V>(a, i), other = load<V>(b, i);
    each([](float& sum, float other) { sum += other; }, sum, other);
    store(y, i, sum);
  }
};

// i counts the numbers of y, row after row. The division by D costs less than the memory it waits for.
struct GegluForward {
  float* y;
  const float* x;
  int D;

  bool vectors() const { return D % 4 == 0 && aligned(y, x); }
  template <class V>
  __device__ void at(long i) const {
    long half = D / LANES<V>, of_a = i + i / half * half;
    V a = load<V>(x, of_a), g = load<V>(x, of_a + half);
    each([](float& a, float g) { a = geglu(a, g); }, a, g);
    store(y, i, a);
  }
};

struct GegluBackward {
  float* dx;
  const float *dy, *x;
  int D;

  bool vectors() const { return D % 4 == 0 && aligned(dx, dy, x); }
  template <class V>
  __device__ void at(long i) const {
    long half = D / LANES<V>, of_a = i + i / half * half;
    V d = load<V>(dy, i), a = load<V>(x, of_a), g = load<V>(x, of_a + half);
    each([](float d, float& a, float& g) { geglu_gradient(d, a, g, a, g); }, d, a, g);
    store(dx, of_a, a);
    store(dx, of_a + half, g);
  }
};

}  // namespace

void pointwise_forward(float* y, const float* x, long n, int kind) {
  switch (kind) {
    case SILU: return elementwise(pointwise_ladder, Forward<SILU>{y, x}, n);
    case GELU_EXACT: return elementwise(pointwise_ladder, Forward<GELU_EXACT>{y, x}, n);
    case GELU_TANH: return elementwise(pointwise_ladder, Forward<GELU_TANH>{y, x}, n);
    default: return elementwise(pointwise_ladder, Forward<GELU_QUICK>{y, x}, n);
  }
}
void pointwise_backward(float* dx, const float* dy, const float* x, long n, int kind) {
  switch (kind) {
    case SILU: return elementwise(pointwise_ladder, Backward<SILU>{dx, dy, x}, n);
    case GELU_EXACT: return elementwise(pointwise_ladder, Backward<GELU_EXACT>{dx, dy, x}, n);
    case GELU_TANH: return elementwise(pointwise_ladder, Backward<GELU_TANH>{dx, dy, x}, n);
    default: return elementwise(pointwise_ladder, Backward<GELU_QUICK>{dx, dy, x}, n);
  }
}

void geglu_forward(float* y, const float* x, long rows, int D) {
  elementwise(geglu_ladder, GegluForward{y, x, D}, rows * D);
}
void geglu_backward(float* dx, const float* dy, const float* x, long rows, int D) {
  elementwise(geglu_ladder, GegluBackward{dx, dy, x, D}, rows * D);
}

void add(float* y, const float* a, const float* b, long n) { elementwise(add_ladder, Add{y, a, b}, n); }

}  // namespace minidiff::cuda
