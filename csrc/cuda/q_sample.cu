// Training's first step: noise is drawn, mixed with the image at each sample's level, and makes the target.
//
//   sample b   x0  ├── t0 ──┼── t1 ──┼── ...   x_t = signal[b] x0 + noise[b] eps    a thread takes the four places that
//   (row)      eps     drawn in registers      v   = signal[b] eps - noise[b] x0    one counter's numbers belong to
//
// Floor: 12 bytes a number for v (reads x0, writes x_t and v; 4 more where eps is wanted), against some 60 operations,
// mostly the drawing. In passes of their own it is 4 for the noise and 16 for the rest.
#include "q_sample.h"

#include "philox.cuh"

namespace minidiff::cuda {
namespace {

Ladder ladder("q_sample", {
    {"naive", "one thread a number: each draws four and keeps one"},
    {"fours", "one thread for the four numbers of a counter"},
    {"vectors", "loads and stores of four numbers"},
});

struct Mix {
  float *x_t, *eps, *target;
  const float *x0, *signal, *noise;
  int prediction;

  template <class V>
  __device__ void at(int sample, long i, V eps_at) const {
    float s = signal[sample], n = noise[sample];
    V x = load<V>(x0, i), x_t_at, v_at;
    each([=](float& x_t, float& v, float x, float eps) {
      x_t = s * x + n * eps;
      v = s * eps - n * x;
    }, x_t_at, v_at, x, eps_at);
    store(x_t, i, x_t_at);
    if (eps) store(eps, i, eps_at);
    if (target) store(target, i, prediction == PREDICT_EPS ? eps_at : prediction == PREDICT_V ? v_at : x);
  }
};

__global__ void q_sample_naive(Mix mix, const __grid_constant__ Draw draw, long elements) {
  long e = long(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e < elements) mix.at(blockIdx.y, blockIdx.y * elements + e, draw.one(blockIdx.y, e));
}

// v2, and v3 with vectors
__global__ void q_sample_fours(Mix mix, const __grid_constant__ Draw draw, long elements, bool vectors) {
  drawn(draw, elements, vectors, [&](long i, auto eps) { mix.at(blockIdx.y, i, eps); });
}

}  // namespace

void q_sample(const QSample& q) {
  int rung = ladder.rung();
  bool vectors = rung == 3 && q.elements % 4 == 0 && aligned(q.x_t, q.eps, q.target, q.x0);
  auto launch = [&](const Draw& draw, dim3 grid, long offset) {
    long sample = offset / q.elements;
    Mix mix{q.x_t + offset, q.eps ? q.eps + offset : nullptr, q.target ? q.target + offset : nullptr,
            q.x0 + offset, q.signal + sample, q.noise + sample, q.prediction};
    if (rung == 1)
      LAUNCH(q_sample_naive, grid, THREADS, 0, stream(), mix, draw, q.elements);
    else
      LAUNCH(q_sample_fours, grid, THREADS, 0, stream(), mix, draw, q.elements, vectors);
  };
  draw_all(q.samples, q.count, q.elements, rung == 1 ? 1 : 4, q.seed, q.step, q.purpose, launch);
}

}  // namespace minidiff::cuda
