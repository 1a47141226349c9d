// A sampler's step: guidance, the predicted image, optionally held within limits, and the image one noise level down, all
// from the numbers at one place:
//
//   eps_cond, eps_uncond ──► eps ──┐
//                                  ├──► x0 ──clip──► x0, eps ──┐
//   x_t ───────────────────────────┘                           ├──► x_prev = of_x0 x0 + of_eps eps + of_z z
//   z, read or drawn ──────────────────────────────────────────┘
//
// Floor: 28 bytes a number with guidance and noise (reads x_t, eps_cond, eps_uncond, z; writes x_prev, x0, eps), against
// some 30 operations; 24 where z is drawn, which saves the 4 of writing it as well. The rungs are those of elementwise.cuh and
// philox.cuh.
#include "philox.cuh"

namespace minidiff::cuda {
namespace {

Ladder ladder("reverse_step", ELEMENTWISE_RUNGS), drawn_ladder("reverse_step_drawn", DRAWN_RUNGS);

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

struct StepDrawn {
  Step step;

  bool vectors() const { return step.vectors(); }
  StepDrawn from(long sample, long elements) const {
    ReverseStep s = step.s;
    for (float** p : {&s.x_prev, &s.x0, &s.eps}) *p += sample * elements;
    for (const float** p : {&s.x_t, &s.eps_cond, &s.eps_uncond})
      if (*p) *p += sample * elements;
    return {{s}};
  }
  template <class V>
  __device__ void at(int, long i, V z) const {
    step.with_noise(i, z, true);
  }
};

}  // namespace

void reverse_step(const ReverseStep& s) { elementwise(ladder, Step{s}, s.n); }

void reverse_step_drawn(const ReverseStep& s, const Draws& draws) {
  if (draws.count) drawn(drawn_ladder, StepDrawn{{s}}, draws, s.n / draws.count);
}

}  // namespace minidiff::cuda
