// A sampler's step: guidance, the predicted image, optionally held within limits, and the image one noise level down, all
// from the numbers at one place:
//
//   eps_cond, eps_uncond ──► eps ──┐
//                                  ├──► x0 ──clip──► x0, eps ──┐
//   x_t ───────────────────────────┘                           ├──► x_prev = of_x0 x0 + of_eps eps + of_z z
//   z, read or drawn ──────────────────────────────────────────┘
//
// Floor: 28 bytes a number with guidance and noise (reads x_t, eps_cond, eps_uncond, z; writes x_prev, x0, eps), against
// some 30 operations; 24 where z is drawn, which saves the 4 of writing it as well. The rungs are those of elementwise.cuh.
#include "reverse_step.h"

#include "elementwise.cuh"
#include "philox.cuh"

namespace minidiff::cuda {
namespace {

Ladder ladder("reverse_step", ELEMENTWISE_RUNGS);

struct Step {
  ReverseStep s;

  bool vectors() const { return aligned(s.x_prev, s.x0, s.eps, s.x_t, s.eps_cond, s.eps_uncond, s.z); }
  template <class V>
  __device__ void at(long i) const {
    V z = s.z ? load<V>(s.z, i) : V();
    with_noise(i, z, s.z != nullptr);
  }

  template <class V>
  __device__ void with_noise(long i, V z, bool noisy) const {
    V x_t = load<V>(s.x_t, i), eps = load<V>(s.eps_cond, i), uncond = s.eps_uncond ? load<V>(s.eps_uncond, i) : V();
    V x0, x_prev;
    each([&](float& x_prev, float& x0, float& eps, float x_t, float uncond, float z) {
      if (s.eps_uncond) eps = uncond + s.w * (eps - uncond);
      x0 = (x_t - s.noise * eps) / s.signal;
      if (s.clip > 0) {
        x0 = x0 > s.clip ? s.clip : x0 < -s.clip ? -s.clip : x0;  // NaN stays
        eps = (x_t - s.signal * x0) / s.noise;
      }
      x_prev = s.of_x0 * x0 + s.of_eps * eps;
      if (noisy) x_prev += s.of_z * z;
    }, x_prev, x0, eps, x_t, uncond, z);
    store(s.x_prev, i, x_prev);
    store(s.x0, i, x0);
    store(s.eps, i, eps);
  }
};

// A thread draws four numbers, and takes the step at their places
__global__ void draw_and_step(Step step, const __grid_constant__ Draw draw, long elements, bool vectors) {
  drawn(draw, elements, vectors, [&](long i, auto z) { step.with_noise(i, z, true); });
}

}  // namespace

void reverse_step(const ReverseStep& s) { elementwise(ladder, Step{s}, s.n); }

void reverse_step_drawn(const ReverseStep& whole, const int64_t* samples, long count, uint64_t seed, uint32_t step,
                        uint32_t purpose) {
  if (count == 0) return;
  long elements = whole.n / count;
  bool vectors = elements % 4 == 0 && Step{whole}.vectors();
  draw_all(samples, count, elements, 4, seed, step, purpose, [&](const Draw& draw, dim3 grid, long offset) {
    ReverseStep s = whole;
    for (float** p : {&s.x_prev, &s.x0, &s.eps}) *p += offset;
    for (const float** p : {&s.x_t, &s.eps_cond, &s.eps_uncond})
      if (*p) *p += offset;
    LAUNCH(draw_and_step, grid, THREADS, 0, stream(), Step{s}, draw, elements, vectors);
  });
}

}  // namespace minidiff::cuda
