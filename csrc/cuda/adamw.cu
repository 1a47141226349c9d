// The optimizer's step for a whole network: AdamW with the moving average (EMA), Muon's momentum and descent, and the norm
// of all gradients.
//
// A network has hundreds of arrays, most of them small: a launch each would cost more than the work. So the arrays are cut
// into pieces of PIECE numbers, a block takes a piece, and a table of up to ARRAYS arrays is an argument of the launch:
//
//   arrays   ┌─────── w0 ───────┬─ b0 ─┬────────── w1 ──────────┬ b1 ┐      table.first   0, 3, 4, 8, 9
//   blocks   │ 0  │ 1  │ 2      │ 3    │ 4  │ 5  │ 6  │ 7       │ 8  │      block 6 finds w1 by bisection: 4 <= 6 < 8,
//            └────┴────┴────────┴──────┴────┴────┴────┴─────────┴────┘      and takes its piece 6 - 4
//
// Floors, in bytes a parameter: adamw_update 36 (reads p, g, m, v, ema; writes all but g) against some 30 operations,
// muon_momentum 16, descend 20, gradient_norm 4. The norm is summed in two passes, as in mse.cu: a sum a block goes to the
// workspace, then one block adds those in double.
#include "../kernels.h"
#include "elementwise.cuh"
#include "reduce.cuh"

namespace minidiff::cuda {
namespace {

const std::vector<Rung> RUNGS = {
    {"naive", "a launch an array, one thread a number of a piece"},
    {"together", "a table of arrays: one launch for all"},
    {"vectors", "loads and stores of four numbers"},
};
Ladder adamw_ladder("adamw_update", RUNGS);
Ladder momentum_ladder("muon_momentum", RUNGS);
Ladder descend_ladder("descend", RUNGS);
Ladder norm_ladder("gradient_norm", RUNGS);

constexpr int PIECE = 4096, ARRAYS = 64;

struct Table {
  Update list[ARRAYS];
  int first[ARRAYS + 1];  // block of each array, then the number of blocks
  int count;
};

struct Piece {
  const Update& update;
  long begin, end;
};

__device__ Piece piece_of(const Table& table, int block) {
  int array = 0, beyond = table.count;  // the last array whose first block is not behind this one: it is not empty
  while (beyond - array > 1) {
    int middle = (array + beyond) / 2;
    if (table.first[middle] <= block)
      array = middle;
    else
      beyond = middle;
  }
  const Update& u = table.list[array];
  long begin = long(block - table.first[array]) * PIECE;
  return {u, begin, min(begin + PIECE, u.n)};
}

// f(V(), i) for the i-th float or float4 of an array, over a piece, which begins at a multiple of 4.
template <class V, class F>
__device__ void over(const Piece& piece, const F& f) {
  for (long i = piece.begin / LANES<V> + threadIdx.x; i < piece.end / LANES<V>; i += THREADS) f(V(), i);
  long rest = piece.end / LANES<V> * LANES<V> + threadIdx.x;
  if (rest < piece.end) f(float(), rest);
}

__device__ bool vectors(const Update& u) { return aligned(u.p, u.m, u.v, u.ema, u.g); }

// Op::at<V>(s, u, i) over every piece; V: float, or float4 where the array's addresses allow it. A step whose factor is NaN
// changes nothing: it has met numbers that are not finite, or is the rehearsal of a graph.
template <class Op, class V>
__global__ void update_pieces(const __grid_constant__ Table table, const StepNumbers* numbers) {
  const StepNumbers s = *numbers;
  if (s.g_factor != s.g_factor) return;
  Piece piece = piece_of(table, blockIdx.x);
  const Update& u = piece.update;
  auto at = [&](auto v, long i) { Op::template at<decltype(v)>(s, u, i); };
  if (LANES<V> > 1 && vectors(u))
    over<V>(piece, at);
  else
    over<float>(piece, at);
}

template <class V>
__global__ void squares_of_pieces(const __grid_constant__ Table table, float* partial) {
  Piece piece = piece_of(table, blockIdx.x);
  const float* g = piece.update.g;
  float sum = 0;
  auto square = [&](auto v, long i) {
    v = load<decltype(v)>(g, i);
    each([&](float v) { sum += v * v; }, v);
  };
  if (LANES<V> > 1 && aligned(g))
    over<V>(piece, square);
  else
    over<float>(piece, square);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void root_of_partials(float* y, const float* partial, long partials) {
  double total = 0;
  for (long i = threadIdx.x; i < partials; i += blockDim.x) total += partial[i];
  total = block_sum(total);
  if (threadIdx.x == 0) *y = float(sqrt(total));
}

// m and v follow g and its square; p moves along m / sqrt(v), both divided by what they lack while they start from 0
struct AdamW {
  template <class V>
  static __device__ void at(const StepNumbers& s, const Update& u, long i) {
    V p = load<V>(u.p, i), g = load<V>(u.g, i), m = load<V>(u.m, i), v = load<V>(u.v, i), ema = load<V>(u.ema, i);
    each([&](float& p, float& m, float& v, float& ema, float g) {
      g *= s.g_factor;
      m += (1 - s.beta1) * (g - m);
      v += (1 - s.beta2) * (g * g - v);
      p -= s.lr * (m * s.m_factor / (sqrtf(v * s.v_factor) + s.eps) + u.decay * p);
      ema += s.ema_share * (p - ema);
    }, p, m, v, ema, g);
    store(u.p, i, p);
    store(u.m, i, m);
    store(u.v, i, v);
    store(u.ema, i, ema);
  }
};

// Muon's: m follows g, the direction goes to p
struct Momentum {
  template <class V>
  static __device__ void at(const StepNumbers& s, const Update& u, long i) {
    V g = load<V>(u.g, i), m = load<V>(u.m, i);
    each([&](float& g, float& m) {
      g *= s.g_factor;
      m += (1 - s.beta1) * (g - m);
      g = (1 - s.beta1) * g + s.beta1 * m;
    }, g, m);
    store(u.p, i, g);
    store(u.m, i, m);
  }
};

// p moves along g, the direction
struct Descend {
  template <class V>
  static __device__ void at(const StepNumbers& s, const Update& u, long i) {
    V p = load<V>(u.p, i), g = load<V>(u.g, i), ema = load<V>(u.ema, i);
    each([&](float& p, float& ema, float g) {
      p -= s.lr * (u.length * g + u.decay * p);
      ema += s.ema_share * (p - ema);
    }, p, ema, g);
    store(u.p, i, p);
    store(u.ema, i, ema);
  }
};
static_assert(sizeof(Table) + sizeof(void*) <= 4096, "the arguments of a launch");

int pieces(const Update& u) { return int((u.n + PIECE - 1) / PIECE); }

// f(table) for up to `most` arrays at a time.
template <class F>
void tables(const Update* list, int count, int most, const F& f) {
  Table table;
  table.count = table.first[0] = 0;
  for (int i = 0; i < count; i++) {
    if (list[i].n > 0) {
      int k = table.count++;
      table.list[k] = list[i];
      table.first[k + 1] = table.first[k] + pieces(list[i]);
    }
    if (table.count == most || (i == count - 1 && table.count > 0)) {
      f(table, table.first[table.count]);
      table.count = 0;
    }
  }
}

template <class Op>
void update(const Ladder& ladder, const Update* list, int count, const StepNumbers* numbers) {
  int rung = ladder.rung();
  tables(list, count, rung == 1 ? 1 : ARRAYS, [&](const Table& table, int blocks) {
    if (rung == 3)
      LAUNCH((update_pieces<Op, float4>), blocks, THREADS, 0, stream(), table, numbers);
    else
      LAUNCH((update_pieces<Op, float>), blocks, THREADS, 0, stream(), table, numbers);
  });
}

}  // namespace

void adamw(const Update* list, int count, const StepNumbers* numbers) { update<AdamW>(adamw_ladder, list, count, numbers); }
void momentum(const Update* list, int count, const StepNumbers* n) { update<Momentum>(momentum_ladder, list, count, n); }
void descend(const Update* list, int count, const StepNumbers* n) { update<Descend>(descend_ladder, list, count, n); }

void gradient_norm(float* y, const Update* list, int count) {
  int rung = norm_ladder.rung();
  long partials = 0;
  for (int i = 0; i < count; i++) partials += pieces(list[i]);
  float *partial = workspace(partials), *next = partial;
  tables(list, count, rung == 1 ? 1 : ARRAYS, [&](const Table& table, int blocks) {
    if (rung == 3)
      LAUNCH(squares_of_pieces<float4>, blocks, THREADS, 0, stream(), table, next);
    else
      LAUNCH(squares_of_pieces<float>, blocks, THREADS, 0, stream(), table, next);
    next += blocks;
  });
  LAUNCH(root_of_partials, 1, 1024, 0, stream(), y, partial, partials);
}

}  // namespace minidiff::cuda
