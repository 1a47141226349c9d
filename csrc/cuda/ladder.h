// A ladder: the versions of one op's kernels, from the naive one to the fastest, and which of them is in use.
//
// Every rung computes the same thing; each changes one idea. The device chooses the highest rung that it can run
// with operands as precise as `allow` says; tests, benchmarks and readers choose others by number.
#pragma once

#include <string>
#include <vector>

namespace minidiff::cuda {

// What a product's factors are rounded to. Sums are always float32.
enum class Operands { fp32, tf32, bf16 };

struct Rung {
  const char* name;
  const char* change;  // against the rung before, in a line
  int sm = 75;         // the least compute capability, 10 * major + minor
  Operands operands = Operands::fp32;
};

class Ladder {
 public:
  // op: the name in ops.h without _forward or _backward. Enters itself in ladders().
  Ladder(const char* op, std::vector<Rung> rungs);
  // The rung in use, counted from 1: what was chosen, else the highest that the device can run and whose operands are as
  // precise as allowed.
  int rung() const;
  // 0: by the device. Throws std::invalid_argument for a rung that there is none of, or that the device cannot run.
  void choose(int rung);
  const char* op;
  const std::vector<Rung> rungs;

 private:
  int chosen = 0;
};

std::vector<Ladder*>& ladders();

// The least precise operands that a rung may have which nobody chose by number; fp32 to begin with.
void allow(Operands);
Operands allowed();

// Of the device in use: 10 * major + minor, and its multiprocessors.
int compute_capability();
int multiprocessors();

}  // namespace minidiff::cuda
