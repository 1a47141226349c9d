// Standard normal numbers: out (samples, elements), each a function of its counter alone (philox.cuh).
//
//   grid   x: the blocks of four numbers of a sample, a thread each          sample 0  │ 0..3 │ 4..7 │ ...
//          y: the samples                                                    sample 1  │ 0..3 │ 4..7 │ ...
//
// Floor: 4 bytes a number written, against some 50 operations; see philox.cuh.
#include "../kernels.h"
#include "philox.cuh"

namespace minidiff::cuda {
namespace {

Ladder ladder("normal", {
    {"naive", "one thread a number: each computes four and keeps one"},
    {"fours", "one thread for the four numbers of a counter"},
    {"vectors", "they are written at once"},
});

__global__ void normal_naive(float* out, const __grid_constant__ Draw draw, long elements) {
  long e = long(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e < elements) out[blockIdx.y * elements + e] = draw.one(blockIdx.y, e);
}

// v2, and v3 with vectors
__global__ void normal_fours(float* out, const __grid_constant__ Draw draw, long elements, bool vectors) {
  drawn(draw, elements, vectors, [=](long i, auto z) { store(out, i, z); });
}

}  // namespace

void normal(float* out, const int64_t* samples, long count, long elements, uint64_t seed, uint32_t step, uint32_t purpose) {
  int rung = ladder.rung();
  bool vectors = rung == 3 && elements % 4 == 0 && aligned(out);
  draw_all(samples, count, elements, rung == 1 ? 1 : 4, seed, step, purpose, [&](const Draw& d, dim3 grid, long offset) {
    if (rung == 1)
      LAUNCH(normal_naive, grid, THREADS, 0, stream(), out + offset, d, elements);
    else
      LAUNCH(normal_fours, grid, THREADS, 0, stream(), out + offset, d, elements, vectors);
  });
}

}  // namespace minidiff::cuda
