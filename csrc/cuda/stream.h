// Where launches go, and the memory that they share between two of them.
#pragma once

#include <cstddef>

#include "portable.h"

namespace minidiff {
int ordinal_in_use();  // of view.h
}

namespace minidiff::cuda {

// The stream of the present call.
cudaStream_t stream();

// At least this many floats on the device, aligned to 256 bytes, until the next call of `workspace` in the same op; what
// it holds is undefined. Where it must grow, the smaller one is kept too. A
// device has one for all streams: ops on two of them at once would write into each other's.
float* workspace(size_t floats);

// The blocks that n threads' work makes, at least 1.
inline unsigned blocks_for(long n, int threads) { return (unsigned)((n + threads - 1) / threads); }

}  // namespace minidiff::cuda
