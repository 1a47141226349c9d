// Standard normal numbers: out (samples, elements), each a function of its counter alone (philox.cuh).
//
//   grid   x: the blocks of four numbers of a sample, a thread each          sample 0  │ 0..3 │ 4..7 │ ...
//          y: the samples                                                    sample 1  │ 0..3 │ 4..7 │ ...
//
// Floor: 4 bytes a number written, against some 50 operations; see philox.cuh, whose ladder this is.
#include "philox.cuh"

namespace minidiff::cuda {
namespace {

Ladder ladder("normal", DRAWN_RUNGS);

struct Write {
  float* out;

  bool vectors() const { return aligned(out); }
  Write from(long sample, long elements) const { return {out + sample * elements}; }
  template <class V>
  __device__ void at(int, long i, V z) const {
    store(out, i, z);
  }
};

}  // namespace

void normal(float* out, const Draws& draws, long elements) { drawn(ladder, Write{out}, draws, elements); }

}  // namespace minidiff::cuda
