// Training's first step: noise is drawn, mixed with the image at each sample's level, and makes the target.
//
//   sample b   x0  ├── t0 ──┼── t1 ──┼── ...   x_t = signal[b] x0 + noise[b] eps    a thread takes the four places that
//   (row)      eps     drawn in registers      v   = signal[b] eps - noise[b] x0    one counter's numbers belong to
//
// Floor: 12 bytes a number (reads x0, writes x_t and eps or v; x0 as a target is there already), against some 60
// operations, mostly the drawing. In passes of their own it is 4 for the noise and 16 for the rest. The rungs are those of
// philox.cuh.
#include "philox.cuh"

namespace minidiff::cuda {
namespace {

Ladder ladder("q_sample_drawn", DRAWN_RUNGS);

struct Mix {
  QSample q;

  bool vectors() const { return aligned(q.x_t, q.target, q.x0); }
  Mix from(long sample, long elements) const {
    QSample s = q;
    s.x_t += sample * elements, s.x0 += sample * elements, s.signal += sample, s.noise += sample;
    if (s.target) s.target += sample * elements;
    return {s};
  }
  template <class V>
  __device__ void at(int sample, long i, V eps) const {
    float s = q.signal[sample], n = q.noise[sample];
    V x = load<V>(q.x0, i), x_t, v;
    each([=](float& x_t, float& v, float x, float eps) {
      x_t = s * x + n * eps;
      v = s * eps - n * x;
    }, x_t, v, x, eps);
    store(q.x_t, i, x_t);
    if (q.target) store(q.target, i, q.of_v ? v : eps);
  }
};

}  // namespace

void q_sample_drawn(const QSample& q, const Draws& draws) { drawn(ladder, Mix{q}, draws, q.elements); }

}  // namespace minidiff::cuda
