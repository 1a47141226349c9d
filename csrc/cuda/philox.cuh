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

#include "../kernels.h"
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

// The ladder of what draws a number for every place of an array, and computes with it there. An op is a struct with
//   template <class V> __device__ void at(int sample, long i, V z) const;   the i-th float or float4, and its number or four
//   bool vectors() const;                                                  whether float4 will do for its arrays
//   Op from(long sample, long elements) const;                             the same, its arrays beginning at that sample
inline const std::vector<Rung> DRAWN_RUNGS = {
    {"naive", "one thread a number: each draws four and keeps one"},
    {"fours", "one thread for the four numbers of a counter"},
    {"vectors", "loads and stores of four numbers"},
};

// v1; the grid has a row of blocks for every sample
template <class Op>
__global__ void drawn_naive(Op op, const __grid_constant__ Draw draw, long elements) {
  long e = long(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e < elements) op.at(blockIdx.y, blockIdx.y * elements + e, draw.one(blockIdx.y, e));
}

// v2, and v3 with vectors
template <class Op>
__global__ void drawn_fours(Op op, const __grid_constant__ Draw draw, long elements, bool vectors) {
  long block = long(blockIdx.x) * blockDim.x + threadIdx.x, rest = elements - 4 * block;
  if (rest <= 0) return;
  float4 z = draw.four(blockIdx.y, block);
  long i = blockIdx.y * elements + 4 * block;
  if (vectors) return op.at(blockIdx.y, i / 4, z);
  op.at(blockIdx.y, i, z.x);
  if (rest > 1) op.at(blockIdx.y, i + 1, z.y);
  if (rest > 2) op.at(blockIdx.y, i + 2, z.z);
  if (rest > 3) op.at(blockIdx.y, i + 3, z.w);
}

// op on arrays (count, elements), a row a sample.
template <class Op>
void drawn(const Ladder& ladder, const Op& op, const Draws& d, long elements) {
  if (elements == 0) return;
  int rung = ladder.rung();
  bool vectors = rung == 3 && elements % 4 == 0 && op.vectors();
  unsigned blocks = blocks_for(rung == 1 ? elements : (elements + 3) / 4, THREADS);
  Draw draw;
  draw.key = make_uint2(unsigned(d.seed), unsigned(d.seed >> 32)), draw.step = d.step, draw.purpose = d.purpose;
  for (long first = 0; first < d.count; first += DRAWN_SAMPLES) {
    int here = int(std::min<long>(DRAWN_SAMPLES, d.count - first));
    for (int i = 0; i < here; i++) draw.samples[i] = unsigned(d.samples[first + i]);
    if (rung == 1)
      LAUNCH(drawn_naive<Op>, dim3(blocks, here), THREADS, 0, stream(), op.from(first, elements), draw, elements);
    else
      LAUNCH(drawn_fours<Op>, dim3(blocks, here), THREADS, 0, stream(), op.from(first, elements), draw, elements, vectors);
  }
}

}  // namespace
}  // namespace minidiff::cuda
