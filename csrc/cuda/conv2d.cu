// Convolution: y = conv(x) + bias + shift + residual, SiLU of that; the gradients of its input and of its weights.
//
// A convolution is a product of matrices: a row of A is the window of the image under an output position, B holds the
// weights, (kh kw C) x N, and C is the result (implicit_gemm.h, which gathers A piece by piece, draws it). All three
// directions are such products, so they climb the same ladder:
//
//                rows m              sum over k             columns n      A                     B
//   forward      (b, i, j)           (tap, channel)         channel of y   windows of x          weights
//   dx           (b, row, column)    (tap, channel of y)    channel of x   windows of dy         weights, turned round
//   dw           (tap, channel)      (b, i, j)              channel of y   windows of x, ^T      dy
//
//   a block    ┌──── BN ────┐     walks along k: tiles of A (BM x 16) and B (16 x BN) go to shared memory,
//              │ ┌─┬─┬─┬─┐  │     every thread multiplies its rows with its columns
//        BM    │ ├─┼─┼─┼─┤  │     128 x 128 where there is enough of C to fill the chip, else 64 x 64; 128 x 8 or 16
//              │ ├─┼─┼─┼─┤  │     for few channels. Where even so there are too few blocks (one small image), k is
//              └────────────┘     split between several, and a second pass adds their sums in a fixed order.
//
// dx with an upsampled input: pixel r of x is read as pixels up r + a of the seen image (a < up), by tap p at output
// up r + a + top - p. Taps with the same a - p meet the same dy, so their weights are added beforehand: a kernel of
// kh + up - 1 taps, with stride `up`, where running over all would cost up^2 times kh kw. A forward stride s: Part.
//
// Floors: 2 B H W kh kw C N operations for each of the three, and 4 (B h w C + kh kw C N + B H W N) bytes, x, weights and y
// once. With C = N channels a 3x3 kernel does 2.25 C operations a byte. An H100 does 20 (fp32) or 300 (bf16) in the time it
// moves one, so arithmetic rules from about 9 channels on, or 130. dshift reads dy once: 4 B H W N bytes.
//
// The bf16 rung rounds x, dy and the weights in passes of their own (6 bytes a number), since the product reads each number
// of x up to kh kw times from the second-level cache: rounding while it loads would double those bytes, which are what
// limits it. The pass also lays two inputs side by side and pads channels to chunks of 8: no ragged case is left.
#include <algorithm>
#include <initializer_list>

#include "implicit_gemm.h"
#include "ladder.h"

namespace minidiff::cuda {
namespace {

enum { NAIVE = 1, SHARED_TILES, REGISTER_TILES, PIPELINED, TENSOR_CORES };

const std::vector<Rung> RUNGS = {
    {"naive", "one thread a number of the result, all operands from global memory"},
    {"shared tiles", "implicit GEMM: 16 x 16 threads share tiles of both factors; 16 times fewer global loads"},
    {"register tiles", "8 x 8 sums a thread: 8 times fewer shared loads; 16-byte copies; windows found without divisions"},
    {"pipelined", "cp.async copies the next tiles while these are multiplied", 80},
    {"tensor cores", "bf16 operands, ldmatrix and mma.sync; four tiles under way", 80, Operands::bf16},
};
Ladder forward_ladder("conv2d", RUNGS);
Ladder dx_ladder("conv2d_dx", RUNGS);
Ladder dw_ladder("conv2d_dw", RUNGS);

// ---- v1 naive: the definitions

__global__ void naive_forward(Conv c) {
  long index = long(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= long(c.B) * c.H * c.W * c.N) return;
  int n = int(index % c.N), j = int(index / c.N % c.W), i = int(index / c.N / c.W % c.H), C = c.C1 + c.C2;
  long b = index / c.N / c.W / c.H;
  float y = 0;
  for (int p = 0; p < c.kh; p++)
    for (int q = 0; q < c.kw; q++) {
      int row = c.stride * i + p - c.top, column = c.stride * j + q - c.left;
      if (row < 0 || row >= c.h * c.up || column < 0 || column >= c.w * c.up) continue;
      long pixel = (b * c.h + row / c.up) * c.w + column / c.up;
      const float* w = c.weights + long(p * c.kw + q) * C * c.N + n;
      for (int k = 0; k < c.C1; k++) y += c.x[pixel * c.C1 + k] * w[long(k) * c.N];
      for (int k = 0; k < c.C2; k++) y += c.x2[pixel * c.C2 + k] * w[long(c.C1 + k) * c.N];
    }
  if (c.bias) y += c.bias[n];
  if (c.shift) y += c.shift[b * c.N + n];
  if (c.residual) y += c.residual[index];
  c.y[index] = c.silu ? activated<SILU>(y) : y;
}

// dx (B, h, w, C): of the input whose first channel is `first`.
__global__ void naive_dx(Conv c, const float* dy, float* dx, int first, int C) {
  long index = long(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= long(c.B) * c.h * c.w * C) return;
  int k = int(index % C), column = int(index / C % c.w), row = int(index / C / c.w % c.h);
  long b = index / C / c.w / c.h;
  float sum = 0;
  for (int s = row * c.up; s < (row + 1) * c.up; s++)  // of the image as the convolution sees it
    for (int t = column * c.up; t < (column + 1) * c.up; t++)
      for (int p = 0; p < c.kh; p++)
        for (int q = 0; q < c.kw; q++) {
          int i = s + c.top - p, j = t + c.left - q;  // stride times the position whose tap (p, q) is here
          if (i < 0 || i % c.stride || i / c.stride >= c.H || j < 0 || j % c.stride || j / c.stride >= c.W) continue;
          const float* d = dy + ((b * c.H + i / c.stride) * c.W + j / c.stride) * c.N;
          const float* w = c.weights + (long(p * c.kw + q) * (c.C1 + c.C2) + first + k) * c.N;
          for (int n = 0; n < c.N; n++) sum += d[n] * w[n];
        }
  dx[index] = sum;
}

__global__ void naive_dw(Conv c, const float* dy, float* dw) {
  int C = c.C1 + c.C2;
  long index = long(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= long(c.kh) * c.kw * C * c.N) return;
  int n = int(index % c.N), k = int(index / c.N % C), tap = int(index / c.N / C), p = tap / c.kw, q = tap % c.kw;
  const float* x = k < c.C1 ? c.x + k : c.x2 + (k - c.C1);
  int width = k < c.C1 ? c.C1 : c.C2;
  float sum = 0;
  for (long b = 0; b < c.B; b++)
    for (int i = 0; i < c.H; i++)
      for (int j = 0; j < c.W; j++) {
        int row = c.stride * i + p - c.top, column = c.stride * j + q - c.left;
        if (row < 0 || row >= c.h * c.up || column < 0 || column >= c.w * c.up) continue;
        sum += x[((b * c.h + row / c.up) * c.w + column / c.up) * width] * dy[((b * c.H + i) * c.W + j) * c.N + n];
      }
  dw[index] = sum;
}

// ---- v2 shared tiles: a block of 16 x 16 numbers of C reads 16 x 16 tiles of A and B once for all its threads

constexpr int SIDE = 16;

__device__ float window_number(const Product<float>& p, const Window& w, const Position& at, const Tap& t) {
  long pixel = t.p < w.kh ? pixel_under(w, at, t.p, t.q) : -1;
  return pixel < 0 ? 0.0f : *channel_at(p, pixel, t.c);
}

template <bool OF_WEIGHTS>
__global__ void shared_tiles(Product<float> p, long row_tiles) {
  // With OF_WEIGHTS threads side by side write below each other in A: 18 keeps these, and two such columns, in banks apart.
  __shared__ float A[SIDE][OF_WEIGHTS ? SIDE + 2 : SIDE], B[SIDE][SIDE];
  Share<OF_WEIGHTS> share(p, SIDE, SIDE, SIDE, row_tiles);
  if (share.m0 >= share.M) return;
  const Window& w = share.part.window;
  int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE, n = share.n0 + tx;
  Position position;
  long out_row;
  int image;
  share.find_row(p, share.m0 + ty, position, out_row, image);
  float sum = 0;
  for (long k0 = 0; k0 < share.K; k0 += SIDE) {
    long k = k0 + ty;
    if (OF_WEIGHTS) {
      int b, i, j;
      A[tx][ty] = k < share.K ? window_number(p, w, position_of(w, k, b, i, j), Tap(w, p.channels(), share.m0 + tx)) : 0.0f;
    } else {
      A[ty][tx] = window_number(p, w, position, Tap(w, p.channels(), k0 + tx));
    }
    B[ty][tx] = k < share.K && n < p.N ? p.matrix[(share.part.first_k * !OF_WEIGHTS + k) * p.columns + n] : 0.0f;
    __syncthreads();
    for (int i = 0; i < SIDE; i++) sum += A[ty][i] * B[i][tx];
    __syncthreads();
  }
  if (out_row >= 0) p.out.put(out_row, image, n, {sum});
}

// ---- v3 register tiles: a block brings a step's tiles to shared memory, waits, multiplies them, and waits again

template <class Tile, bool OF_WEIGHTS>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS) register_tiles(Product<float> p, long row_tiles) {
  __shared__ Rows<Tile::BM> rows;
  __shared__ __align__(128) float A[Tile::BM * STEP<float>], B[STEP<float> * Tile::BN];
  Share<OF_WEIGHTS> share(p, Tile::BM, Tile::BN, STEP<float>, row_tiles);
  if (share.m0 >= share.M) return;
  share.find_rows(p, rows);
  __syncthreads();
  typename GatherOf<Tile, false, OF_WEIGHTS>::type windows(p, share, rows);
  MatrixTiles<Tile, false> matrix(p, share);
  Tile tile;
  for (int step = 0; step < share.steps; step++) {
    windows.next(A), matrix.next(B);
    __syncthreads();
    tile.template multiply<OF_WEIGHTS>(A, B);
    __syncthreads();
  }
  tile.template finish<OF_WEIGHTS>(rows, share.n0, share.output(p));
}

// ---- v4 pipelined, v5 with tensor cores: STAGES pairs of tiles; while one is multiplied cp.async fills those behind it
//
//   step      0     1     2     3           one barrier a step: behind it all have this step's tiles, and nobody reads
//   copied    ├─2───┼─3───┼─4───┼─5──       those of the step before any more, whose place the next copies take
//   used      └─0───┴─1───┴─2───┴─3──       (3 stages)
template <class Tile, bool OF_WEIGHTS, int STAGES>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS) pipelined(Product<typename Tile::T> p, long row_tiles) {
  using T = typename Tile::T;
  constexpr int STAGE = (Tile::BM + Tile::BN) * STEP<T>;
  SHARED_DYNAMIC(unsigned char, memory);
  T* stages = reinterpret_cast<T*>(memory);
  auto& rows = *reinterpret_cast<Rows<Tile::BM>*>(stages + STAGES * STAGE);
  Share<OF_WEIGHTS> share(p, Tile::BM, Tile::BN, STEP<T>, row_tiles);
  if (share.m0 >= share.M) return;
  share.find_rows(p, rows);
  __syncthreads();
  typename GatherOf<Tile, true, OF_WEIGHTS>::type windows(p, share, rows);
  MatrixTiles<Tile, true> matrix(p, share);
  auto copy = [&](int stage, bool wanted) {
    T* A = stages + stage * STAGE;
    if (wanted) windows.next(A), matrix.next(A + Tile::BM * STEP<T>);
    cp_async_commit();
  };
  Tile tile;
  for (int s = 0; s < STAGES - 1; s++) copy(s, s < share.steps);
  for (int step = 0; step < share.steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    copy((step + STAGES - 1) % STAGES, step + STAGES - 1 < share.steps);
    const T* A = stages + step % STAGES * STAGE;
    tile.template multiply<OF_WEIGHTS>(A, A + Tile::BM * STEP<T>);
  }
  tile.template finish<OF_WEIGHTS>(rows, share.n0, share.output(p));
}
template <class Tile, int STAGES>
constexpr size_t pipeline_bytes() {
  return size_t(STAGES) * (Tile::BM + Tile::BN) * STEP_BYTES + sizeof(Rows<Tile::BM>);
}

// ---- passes before and after

// The weights (kh, kw, C, N) for the product that gives dx: kernel turned round, a row for each tap and channel of y, a
// column for each of the `wanted` channels of x from `first` on. The taps of an upsampled input are added, and those of a
// stride sorted by remainder (see Part). A tile passes through shared memory, so that reads and writes are both coalesced.
template <class T>
__global__ void turn_weights(T* out, int rows, int columns, Conv c, int first, int wanted, int kh, int kw) {
  __shared__ float tile[32][33];
  int tx = threadIdx.x % 32, ty = threadIdx.x / 32;
  long number = blockIdx.x;
  int across = (columns + 31) / 32, down = (rows + 31) / 32;
  int k0 = int(number % across) * 32, n0 = int(number / across % down) * 32, tap = int(number / across / down);
  int t = tap / kw, u = tap % kw, C = c.C1 + c.C2;
  for (int y = ty; y < 32; y += 8) {
    float sum = 0;
    int k = k0 + y, n = n0 + tx;
    if (k < wanted && n < c.N)
      for (int i = 0; i < c.up; i++)
        for (int j = 0; j < c.up; j++) {
          int p = i - t + c.kh - 1, q = j - u + c.kw - 1;
          if (p >= 0 && p < c.kh && q >= 0 && q < c.kw) sum += c.weights[(long(p * c.kw + q) * C + first + k) * c.N + n];
        }
    tile[y][tx] = sum;
  }
  __syncthreads();
  int s = c.stride, v = t % s, h = u % s;
  int place = taps_before(kh, s, v) * kw + (taps_before(kh, s, v + 1) - taps_before(kh, s, v)) * taps_before(kw, s, h) +
              t / s * (taps_before(kw, s, h + 1) - taps_before(kw, s, h)) + u / s;
  for (int y = ty; y < 32; y += 8) {
    int k = k0 + tx, n = n0 + y;
    if (k < columns && n < rows) out[(long(place) * rows + n) * columns + k] = T(tile[tx][y]);
  }
}

// Sums over positions, dy (B, positions, columns of V) -> out (parts, B, columns): a block has as many whole rows of threads
// as go into 256, so that a thread stays in its column and a warp reads on without a gap; four rows are under way at once.
template <class V>
__global__ void sum_positions(V* out, const V* dy, int B, long positions, int columns, int parts) {
  __shared__ V sums[256];
  int width = min(columns, 256), rows = 256 / width, row = threadIdx.x / width, across = (columns + width - 1) / width;
  long number = blockIdx.x, image = number / across;  // of all parts' images
  int column = int(number % across) * width + threadIdx.x % width, b = int(image % B), part = int(image / B);
  long end = positions * (part + 1) / parts;
  V sum[4] = {};
  if (row < rows && column < columns)
    for (long r = positions * part / parts + row; r < end; r += 4 * rows)
#pragma unroll
      for (int u = 0; u < 4; u++)
        if (r + u * rows < end) add(sum[u], dy[(b * positions + r + u * rows) * columns + column]);
  add(sum[0], sum[1]), add(sum[2], sum[3]), add(sum[0], sum[2]);
  sums[threadIdx.x] = sum[0];
  for (int left = rows; left > 1;) {
    int half = (left + 1) / 2;
    __syncthreads();
    if (row + half < left) {
      V both = sums[threadIdx.x];
      add(both, sums[threadIdx.x + half * width]);
      sums[threadIdx.x] = both;
    }
    left = half;
  }
  if (row == 0 && column < columns) out[image * columns + column] = sums[threadIdx.x];
}

// ---- the host's side

long ceiling(long n, long d) { return (n + d - 1) / d; }

template <class T>
int padded(int n) {
  return sizeof(T) == 2 ? int(ceiling(n, 8)) * 8 : n;
}
// Floats that so many numbers take in the workspace, in whole lines.
template <class T>
size_t room(size_t count) {
  return (count * sizeof(T) + 255) / 256 * 64;
}

bool in_chunks(std::initializer_list<const void*> pointers, std::initializer_list<int> widths) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % CHUNK_BYTES) return false;
  for (int n : widths)
    if (n % 4) return false;
  return true;
}

// How a product is cut into blocks.
enum Size { LARGE, SMALL, NARROW };
struct Plan {
  Size size = SMALL;
  int parts = 1;
  long rows = 0;  // of the largest part
};

template <class T>
constexpr int NARROW_WIDTH = sizeof(T) == 2 ? 16 : 8;

template <class T>
Plan plan(Product<T>& p, bool of_weights) {
  const Window& w = p.window;
  int s = p.spread;
  Plan plan;
  plan.parts = of_weights ? 1 : std::min(s, w.H) * std::min(s, w.W);
  long positions = p.B * ceiling(w.H, s) * ceiling(w.W, s), taps = ceiling(w.kh, s) * ceiling(w.kw, s);
  plan.rows = of_weights ? taps * p.channels() : positions;
  long steps = ceiling(of_weights ? positions : taps * p.channels(), STEP<T>), most = std::max(1L, steps / 8);
  auto tiles = [&](int BM, int BN) { return plan.parts * ceiling(plan.rows, BM) * ceiling(p.N, BN); };
  int wanted = 4 * multiprocessors();
  if (p.N <= NARROW_WIDTH<T>) {
    plan.size = NARROW;
    p.splits = int(std::clamp(wanted / std::max(1L, tiles(128, NARROW_WIDTH<T>)), 1L, most));
  } else if (plan.rows > 64 && p.N > 64 && tiles(128, 128) * most >= multiprocessors()) {
    plan.size = LARGE;  // two blocks a multiprocessor
    p.splits = int(std::clamp(wanted / 2 / std::max(1L, tiles(128, 128)), 1L, most));
  } else {
    p.splits = int(std::clamp(wanted / std::max(1L, tiles(64, 64)), 1L, most));
  }
  p.splits = std::max(p.splits, int(steps * STEP<T> >> 30) + 1);  // a block counts its k in an int
  return plan;
}

template <class T>
size_t partial_floats(const Product<T>& p) {
  return p.splits > 1 ? room<float>(size_t(p.splits) * p.out_rows * p.N) : 0;
}

template <class T>
unsigned blocks_of(const Product<T>& p, const Plan& plan, int BM, int BN) {
  return unsigned(plan.parts * p.splits * ceiling(plan.rows, BM) * ceiling(p.N, BN));
}

template <bool OF_WEIGHTS, class Tile>
void launch_registers(const Product<float>& p, const Plan& plan) {
  LAUNCH((register_tiles<Tile, OF_WEIGHTS>), blocks_of(p, plan, Tile::BM, Tile::BN), Tile::THREADS, 0, stream(), p,
         ceiling(plan.rows, Tile::BM));
}
template <bool OF_WEIGHTS, class Tile, int STAGES>
void launch_pipeline(const Product<typename Tile::T>& p, const Plan& plan) {
  LAUNCH((pipelined<Tile, OF_WEIGHTS, STAGES>), blocks_of(p, plan, Tile::BM, Tile::BN), Tile::THREADS,
         (pipeline_bytes<Tile, STAGES>()), stream(), p, ceiling(plan.rows, Tile::BM));
}

using LargeFloats = FloatTile<128, 128, 8, 8>;
using SmallFloats = FloatTile<64, 64, 8, 4>;
using NarrowFloats = FloatTile<128, NARROW_WIDTH<float>, 4, 4>;

template <bool OF_WEIGHTS>
void launch_product(const Product<float>& p, const Plan& plan, int rung) {
  if (rung == SHARED_TILES)
    LAUNCH((shared_tiles<OF_WEIGHTS>), blocks_of(p, plan, SIDE, SIDE), SIDE * SIDE, 0, stream(), p,
           ceiling(plan.rows, SIDE));
  else if (rung == REGISTER_TILES)
    plan.size == LARGE    ? launch_registers<OF_WEIGHTS, LargeFloats>(p, plan)
    : plan.size == NARROW ? launch_registers<OF_WEIGHTS, NarrowFloats>(p, plan)
                          : launch_registers<OF_WEIGHTS, SmallFloats>(p, plan);
  else
    plan.size == LARGE    ? launch_pipeline<OF_WEIGHTS, LargeFloats, 2>(p, plan)
    : plan.size == NARROW ? launch_pipeline<OF_WEIGHTS, NarrowFloats, 2>(p, plan)
                          : launch_pipeline<OF_WEIGHTS, SmallFloats, 2>(p, plan);
}
template <bool OF_WEIGHTS>
void launch_product(const Product<bf16>& p, const Plan& plan, int) {
  plan.size == LARGE    ? launch_pipeline<OF_WEIGHTS, TensorTile<128, 128, 64, 64, 2>, 4>(p, plan)
  : plan.size == NARROW ? launch_pipeline<OF_WEIGHTS, TensorTile<128, NARROW_WIDTH<bf16>, 32, 16, 4>, 4>(p, plan)
                        : launch_pipeline<OF_WEIGHTS, TensorTile<64, 64, 32, 32, 4>, 4>(p, plan);
}

void add_partial(const float* partial, int splits, long rows, long rows_an_image, const Output& out) {
  int N = out.N1 + out.N2;
  if (out.vectors)
    LAUNCH((add_splits<4>), blocks_for(rows * (N / 4), 256), 256, 0, stream(), partial, splits, rows, rows_an_image, out);
  else
    LAUNCH((add_splits<1>), blocks_for(rows * N, 256), 256, 0, stream(), partial, splits, rows, rows_an_image, out);
}

template <bool OF_WEIGHTS, class T>
void multiply(Product<T>& p, const Plan& plan, float* partial, int rung) {
  if (p.out_rows == 0 || p.N == 0) return;
  if (rung == SHARED_TILES) p.splits = 1;
  p.partial = partial;
  launch_product<OF_WEIGHTS>(p, plan, rung);
  if (p.splits > 1) add_partial(partial, p.splits, p.out_rows, long(p.window.H) * p.window.W, p.out);
}

void round_to(bf16* out, int width, long rows, int group, int padded_group, const float* x, int width1,
              const float* x2 = nullptr, int width2 = 0) {
  if (rows * width == 0) return;
  LAUNCH(round_rows, blocks_for(rows * (width / 4), 256), 256, 0, stream(), out, width, rows, group, padded_group, x,
         width1, x2, width2, in_chunks({x, x2}, {width1, width2}));
}

// The windows of x, of what a convolution reads.
template <class T>
Product<T> windows_of(const Conv& c) {
  Product<T> p;
  p.B = c.B, p.C = c.C1 + c.C2;
  p.window = {c.h, c.w, c.up, c.kh, c.kw, c.stride, c.top, c.left, c.H, c.W};
  if constexpr (sizeof(T) == 2)
    p.C1 = padded<T>(p.C);
  else
    p.x = c.x, p.x2 = c.x2, p.C1 = c.C1, p.C2 = c.C2, p.x_vectors = in_chunks({c.x, c.x2}, {c.C1, c.C2});
  return p;
}
long pixels(const Conv& c) { return long(c.B) * c.h * c.w; }
long positions(const Conv& c) { return long(c.B) * c.H * c.W; }

void use_matrix(Product<float>& p, const float* matrix) {
  p.matrix = matrix, p.matrix_vectors = in_chunks({matrix}, {p.columns});
}
void use_matrix(Product<bf16>& p, const bf16* matrix) { p.matrix = matrix; }

template <class T>
void forward(const Conv& c, int rung) {
  constexpr bool rounds = sizeof(T) == 2;
  Product<T> p = windows_of<T>(c);
  p.N = c.N, p.columns = padded<T>(c.N), p.out_rows = positions(c);
  p.out.y = c.y, p.out.N1 = c.N, p.out.bias = c.bias, p.out.shift = c.shift, p.out.residual = c.residual;
  p.out.silu = c.silu, p.out.vectors = in_chunks({c.y, c.bias, c.shift, c.residual}, {c.N});
  Plan cut = plan(p, false);
  size_t images = rounds ? room<T>(pixels(c) * p.C1) : 0;
  size_t weights = rounds ? room<T>(size_t(c.kh) * c.kw * p.C1 * p.columns) : 0;
  float* space = workspace(images + weights + partial_floats(p));
  if constexpr (rounds) {
    T *x = reinterpret_cast<T*>(space), *w = reinterpret_cast<T*>(space + images);
    round_to(x, p.C1, pixels(c), 1, 1, c.x, c.C1, c.x2, c.C2);
    round_to(w, p.columns, long(c.kh) * c.kw * p.C1, p.C, p.C1, c.weights, c.N);
    p.x = x;
    use_matrix(p, w);
  } else {
    use_matrix(p, c.weights);
  }
  multiply<false>(p, cut, space + images + weights, rung);
}

// dx, and dx2 beside it: windows of dy with the weights turned round.
template <class T>
struct InputGradient {
  const Conv& c;
  int first, rung;  // channel of x
  Product<T> p;
  Plan cut;

  InputGradient(const Conv& c, float* dx, float* dx2, int rung) : c(c), first(dx ? 0 : c.C1), rung(rung) {
    p.B = c.B, p.C = c.N, p.C1 = padded<T>(c.N), p.spread = c.stride;
    p.window = {c.H, c.W, 1, c.kh + c.up - 1, c.kw + c.up - 1, c.up, c.kh - 1 - c.top, c.kw - 1 - c.left, c.h, c.w};
    p.out.y = dx, p.out.N1 = dx ? c.C1 : 0, p.out.y2 = dx2, p.out.N2 = dx2 ? c.C2 : 0;
    p.out.vectors = in_chunks({dx, dx2}, {p.out.N1, p.out.N2});
    p.N = p.out.N1 + p.out.N2, p.columns = padded<T>(p.N), p.out_rows = pixels(c);
    cut = plan(p, false);
  }
  size_t turned() const { return room<T>(size_t(p.window.kh) * p.window.kw * p.C1 * p.columns); }
  size_t floats() const { return turned() + partial_floats(p); }

  void run(const T* dy, float* space) {
    T* w = reinterpret_cast<T*>(space);
    long tiles = long(p.window.kh) * p.window.kw * ceiling(p.C1, 32) * ceiling(p.columns, 32);
    if (tiles)
      LAUNCH((turn_weights<T>), unsigned(tiles), 256, 0, stream(), w, p.C1, p.columns, c, first, p.N, p.window.kh,
             p.window.kw);
    p.x = dy, p.x_vectors = in_chunks({dy}, {p.C1});
    use_matrix(p, w);
    multiply<false>(p, cut, space + turned(), rung);
  }
};

template <class T>
struct WeightGradient {
  const Conv& c;
  int rung;
  Product<T> p;
  Plan cut;

  WeightGradient(const Conv& c, float* dw, int rung) : c(c), rung(rung), p(windows_of<T>(c)) {
    p.N = c.N, p.columns = padded<T>(c.N), p.out_rows = long(c.kh) * c.kw * p.C;
    p.out.y = dw, p.out.N1 = c.N, p.out.vectors = in_chunks({dw}, {c.N});
    cut = plan(p, true);
  }
  size_t images() const { return sizeof(T) == 2 ? room<T>(pixels(c) * p.C1) : 0; }
  size_t floats() const { return images() + partial_floats(p); }

  void run(const T* dy, float* space) {
    if constexpr (sizeof(T) == 2) {
      T* x = reinterpret_cast<T*>(space);
      round_to(x, p.C1, pixels(c), 1, 1, c.x, c.C1, c.x2, c.C2);
      p.x = x;
    }
    use_matrix(p, dy);
    multiply<true>(p, cut, space + images(), rung);
  }
};

void sum_of_positions(const Conv& c, const float* dy, float* dshift) {
  if (long(c.B) * c.N == 0) return;
  bool vectors = in_chunks({dy, dshift}, {c.N});
  int columns = vectors ? c.N / 4 : c.N, width = std::min(columns, 256), rows = 256 / width;
  long count = long(c.H) * c.W, blocks = c.B * ceiling(columns, width);
  int parts = int(std::clamp(4 * multiprocessors() / blocks, 1L, std::max(1L, count / (8 * rows))));
  float* out = parts > 1 ? workspace(size_t(parts) * c.B * c.N) : dshift;
  unsigned grid = unsigned(blocks * parts);
  if (vectors)
    LAUNCH((sum_positions<float4>), grid, 256, 0, stream(), reinterpret_cast<float4*>(out),
           reinterpret_cast<const float4*>(dy), c.B, count, columns, parts);
  else
    LAUNCH((sum_positions<float>), grid, 256, 0, stream(), out, dy, c.B, count, columns, parts);
  Output sums;
  sums.y = dshift, sums.N1 = c.N, sums.vectors = vectors;
  if (parts > 1) add_partial(out, parts, c.B, 1, sums);
}

void naive_gradients(const Conv& c, const float* dy, float* dx, float* dx2, float* dw) {
  long n1 = pixels(c) * c.C1, n2 = pixels(c) * c.C2, weights = long(c.kh) * c.kw * (c.C1 + c.C2) * c.N;
  if (dx && n1) LAUNCH(naive_dx, blocks_for(n1, 256), 256, 0, stream(), c, dy, dx, 0, c.C1);
  if (dx2 && n2) LAUNCH(naive_dx, blocks_for(n2, 256), 256, 0, stream(), c, dy, dx2, c.C1, c.C2);
  if (dw && weights) LAUNCH(naive_dw, blocks_for(weights, 256), 256, 0, stream(), c, dy, dw);
}

}  // namespace

void conv2d_forward(const Conv& c) {
  long n = positions(c) * c.N;
  if (n == 0) return;
  int rung = forward_ladder.rung();
  if (rung == NAIVE)
    LAUNCH(naive_forward, blocks_for(n, 256), 256, 0, stream(), c);
  else
    rung == TENSOR_CORES ? forward<bf16>(c, rung) : forward<float>(c, rung);
}

void conv2d_backward(const Conv& c, const float* dy, float* dx, float* dx2, float* dw, float* dshift) {
  int x_rung = dx_ladder.rung(), w_rung = dw_ladder.rung();
  bool of_x = (dx || dx2) && x_rung != NAIVE, of_w = dw && w_rung != NAIVE;
  naive_gradients(c, dy, of_x ? nullptr : dx, of_x ? nullptr : dx2, of_w ? nullptr : dw);

  InputGradient<float> x_fp32(c, dx, dx2, x_rung);
  InputGradient<bf16> x_bf16(c, dx, dx2, x_rung);
  WeightGradient<float> w_fp32(c, dw, w_rung);
  WeightGradient<bf16> w_bf16(c, dw, w_rung);
  bool x_rounds = of_x && x_rung == TENSOR_CORES, w_rounds = of_w && w_rung == TENSOR_CORES;
  int width = padded<bf16>(c.N);
  size_t rounded = x_rounds || w_rounds ? room<bf16>(positions(c) * width) : 0;
  size_t floats = std::max(of_x ? x_rounds ? x_bf16.floats() : x_fp32.floats() : 0,
                           of_w ? w_rounds ? w_bf16.floats() : w_fp32.floats() : 0);
  bf16* dy16 = reinterpret_cast<bf16*>(workspace(rounded + floats));
  float* space = reinterpret_cast<float*>(dy16) + rounded;
  if (rounded) round_to(dy16, width, positions(c), 1, 1, dy, c.N);
  if (of_x) x_rounds ? x_bf16.run(dy16, space) : x_fp32.run(dy, space);
  if (of_w) w_rounds ? w_bf16.run(dy16, space) : w_fp32.run(dy, space);

  if (dshift) sum_of_positions(c, dy, dshift);
}

}  // namespace minidiff::cuda
