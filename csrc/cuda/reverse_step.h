// The step of a sampler that draws its own noise: z need not exist in memory.
#pragma once

#include "../kernels.h"

namespace minidiff::cuda {

// As `reverse_step` of kernels.h with z = normal(samples, seed, step, purpose); s.z stays null. The arrays of s are
// (count, s.n / count), a row a sample; `samples` are their numbers, in the computer's memory. A sampler's steps
// i = 0, 1, ... are numbered i + 1, and their purpose is STEP_NOISE; see minidiff/sample.py.
void reverse_step_drawn(const ReverseStep& s, const int64_t* samples, long count, uint64_t seed, uint32_t step,
                        uint32_t purpose);

}  // namespace minidiff::cuda
