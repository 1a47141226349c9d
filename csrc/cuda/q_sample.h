// Noise, the forward process and the training target in one pass; minidiff/diffusion.py has the equations.
#pragma once

#include <cstdint>

namespace minidiff::cuda {

enum Prediction { PREDICT_EPS, PREDICT_V, PREDICT_X0 };

// eps = normal(samples, seed, step, purpose),   x_t = signal x0 + noise eps,
// target = eps, or v = signal eps - noise x0, or x0
//
// x0, x_t, eps, target (count, elements); signal = sqrt(alpha_bar[t]) and noise = sqrt(1 - alpha_bar[t]) (count,), one a
// sample, on the device like the arrays; samples (count,), their numbers, in the computer's memory. eps and target may be
// null: a target that is eps or x0 need not be written again. In training the purpose is TRAIN_NOISE; see minidiff/train.py.
struct QSample {
  long count = 0, elements = 0;
  float *x_t = nullptr, *eps = nullptr, *target = nullptr;
  const float *x0 = nullptr, *signal = nullptr, *noise = nullptr;
  const int64_t* samples = nullptr;
  uint64_t seed = 0;
  uint32_t step = 0, purpose = 0;
  int prediction = PREDICT_EPS;
};
void q_sample(const QSample& q);

}  // namespace minidiff::cuda
