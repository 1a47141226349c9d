#include "ladder.h"

#include <stdexcept>
#include <utility>

namespace minidiff::cuda {

static Operands least = Operands::fp32;
void allow(Operands o) { least = o; }
Operands allowed() { return least; }

std::vector<Ladder*>& ladders() {
  static std::vector<Ladder*> all;
  return all;
}

Ladder::Ladder(const char* op, std::vector<Rung> rungs) : op(op), rungs(std::move(rungs)) { ladders().push_back(this); }

int Ladder::rung() const {
  if (chosen) return chosen;
  int best = (int)rungs.size(), sm = compute_capability();
  while (best > 1 && (rungs[best - 1].sm > sm || rungs[best - 1].operands > least)) best--;
  return best;
}

void Ladder::choose(int rung) {
  if (rung < 0 || rung > (int)rungs.size())
    throw std::invalid_argument(std::string(op) + " has the rungs 1 to " + std::to_string(rungs.size()) + ", not " +
                                std::to_string(rung));
  if (rung && rungs[rung - 1].sm > compute_capability())
    throw std::invalid_argument(std::string(op) + ": " + rungs[rung - 1].name + " needs compute capability " +
                                std::to_string(rungs[rung - 1].sm / 10) + "." + std::to_string(rungs[rung - 1].sm % 10));
  chosen = rung;
}

}  // namespace minidiff::cuda
