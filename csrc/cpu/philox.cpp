// Normal numbers from Philox4x32-10 and Box-Muller, a block of counters for every lane of a vector; the equations stand in
// minidiff/random.py. One thread: it runs beside training, in the thread that prepares the next step's data.
//
//   counter (sample, step, purpose, block)     ten rounds in every lane        two uniform words make two normal numbers
//   ┌────┬────┬────┬────┐  one a lane          ┌────┬────┬────┬────┐           u, v ──► sqrt(-2 log u) cos 2 pi v
//   │ c0 │ c1 │ c2 │ c3 │ ──────────────────►  │ w0 │ w1 │ w2 │ w3 │ ───────►           sqrt(-2 log u) sin 2 pi v
//   └────┴────┴────┴────┘                      └────┴────┴────┴────┘
#include "../kernels.h"
#include "simd.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint64_t vw __attribute__((vector_size(VL * 8)));

INLINE void multiply(uint32_t m, vu a, vu& high, vu& low) {
  vw p = __builtin_convertvector(a, vw) * (uint64_t)m;
  high = __builtin_convertvector(p >> 32, vu);
  low = __builtin_convertvector(p, vu);
}

// log x for normal numbers x > 0: x = 2^k m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh((m - 1) / (m + 1)) by its
// series, whose relative error stays small near x = 1.
INLINE vf vlog(vf x) {
  vi bits = (vi)x - 0x3f3504f3;
  vi k = bits >> 23;
  vf m = (vf)((bits & 0x007fffff) + 0x3f3504f3);
  vf s = (m - 1.0f) / (m + 1.0f), z = s * s;
  vf p = all(2.0f / 11);
  p = p * z + 2.0f / 9;
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  p = p * z + 2.0f;
  vf kf = __builtin_convertvector(k, vf);
  return kf * 0.693359375f + (s * p - kf * 2.12194440e-4f);
}

// sin and cos of 2 pi w / 2^32: whole quarters of the circle come off in integers, the rest, within an eighth, by series.
INLINE void circle(vu w, vf& sine, vf& cosine) {
  vu quarter = (w + 0x20000000u) >> 30;
  vf x = __builtin_convertvector((vi)(w - (quarter << 30)), vf) * 1.46291808e-9f;
  vf z = x * x;
  vf s = x * (1.0f + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880)))));
  vf c = 1.0f + z * (-0.5f + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320))));
  vi odd = (vi)(quarter & 1u) != 0, sine_negative = (vi)(quarter & 2u) != 0, cosine_negative = (vi)((quarter + 1u) & 2u) != 0;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  sine = sine_negative ? -sine : sine;
  cosine = cosine_negative ? -cosine : cosine;
}

INLINE void box_muller(vu a, vu b, vf& first, vf& second) {
  vf u = (__builtin_convertvector(a, vf) + 1.0f) * 2.3283064365386963e-10f;
  vf sine, cosine, radius = vsqrt(vmax(-2.0f * vlog(u), (vf){}));
  circle(b, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

}  // namespace

void normal(float* out, const Draws& d, long elements) {
  vu lane;
  for (int i = 0; i < VL; i++) lane[i] = i;
  for (long n = 0; n < d.count; n++)
    for (long block = 0; 4 * block < elements; block += VL) {
      vu c0 = lane + (uint32_t)block, c1 = (vu){} + (uint32_t)d.samples[n], c2 = (vu){} + d.step, c3 = (vu){} + d.purpose;
      uint32_t k0 = (uint32_t)d.seed, k1 = (uint32_t)(d.seed >> 32);
      for (int round = 0; round < 10; round++) {
        vu high0, low0, high1, low1;
        multiply(0xD2511F53u, c0, high0, low0);
        multiply(0xCD9E8D57u, c2, high1, low1);
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      }
      vf four[4];
      box_muller(c0, c1, four[0], four[1]);
      box_muller(c2, c3, four[2], four[3]);
      float* o = out + n * elements + 4 * block;
      for (int i = 0; i < VL; i++)
        for (int j = 0; j < 4; j++)
          if (4 * (block + i) + j < elements) o[4 * i + j] = four[j][i];
    }
}

}  // namespace minidiff::MINIDIFF_ISA
