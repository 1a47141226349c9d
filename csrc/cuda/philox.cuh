// Normal numbers where they are needed, in registers: Philox4x32-10 and Box-Muller. The equations, and what the counters
// mean, stand in minidiff/random.py; the words are the same, the normal numbers agree to 1e-5.
//
//   counter (block, sample, step, purpose)         ten rounds                two uniform words make two normal numbers
//   ┌────┬────┬────┬────┐                          ┌────┬────┬────┬────┐     u, v ──► sqrt(-2 log u) cos 2 pi v
//   │ x  │ y  │ z  │ w  │ ──────────────────────►  │ x  │ y  │ z  │ w  │ ──►          sqrt(-2 log u) sin 2 pi v
//   └────┴────┴────┴────┘                          └────┴────┴────┴────┘
//
// Block b of a sample holds its numbers 4 b to 4 b + 3. Some 200 operations for the four numbers: about what an H100
// can do, by its data sheet, while it writes them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "elementwise.cuh"

namespace minidiff::cuda {
namespace {

__device__ inline uint4 philox(uint4 c, uint2 key) {
  for (int round = 0; round < 10; round++) {
    uint64_t p = uint64_t(0xD2511F53u) * c.x, q = uint64_t(0xCD9E8D57u) * c.z;
    c = make_uint4(unsigned(q >> 32) ^ c.y ^ key.x, unsigned(q), unsigned(p >> 32) ^ c.w ^ key.y, unsigned(p));
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return c;
}

// u = (a + 1) / 2^32 is in (0, 1]. b as a signed number is an angle between -pi and pi, where a float is finest.
__device__ inline float2 box_muller(unsigned a, unsigned b) {
  float radius = sqrtf(-2 * logf((float(a) + 1) * 2.3283064365386963e-10f)), sine, cosine;
  sincospif(float(int(b)) * 4.6566128730773926e-10f, &sine, &cosine);
  return make_float2(radius * cosine, radius * sine);
}

// What is drawn in one launch: it goes with the launch as an argument.
constexpr int DRAWN_SAMPLES = 512;
struct Draw {
  uint2 key;
  unsigned step, purpose;
  unsigned samples[DRAWN_SAMPLES];

  // The numbers 4 block to 4 block + 3 of the sample.
  __device__ float4 four(int sample, long block) const {
    uint4 words = philox(make_uint4(unsigned(block), samples[sample], step, purpose), key);
    float2 first = box_muller(words.x, words.y), second = box_muller(words.z, words.w);
    return make_float4(first.x, first.y, second.x, second.y);
  }
  // Number e of the sample.
  __device__ float one(int sample, long e) const {
    float4 z = four(sample, e / 4);
    return e % 4 == 0 ? z.x : e % 4 == 1 ? z.y : e % 4 == 2 ? z.z : z.w;
  }
};

// The thread's block of numbers among `elements` of a sample, as draw_all launches them: f(i, z) for its float4 at once,
// where vectors is true, else for each of its up to four floats; i as in load<V>, over this launch's samples.
template <class F>
__device__ void drawn(const Draw& draw, long elements, bool vectors, const F& f) {
  long block = long(blockIdx.x) * blockDim.x + threadIdx.x, rest = elements - 4 * block;
  if (rest <= 0) return;
  float4 z = draw.four(blockIdx.y, block);
  long i = blockIdx.y * elements + 4 * block;
  if (vectors) return f(i / 4, z);
  f(i, z.x);
  if (rest > 1) f(i + 1, z.y);
  if (rest > 2) f(i + 2, z.z);
  if (rest > 3) f(i + 3, z.w);
}

// launch(draw, grid, offset) for up to DRAWN_SAMPLES samples at a time: offset is where the first of them begins among all,
// the grid has a thread for `per_thread` numbers of a sample and a row of blocks for every sample.
template <class F>
void draw_all(const int64_t* samples, long count, long elements, int per_thread, uint64_t seed, uint32_t step,
              uint32_t purpose, const F& launch) {
  if (elements == 0) return;
  Draw draw;
  draw.key = make_uint2(unsigned(seed), unsigned(seed >> 32)), draw.step = step, draw.purpose = purpose;
  for (long first = 0; first < count; first += DRAWN_SAMPLES) {
    int here = int(std::min<long>(DRAWN_SAMPLES, count - first));
    for (int i = 0; i < here; i++) draw.samples[i] = unsigned(samples[first + i]);
    launch(draw, dim3(blocks_for((elements + per_thread - 1) / per_thread, THREADS), here), first * elements);
  }
}

}  // namespace
}  // namespace minidiff::cuda
