// The instructions of a whole warp around tensor cores; ptx.h has their layouts.
#pragma once

#include "emulator.h"

#pragma GCC visibility push(hidden)

namespace minidiff::emulator {

enum class Operand : uint8_t { bf16, f16, tf32 };

// d = a b + c on this lane's fragments of a (16 x K), b (K x 8) and c, d (16 x 8); K is 16, or 8 for tf32.
void multiply_fragments(const Site&, Operand, float* d, const unsigned* a, const unsigned* b, const float* c);

// This lane's part of `count` 8 x 8 matrices of 16-bit numbers; lane 8 i + r names row r of matrix i.
void load_matrices(const Site&, int count, bool transposed, unsigned* parts, const void* row);

}  // namespace minidiff::emulator

#pragma GCC visibility pop
