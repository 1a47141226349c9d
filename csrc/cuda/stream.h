// Where launches go, and the memory that they share between two of them.
#pragma once

#include <cstddef>
#include <new>
#include <string>
#include <utility>

#include "portable.h"

namespace minidiff {
int ordinal_in_use();  // of view.h
}

namespace minidiff::cuda {

// The stream of the present call.
cudaStream_t stream();

// At least this many floats on the device, aligned to 256 bytes, until the next call of `workspace` in the same op; what
// it holds is undefined. Each stream has its own. Where it must grow, the smaller one is kept too. Throws OutOfMemory.
float* workspace(size_t floats);

// In Python a MemoryError.
struct OutOfMemory : std::bad_alloc {
  std::string text;
  explicit OutOfMemory(std::string text) : text(std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
};

// The blocks that n threads' work makes, at least 1.
inline unsigned blocks_for(long n, int threads) { return (unsigned)((n + threads - 1) / threads); }

}  // namespace minidiff::cuda
