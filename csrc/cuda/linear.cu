// Linear layers on a GPU: y = activation(x W + bias + residual), and back. Three matrix products by one ladder of kernels:
//
//   forward   y  (M, N) = x (M, K)    W (K, N)         dz = dy through the activation, in a pass that also sums db
//   backward  dx (M, K) = dz (M, N)   W^T (N, K)       W^T is read as it is stored: lines along k
//             dW (K, N) = x^T (K, M)  dz (M, N)        x^T likewise: lines across k
//
//            N                          The floor of a product: 2 M N K operations, and 4 (M K + K N + M N) bytes, each
//        ┌──────┬─────┐                 number read or written once. A tile of R rows and C columns loads R + C numbers
//        │      │░░░░░│ K   W           for R C multiply-adds a step of k, so tiles are what brings one near the other:
//        ├──────┼─────┤
//   K    │      │  k  │                   one number    1 float for half a multiply-add      all from memory
//  ┌───┐ ├──────┼─────┤                   32 x 32       1 for 16                             through shared memory
//  │▒▒▒│ │      │█████│ R  y              128 x 128     1 for 64                             sums in registers, 8 x 8 a
//  └───┘ └──────┴─────┘                                                                      thread: 1 for 4 from shared
//   x              C
//
// Where there are too few tiles for the multiprocessors, as with few rows or in dW, K is split: each part's sums go to the
// workspace and a second kernel adds them up in order. Bias, residual and activation follow while the sums are still on the
// chip (finish_tile in product.h), or in that second kernel.
//
// On the tensor cores the factors are rounded to bf16 in a pass of their own, 6 bytes a number once (4 read, 2 written).
// Loading a tile then takes 2 bytes a number less each time: N / 128 times for x, M / 128 times for W. Rounding while
// loading would win below N of about 400; but then numbers pass through registers instead of cp.async, and only the pass
// can align every row to 16 bytes. In the backward x, W and dz are each loaded by one product at least, and dz is rounded
// by the pass that computes it.
#include <algorithm>
#include <type_traits>

#include "ladder.h"
#include "product.h"
#include "stream.h"

// cp.async and the tensor cores' bf16: for older devices these kernels are empty, and the ladder never takes them.
#if __CUDA_ARCH__ >= 800 || !defined(__CUDACC__)
#define SM_80 1
#endif

namespace minidiff::cuda {
namespace {

enum Rungs { NAIVE = 1, COALESCED, SHARED, REGISTERS, VECTOR, PREFETCH, CP_ASYNC, TF32, BF16 };

Ladder linear("linear", {
    {"naive", "one thread a number of y; a warp's threads are below each other"},
    {"coalesced", "a warp's threads are beside each other: their numbers of W lie together, that of x is the same for all"},
    {"shared", "32 x 32 threads load tiles of x and W into shared memory, and read each number 32 times from there"},
    {"registers", "8 x 8 sums a thread: 16 numbers from shared memory for 64 multiply-adds; K may be split"},
    {"vector", "tiles are loaded 4 floats at a time"},
    {"prefetch", "two tiles in shared memory: the next one is on its way in registers while this one is multiplied"},
    {"cp_async", "the next tile is copied past the registers, and is twice as deep", 80},
    {"tensor_cores_tf32", "mma.sync multiplies: factors rounded to tf32, sums in float32", 80, Operands::tf32},
    {"tensor_cores_bf16", "factors rounded to bf16 beforehand; ldmatrix, swizzled tiles, three on their way", 80,
     Operands::bf16},
});

constexpr int SQUARE = 32;

// A block of the first three rungs is a square of y; with GEGLU (two sides) a thread also has its output's gate.
struct Corner {
  long row, column;
  __device__ explicit Corner(const Product<float>& p) {
    unsigned across = unsigned(tiles_of(p.out.columns, SQUARE));
    row = long(blockIdx.x / across) * SQUARE, column = long(blockIdx.x % across) * SQUARE;
  }
};

template <int SIDES>
__device__ __forceinline__ void one_output(const Product<float>& p, long i, long j) {
  if (i >= p.M || j >= p.out.columns) return;
  float sums[2] = {0, 0};
  for (long k = 0; k < p.K; k++)
#pragma unroll
    for (int side = 0; side < SIDES; side++) sums[side] += *p.a.at(i, k) * *p.b.at(j + side * p.second, k);
  finish<1>(p.out, i, j, sums, sums + 1);
}

template <int SIDES>
__global__ void naive(Product<float> p) {
  Corner c(p);
  one_output<SIDES>(p, c.row + threadIdx.x, c.column + threadIdx.y);
}

// As naive, x and y exchanged.
template <int SIDES>
__global__ void coalesced(Product<float> p) {
  Corner c(p);
  one_output<SIDES>(p, c.row + threadIdx.y, c.column + threadIdx.x);
}

// As coalesced, but each number is loaded once a block and step of 32 ks. Neighbours in a warp load neighbours in memory.
template <int SIDES>
__global__ void shared_tiles(Product<float> p) {
  __shared__ float a[SQUARE][SQUARE + 1], b[SIDES][SQUARE][SQUARE + 1];  // [k][line]
  Corner corner(p);
  int x = threadIdx.x, y = threadIdx.y;
  auto load = [&](float(&to)[SQUARE][SQUARE + 1], const Operand<float>& o, long first, int lines, long k0) {
    int line = o.along_k ? y : x, k = o.along_k ? x : y;
    to[k][line] = line < lines && k0 + k < p.K ? *o.at(first + line, k0 + k) : 0;
  };
  int rows = int(p.M - corner.row < SQUARE ? p.M - corner.row : SQUARE);
  int columns = int(p.out.columns - corner.column < SQUARE ? p.out.columns - corner.column : SQUARE);
  float sums[2] = {0, 0};
  for (long k0 = 0; k0 < p.K; k0 += SQUARE) {
    load(a, p.a, corner.row, rows, k0);
#pragma unroll
    for (int side = 0; side < SIDES; side++) load(b[side], p.b, corner.column + side * p.second, columns, k0);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < SQUARE; k++)
#pragma unroll
      for (int side = 0; side < SIDES; side++) sums[side] += a[k][y] * b[side][k][x];
    __syncthreads();
  }
  if (y < rows && x < columns) finish<1>(p.out, corner.row + y, corner.column + x, sums, sums + 1);
}

// As shared_tiles, but a thread's outputs are an 8 x 8 of a larger tile.
template <class T>
__global__ void __launch_bounds__(T::threads, T::resident) register_tiles(Product<float> p) {
  __shared__ __align__(16) Shared<T, 1> shared;
  auto &a = shared.tiles.a[0], &b = shared.tiles.b[0];
  Place<T> place(p);
  Outputs<T> outputs;
  auto load = [&](auto& to, const Operand<float>& o, const Lines& lines, long k0) {
    constexpr int EXTENT = sizeof(to[0]) / sizeof(float) - PAD;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < EXTENT * T::depth; i += T::threads) {
      int line = o.along_k ? i / T::depth : i % EXTENT, k = o.along_k ? i % T::depth : i / EXTENT;
      long number = lines.number<EXTENT>(line);
      to[k][line] = number < lines.end<EXTENT>(line) && k0 + k < place.k + place.ks ? *o.at(number, k0 + k) : 0;
    }
  };
  for (long k = place.k; k < place.k + place.ks; k += T::depth) {
    load(a, p.a, place.rows, k);
    load(b, p.b, place.columns, k);
    __syncthreads();
    outputs.add(a, b);
    __syncthreads();
  }
  finish_tile(outputs, shared.staged, p, place);
}

// As register_tiles, but loading 4 floats at a time, and the way the operands are stored known to the compiler.
template <class T, bool A_ALONG_K, bool B_ALONG_K>
__global__ void __launch_bounds__(T::threads, T::resident) vector_loads(Product<float> p) {
  __shared__ __align__(16) Shared<T, 1> shared;
  auto &a = shared.tiles.a[0], &b = shared.tiles.b[0];
  Place<T> place(p);
  Outputs<T> outputs;
  Fetched<T::rows, T::depth, T::threads, A_ALONG_K> of_a(p.a, place.rows, place.k);
  Fetched<T::columns, T::depth, T::threads, B_ALONG_K> of_b(p.b, place.columns, place.k);
  for (int left = place.ks; left > 0; left -= T::depth) {
    of_a.fetch(p.a, place.of_step(left));
    of_b.fetch(p.b, place.of_step(left));
    of_a.store(a);
    of_b.store(b);
    __syncthreads();
    outputs.add(a, b);
    __syncthreads();
  }
  finish_tile(outputs, shared.staged, p, place);
}

// As vector_loads, but the loads of the next tile run while this one is multiplied, and one barrier a tile is enough: the
// tile that a store overwrites was last read before the barrier.
template <class T, bool A_ALONG_K, bool B_ALONG_K>
__global__ void __launch_bounds__(T::threads, T::resident) prefetched(Product<float> p) {
  __shared__ __align__(16) Shared<T, 2> shared;
  auto &a = shared.tiles.a, &b = shared.tiles.b;
  Place<T> place(p);
  Outputs<T> outputs;
  Fetched<T::rows, T::depth, T::threads, A_ALONG_K> of_a(p.a, place.rows, place.k);
  Fetched<T::columns, T::depth, T::threads, B_ALONG_K> of_b(p.b, place.columns, place.k);
  of_a.fetch(p.a, place.of_step(place.ks));
  of_b.fetch(p.b, place.of_step(place.ks));
  int now = 0;
  for (int left = place.ks; left > 0; left -= T::depth, now ^= 1) {
    of_a.store(a[now]);
    of_b.store(b[now]);
    __syncthreads();
    of_a.fetch(p.a, place.of_step(left - T::depth));
    of_b.fetch(p.b, place.of_step(left - T::depth));
    outputs.add(a[now], b[now]);
  }
  finish_tile(outputs, shared.staged, p, place);
}

// As prefetched, but by cp.async. S: how the tiles are multiplied, by a thread's own arithmetic (Outputs) or by the tensor
// cores (Fragments).
template <class T, class S, bool A_ALONG_K, bool B_ALONG_K>
__global__ void __launch_bounds__(T::threads, T::resident) double_buffered(Product<float> p) {
#ifdef SM_80
  __shared__ __align__(16) Shared<T, 2> shared;
  auto &a = shared.tiles.a, &b = shared.tiles.b;
  Place<T> place(p);
  S sums;
  Copied<T::rows, T::depth, T::threads, A_ALONG_K> of_a(p.a, place.rows, place.k);
  Copied<T::columns, T::depth, T::threads, B_ALONG_K> of_b(p.b, place.columns, place.k);
  if (place.ks > 0) {
    of_a.copy(a[0], p.a, place.of_step(place.ks));
    of_b.copy(b[0], p.b, place.of_step(place.ks));
  }
  int now = 0;
  for (int left = place.ks; left > 0; left -= T::depth, now ^= 1) {
    cp_async_wait_all();
    __syncthreads();
    if (left > T::depth) {
      of_a.copy(a[now ^ 1], p.a, place.of_step(left - T::depth));
      of_b.copy(b[now ^ 1], p.b, place.of_step(left - T::depth));
    }
    sums.add(a[now], b[now]);
  }
  finish_tile(sums, shared.staged, p, place);
#endif
}

// As double_buffered, in bf16, with STAGES - 1 tiles under way. A group is committed each step even if it is empty: the
// wait then always means the same tile.
template <class T, class S, int STAGES, bool A_ALONG_K, bool B_ALONG_K>
__global__ void __launch_bounds__(T::threads, T::resident) tensor_cores(Product<__nv_bfloat16> p) {
#ifdef SM_80
  using A = Swizzled<T::rows, T::depth, A_ALONG_K>;
  using B = Swizzled<T::columns, T::depth, B_ALONG_K>;
  SHARED_DYNAMIC(__nv_bfloat16, tiles);
  Place<T> place(p);
  S sums;
  auto a = [&](int stage) { return tiles + stage * (A::SIZE + B::SIZE); };
  auto b = [&](int stage) { return a(stage) + A::SIZE; };
  auto copy = [&](int stage, int done) {
    if (done < place.ks) {
      A::template copy<T::threads>(a(stage), p.a, place.rows, place.k + done, place.of_step(place.ks - done));
      B::template copy<T::threads>(b(stage), p.b, place.columns, place.k + done, place.of_step(place.ks - done));
    }
    cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) copy(stage, stage * T::depth);
  int now = 0;
  for (int done = 0; done < place.ks; done += T::depth) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    copy(now == 0 ? STAGES - 1 : now - 1, done + (STAGES - 1) * T::depth);
    sums.template add<A, B>(a(now), b(now));
    now = now + 1 == STAGES ? 0 : now + 1;
  }
  finish_tile(sums, reinterpret_cast<float(*)[T::columns + STAGE_PAD]>(tiles), p, place);
#endif
}

constexpr int WIDE = 32, HIGH = 8;  // threads of a block in the kernels that pass over rows

struct Spot {
  long row, column;
  __device__ Spot(long columns, int width) {
    unsigned across = unsigned(tiles_of(columns, WIDE * width));
    row = long(blockIdx.x / across) * HIGH + threadIdx.y;
    column = (long(blockIdx.x % across) * WIDE + threadIdx.x) * width;
  }
};
unsigned spots(long rows, long columns, int width) {
  return unsigned(tiles_of(rows, HIGH) * tiles_of(columns, long(WIDE) * width));
}

// y from the sums over all parts of K, V columns a thread.
template <int V>
__global__ void add_parts(Epilogue out, const float* partial, long M, int parts) {
  Spot at(out.columns, V);
  if (at.row >= M || at.column >= out.columns) return;
  float sums[2][V] = {}, part[V];
  const float* from = partial + at.row * out.N + at.column;
#pragma unroll 4
  for (int i = 0; i < parts; i++, from += M * out.N) {
    load_row(part, from, true, V);
#pragma unroll
    for (int c = 0; c < V; c++) sums[0][c] += part[c];
    if (out.activation != GEGLU) continue;
    load_row(part, from + out.columns, true, V);
#pragma unroll
    for (int c = 0; c < V; c++) sums[1][c] += part[c];
  }
  finish<V>(out, at.row, at.column, sums[0], sums[1]);
}

// (rows, columns) as bf16, rows `stride` apart, four numbers a thread; what is behind a row's last number in its four is 0.
__global__ void round_to_bf16(__nv_bfloat16* to, const float* from, long rows, long columns, long stride, bool vector) {
  Spot at(columns, 4);
  if (at.row >= rows || at.column >= columns) return;
  float v[4];
  load_row(v, from + at.row * columns + at.column, vector, columns - at.column < 4 ? int(columns - at.column) : 4);
  *reinterpret_cast<uint2*>(to + at.row * stride + at.column) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}

__device__ void put(float* to, float v) { *to = v; }
__device__ void put(__nv_bfloat16* to, float v) { *to = __float2bfloat16_rn(v); }

// dz = dy phi'(z), rows `stride` apart, and the sums of dz over each band of rows, (bands, N). A thread goes down a column
// of its band in steps of HIGH; the HIGH sums of a column are then added as a tree.
template <class T>
__global__ void gradient_of_sums(T* dz, long stride, float* sums, const float* dy, const float* z, long M, long columns,
                                 int activation, long band) {
  __shared__ float tree[2][HIGH][WIDE];
  unsigned across = unsigned(tiles_of(columns, WIDE));
  long number = blockIdx.x / across, j = long(blockIdx.x % across) * WIDE + threadIdx.x;
  long end = (number + 1) * band < M ? (number + 1) * band : M;
  bool geglu = activation == GEGLU;
  long N = geglu ? 2 * columns : columns;
  Gate gate(activation);
  float mine[2] = {0, 0};
  if (j < columns)
#pragma unroll 4
    for (long i = number * band + threadIdx.y; i < end; i += HIGH) {
      float d[2] = {dy[i * columns + j], 0};
      if (geglu) {
        float a = z[i * N + j], g = z[i * N + columns + j], phi = gate.phi(g);
        d[1] = d[0] * a * (phi + g * gate.slope(g, phi));
        d[0] *= g * phi;
      } else if (activation != NO_ACTIVATION) {
        float x = z[i * N + j], phi = gate.phi(x);
        d[0] *= phi + x * gate.slope(x, phi);
      }
      mine[0] += d[0], mine[1] += d[1];
      if (dz) put(dz + i * stride + j, d[0]);
      if (dz && geglu) put(dz + i * stride + columns + j, d[1]);
    }
  if (!sums) return;
  for (int side = 0; side < 2; side++) tree[side][threadIdx.y][threadIdx.x] = mine[side];
  for (int half = HIGH / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.y) < half)
      for (int side = 0; side < 2; side++)
        tree[side][threadIdx.y][threadIdx.x] += tree[side][threadIdx.y + half][threadIdx.x];
  }
  if (threadIdx.y > 0 || j >= columns) return;
  sums[number * N + j] = tree[0][0][threadIdx.x];
  if (geglu) sums[number * N + columns + j] = tree[1][0][threadIdx.x];
}

long round_up(long n, long to) { return tiles_of(n, to) * to; }
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The size of tiles, and the parts of K. Large tiles, if they and parts of at least 512 fill the chip; small ones need more
// blocks, as they have fewer threads.
struct Plan {
  bool large = false;
  int parts = 1;
  long part = 0;

  Plan(int rung, long M, long N, long K) : part(K) {
    constexpr long STEP = 32, MOST = 64;
    if (rung < REGISTERS || M == 0 || N == 0) return;
    long chip = multiprocessors(), many = tiles_of(M, 128) * tiles_of(N, 128);
    large = many * std::clamp(K / 512, 1L, MOST) >= chip;
    long tiles = large ? many : tiles_of(M, 64) * tiles_of(N, 64);
    long wanted = std::clamp((large ? 2 : 4) * chip / tiles, 1L, std::clamp(K / (large ? 512 : 128), 1L, MOST));
    part = std::max(STEP, round_up(tiles_of(K, wanted), STEP));
    parts = std::max(1, int(tiles_of(K, part)));  // a part of 2^31 would need arrays larger than any memory
  }
  size_t floats(long M, long N) const { return parts > 1 ? size_t(parts) * M * N : 0; }
};

template <class T, class Deep, bool A, bool B>
void launch_tiles(int rung, const Plan& plan, const Product<float>& p) {
  dim3 grid = grid_of<T>(p, plan.parts);
  using Cores = Fragments<Deep, 64, 32>;
  if (rung == REGISTERS) LAUNCH(register_tiles<T>, grid, T::threads, 0, stream(), p);
  if (rung == VECTOR) LAUNCH((vector_loads<T, A, B>), grid, T::threads, 0, stream(), p);
  if (rung == PREFETCH) LAUNCH((prefetched<T, A, B>), grid, T::threads, 0, stream(), p);
  if (rung == CP_ASYNC) LAUNCH((double_buffered<Deep, Outputs<Deep>, A, B>), grid, T::threads, 0, stream(), p);
  if (rung == TF32) LAUNCH((double_buffered<Deep, Cores, A, B>), grid, T::threads, 0, stream(), p);
}
template <bool A, bool B>
void launch(int rung, const Plan& plan, const Product<float>& p) {
  if (plan.large)
    launch_tiles<Tile<128, 128, 8, 256, 2>, Tile<128, 128, 16, 256, 2>, A, B>(rung, plan, p);
  else
    launch_tiles<Tile<64, 64, 8, 64, 6>, Tile<64, 64, 16, 64, 6>, A, B>(rung, plan, p);
}

template <class T, class S, bool A, bool B>
void launch_cores(const Plan& plan, const Product<__nv_bfloat16>& p) {
  constexpr int STAGES = 4;
  size_t bytes = size_t(STAGES) * (T::rows + T::columns) * T::depth * sizeof(__nv_bfloat16);
  LAUNCH((tensor_cores<T, S, STAGES, A, B>), grid_of<T>(p, plan.parts), T::threads, bytes, stream(), p);
}
template <bool A, bool B>
void launch(int, const Plan& plan, const Product<__nv_bfloat16>& p) {
  using Large = Tile<128, 128, 32, 128, 2>;
  using Small = Tile<64, 64, 32, 128, 4>;
  if (plan.large)
    launch_cores<Large, Fragments<Large, 64, 64>, A, B>(plan, p);
  else
    launch_cores<Small, Fragments<Small, 32, 32>, A, B>(plan, p);
}

template <int SIDES>
void launch_squares(int rung, const Product<float>& p) {
  unsigned grid = unsigned(tiles_of(p.M, SQUARE) * tiles_of(p.out.columns, SQUARE));
  dim3 block(SQUARE, SQUARE);
  if (rung == NAIVE) LAUNCH(naive<SIDES>, grid, block, 0, stream(), p);
  if (rung == COALESCED) LAUNCH(coalesced<SIDES>, grid, block, 0, stream(), p);
  if (rung == SHARED) LAUNCH(shared_tiles<SIDES>, grid, block, 0, stream(), p);
}

template <class T>
void launch(int rung, const Plan& plan, const Product<T>& p) {
  if (!p.a.along_k)
    launch<false, false>(rung, plan, p);
  else if (p.b.along_k)
    launch<true, true>(rung, plan, p);
  else
    launch<true, false>(rung, plan, p);
}

// partial: plan.floats(M, N). With GEGLU and one part, p.b is stored so that the gates begin at line p.second.
template <class T>
void multiply(int rung, const Plan& plan, Product<T> p, float* partial) {
  if (p.M == 0 || p.out.columns == 0) return;
  if constexpr (std::is_same<T, float>::value)
    if (rung < REGISTERS)
      return p.out.activation == GEGLU ? launch_squares<2>(rung, p) : launch_squares<1>(rung, p);
  Epilogue out = p.out;
  p.part = plan.part;
  if (plan.parts > 1) p.out = {partial, nullptr, nullptr, nullptr, p.N, p.N, NO_ACTIVATION, p.N % 4 == 0};
  launch(rung, plan, p);
  if (plan.parts == 1) return;
  dim3 block(WIDE, HIGH);
  if (out.vector)
    LAUNCH(add_parts<4>, spots(p.M, out.columns, 4), block, 0, stream(), out, partial, p.M, plan.parts);
  else
    LAUNCH(add_parts<1>, spots(p.M, out.columns, 1), block, 0, stream(), out, partial, p.M, plan.parts);
}

// Pieces of the workspace, aligned to 256 bytes.
struct Slices {
  float* next;
  float* take(size_t floats) {
    float* p = next;
    next += size(floats);
    return p;
  }
  static size_t size(size_t floats) { return round_up(long(floats), 64); }
};

long bf16_stride(long columns) { return round_up(columns, 8); }
size_t bf16_floats(long rows, long columns) { return rows * bf16_stride(columns) / 2; }

const __nv_bfloat16* rounded(const float* from, long rows, long columns, float* room) {
  auto to = reinterpret_cast<__nv_bfloat16*>(room);
  if (rows && columns)
    LAUNCH(round_to_bf16, spots(rows, columns, 4), dim3(WIDE, HIGH), 0, stream(), to, from, rows, columns,
           bf16_stride(columns), columns % 4 == 0 && aligned(from));
  return to;
}

Operand<float> operand(const float* data, long stride, bool along_k) {
  return {data, stride, along_k, stride % 4 == 0 && aligned(data)};
}
Operand<__nv_bfloat16> operand(const __nv_bfloat16* data, long columns, bool along_k) {
  return {data, bf16_stride(columns), along_k, true};
}
Epilogue plain(float* y, long N) { return {y, nullptr, nullptr, nullptr, N, N, NO_ACTIVATION, N % 4 == 0 && aligned(y)}; }

// dz (M, N) for dx and dw, x and w as the ladder's rung wants them.
template <class T>
void input_and_weight_gradients(int rung, const Linear& l, const T* dz, const T* x, const T* w, float* dx, float* dw,
                                const Plan& of_dx, const Plan& of_dw, float* partial) {
  long M = l.M, K = l.K, N = l.N;
  if (dx) {
    Product<T> p{operand(dz, N, true), operand(w, l.transposed ? K : N, !l.transposed), M, K, N, 0, 0, plain(dx, K)};
    multiply(rung, of_dx, p, partial);
  }
  if (dw) {
    Operand<T> of_x = operand(x, K, false), of_dz = operand(dz, N, false);
    Product<T> p = l.transposed ? Product<T>{of_dz, of_x, N, K, M, 0, 0, plain(dw, K)}
                                : Product<T>{of_x, of_dz, K, N, M, 0, 0, plain(dw, N)};
    multiply(rung, of_dw, p, partial);
  }
}

}  // namespace

void linear_forward(const Linear& l) {
  bool geglu = l.activation == GEGLU;
  long M = l.M, K = l.K, N = l.N, columns = geglu ? N / 2 : N;
  if (M == 0 || columns == 0) return;
  int rung = linear.rung();
  Plan plan(rung, M, N, K);
  Epilogue out{l.y, l.z, l.bias, l.residual, N, columns, l.activation,
               columns % 4 == 0 && aligned(l.y) && aligned(l.z) && aligned(l.bias) && aligned(l.residual)};
  long row = l.transposed ? K : N;  // of w as it is stored
  if (rung != BF16) {
    Product<float> p{operand(l.x, K, true), operand(l.w, row, l.transposed), M, N, K, columns, 0, out};
    if (geglu) p.b.vector &= columns % 4 == 0;
    return multiply(rung, plan, p, workspace(plan.floats(M, N)));
  }
  // The gates' columns are aligned as well: a row of w is rounded as two. Parts are summed before they meet their gates.
  long halves = geglu && plan.parts == 1 ? 2 : 1, rows = (l.transposed ? N : K) * halves;
  size_t of_x = bf16_floats(M, K), of_w = bf16_floats(rows, row / halves);
  Slices room{workspace(Slices::size(of_x) + Slices::size(of_w) + plan.floats(M, N))};
  auto x = rounded(l.x, M, K, room.take(of_x)), w = rounded(l.w, rows, row / halves, room.take(of_w));
  Product<__nv_bfloat16> p{operand(x, K, true), operand(w, row / halves, l.transposed), M, N, K, bf16_stride(columns), 0,
                           out};
  p.b.stride *= halves;
  multiply(rung, plan, p, room.next);
}

void linear_backward(const Linear& l, const float* dy, float* dx, float* dw, float* db) {
  long M = l.M, K = l.K, N = l.N, columns = l.activation == GEGLU ? N / 2 : N;
  int rung = linear.rung();
  bool bf16 = rung == BF16, own_dz = (dx || dw) && (bf16 || l.activation != NO_ACTIVATION);
  long rows_of_w = l.transposed ? N : K, row = l.transposed ? K : N;
  Plan of_dx(rung, M, K, N), of_dw(rung, rows_of_w, row, M);
  long bands = std::clamp(8L * multiprocessors() / std::max(1L, tiles_of(columns, WIDE)), 1L, std::max(1L, tiles_of(M, 64)));
  size_t of_dz = !own_dz ? 0 : bf16 ? bf16_floats(M, N) : M * N, of_sums = db && bands > 1 ? bands * N : 0;
  size_t of_x = bf16 && dw ? bf16_floats(M, K) : 0, of_w = bf16 && dx ? bf16_floats(rows_of_w, row) : 0;
  size_t of_parts = std::max(dx ? of_dx.floats(M, K) : 0, dw ? of_dw.floats(K, N) : 0);
  Slices room{workspace(Slices::size(of_dz) + Slices::size(of_sums) + Slices::size(of_x) + Slices::size(of_w) + of_parts)};
  float *dz = room.take(of_dz), *sums = bands > 1 ? room.take(of_sums) : db;
  if (!db) sums = nullptr;

  if (columns && (db || (own_dz && M))) {
    dim3 block(WIDE, HIGH);
    unsigned across = unsigned(tiles_of(columns, WIDE));
    long band = tiles_of(M, bands);
    unsigned grid = unsigned(across * bands);
    if (bf16)
      LAUNCH(gradient_of_sums<__nv_bfloat16>, grid, block, 0, stream(),
             own_dz ? reinterpret_cast<__nv_bfloat16*>(dz) : nullptr, bf16_stride(N), sums, dy, l.z, M, columns,
             l.activation, band);
    else
      LAUNCH(gradient_of_sums<float>, grid, block, 0, stream(), own_dz ? dz : nullptr, N, sums, dy, l.z, M, columns,
             l.activation, band);
    if (db && bands > 1)
      LAUNCH(gradient_of_sums<float>, unsigned(tiles_of(N, WIDE)), block, 0, stream(), nullptr, 0, db, sums, nullptr, bands,
             N, NO_ACTIVATION, bands);
  }
  if (!bf16)
    return input_and_weight_gradients(rung, l, own_dz ? dz : dy, l.x, l.w, dx, dw, of_dx, of_dw, room.next);
  float *x = room.take(of_x), *w = room.take(of_w);
  input_and_weight_gradients(rung, l, reinterpret_cast<const __nv_bfloat16*>(dz), dw ? rounded(l.x, M, K, x) : nullptr,
                             dx ? rounded(l.w, rows_of_w, row, w) : nullptr, dx, dw, of_dx, of_dw, room.next);
}

}  // namespace minidiff::cuda
