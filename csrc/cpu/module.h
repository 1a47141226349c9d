// What the CPU module has beside the ops: the choice of instruction set, and the memory of NumPy's arrays.
#pragma once

#include <cstddef>

#include "../kernels.h"

namespace minidiff {

extern const Kernels *const kernels_portable, *const kernels_avx2, *const kernels_avx512;

struct Memory {
  size_t in_use = 0, peak = 0, cached = 0;  // bytes
  size_t system_calls = 0;                  // allocations that the cache could not serve
};
Memory memory();
void reset_peak();
void release_memory();
bool install_allocator();  // false with a Python error set

// Floats from the same cache, until the end of the block.
struct Temporary {
  float* data;
  explicit Temporary(size_t floats);
  ~Temporary();
  Temporary(const Temporary&) = delete;
};

}  // namespace minidiff
