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
#include <type_traits>

#include "implicit_gemm.h"
#include "ladder.h"

namespace minidiff::cuda {
namespace {

enum { NAIVE = 1, SHARED_TILES, REGISTER_TILES, PIPELINED, TENSOR_CORES, SHARED_WINDOWS };

const std::vector<Rung> RUNGS = {
    {"naive", "one thread a number of the result, all operands from global memory"},
    {"shared tiles", "implicit GEMM: 16 x 16 threads share tiles of both factors; 16 times fewer global loads"},
    {"register tiles", "8 x 8 sums a thread: 8 times fewer shared loads; 16-byte copies; windows found without divisions"},
    {"pipelined", "cp.async copies the next tiles while these are multiplied", 80},
    {"tensor cores", "bf16 operands, ldmatrix and mma.sync; four tiles under way", 80, Operands::bf16},
    {"shared windows", "all taps read the same pixels in shared memory; 1x1 and strided as before", 80, Operands::bf16},
};
const std::vector<Rung> DW_RUNGS(RUNGS.begin(), RUNGS.end() - 1);
Ladder forward_ladder("conv2d", RUNGS);
Ladder dx_ladder("conv2d_dx", RUNGS);
Ladder dw_ladder("conv2d_dw", DW_RUNGS);

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

__device__ float window_number(const Product<float>& p, const Window& w, const Position& at, const Tap& tap) {
  bool there;
  Column<float> column(p, w, tap);
  const float* x = w.up == 1 ? column.find(w, at, there) : column.find_repeated(w, at, there);
  return there ? *x : 0.0f;
}

template <bool OF_WEIGHTS>
__global__ void shared_tiles(Product<float> p, int row_tiles) {
  // With OF_WEIGHTS threads side by side write below each other in A: 18 keeps these, and two such columns, in banks apart.
  __shared__ float A[SIDE][OF_WEIGHTS ? SIDE + 2 : SIDE], B[SIDE][SIDE];
  Share<OF_WEIGHTS> share(p, SIDE, SIDE, SIDE, row_tiles);
  if (share.m0 >= share.M) return;
  const Window& w = share.part.window;
  int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE, n = share.n0 + tx, out_row, image;
  Position position;
  share.find_row(p, share.m0 + ty, position, out_row, image);
  float sum = 0;
  for (int k0 = 0; k0 < share.K; k0 += SIDE) {
    int k = k0 + ty;
    if (OF_WEIGHTS) {
      int b, i, j;
      A[tx][ty] = k < share.K ? window_number(p, w, position_of(w, k, b, i, j), Tap(w, p.channels(), share.m0 + tx)) : 0.0f;
    } else {
      A[ty][tx] = window_number(p, w, position, Tap(w, p.channels(), k0 + tx));
    }
    B[ty][tx] = k < share.K && n < p.N ? p.matrix[long(share.part.first_k * !OF_WEIGHTS + k) * p.columns + n] : 0.0f;
    __syncthreads();
    for (int i = 0; i < SIDE; i++) sum += A[ty][i] * B[i][tx];
    __syncthreads();
  }
  if (out_row >= 0) p.out.put<1>(out_row, image, n, {sum});
}

// ---- v3 register tiles: a block brings a step's tiles to shared memory, waits, multiplies them, and waits again

template <class Tile, bool ASYNC>
using GatherOf = std::conditional_t<Tile::of_weights, GatherColumns<Tile, ASYNC>, GatherRows<Tile, ASYNC>>;

// Slabs of sums, on their way out.
template <class Tile>
using Staged = float[Tile::SLAB_ROWS][Tile::columns + STAGE_PAD];

template <class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::resident) register_tiles(Product<float> p, int row_tiles) {
  constexpr int A_SIZE = Tile::rows * STEP<float>, SIZE = A_SIZE + Tile::columns * STEP<float>;
  static_assert(sizeof(Staged<Tile>) <= SIZE * sizeof(float), "a slab takes the tiles' place");
  __shared__ Rows<Tile::rows> rows;
  __shared__ __align__(128) float tiles[SIZE];
  Share<Tile::of_weights> share(p, Tile::rows, Tile::columns, STEP<float>, row_tiles);
  if (share.m0 >= share.M) return;
  share.find_rows(p, rows);
  __syncthreads();
  GatherOf<Tile, false> windows(p, share, rows);
  MatrixTiles<Tile, false> matrix(p, share);
  Tile tile;
  for (int step = 0; step < share.steps; step++) {
    windows.next(tiles), matrix.next(tiles + A_SIZE);
    __syncthreads();
    tile.multiply(tiles, tiles + A_SIZE);
    __syncthreads();
  }
  finish_rows<Tile>(tile, *reinterpret_cast<Staged<Tile>*>(tiles), Finish<Tile::rows>(rows, share.n0, share.output(p)));
}

// ---- v4 pipelined, v5 with tensor cores: STAGES pairs of tiles; while one is multiplied cp.async fills those behind it
//
//   step      0     1     2     3           one barrier a step: behind it all have this step's tiles, and nobody reads
//   copied    ├─2───┼─3───┼─4───┼─5──       those of the step before any more, whose place the next copies take
//   used      └─0───┴─1───┴─2───┴─3──       (3 stages)
template <class Tile, int STAGES>
__global__ void __launch_bounds__(Tile::threads, Tile::resident) pipelined(Product<typename Tile::T> p, int row_tiles) {
  using T = typename Tile::T;
  constexpr int A_SIZE = Tile::rows * STEP<T>, STAGE = A_SIZE + Tile::columns * STEP<T>;
  static_assert(sizeof(Staged<Tile>) <= STAGES * STAGE * sizeof(T), "a slab takes the tiles' place");
  SHARED_DYNAMIC(unsigned char, memory);
  T* stages = reinterpret_cast<T*>(memory);
  auto& rows = *reinterpret_cast<Rows<Tile::rows>*>(stages + STAGES * STAGE);
  Share<Tile::of_weights> share(p, Tile::rows, Tile::columns, STEP<T>, row_tiles);
  if (share.m0 >= share.M) return;
  share.find_rows(p, rows);
  __syncthreads();
  GatherOf<Tile, true> windows(p, share, rows);
  MatrixTiles<Tile, true> matrix(p, share);
  auto copy = [&](int stage, bool wanted) {
    T* A = stages + stage * STAGE;
    if (wanted) windows.next(A), matrix.next(A + A_SIZE);
    cp_async_commit();
  };
  Tile tile;
  for (int s = 0; s < STAGES - 1; s++) copy(s, s < share.steps);
  for (int step = 0; step < share.steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    copy((step + STAGES - 1) % STAGES, step + STAGES - 1 < share.steps);
    const T* A = stages + step % STAGES * STAGE;
    tile.multiply(A, A + A_SIZE);
  }
  finish_rows<Tile>(tile, *reinterpret_cast<Staged<Tile>*>(stages), Finish<Tile::rows>(rows, share.n0, share.output(p)));
}
template <class Tile, int STAGES>
constexpr size_t pipeline_bytes() {
  return size_t(STAGES) * (Tile::rows + Tile::columns) * STEP_BYTES + sizeof(Rows<Tile::rows>);
}

// ---- v6 shared windows: neighbouring positions' windows overlap. Of 32 channels, the pixels under all windows of a tile come
// to shared memory once, and not again for every tap
//
//                       ├─────────────── pixels, in the image's order ───────────────┤
//   rows under tap 0 0  ├────── rows ──────┤
//   under tap p q          p w + q  ├────── rows ──────┤       of which those that are padding are read elsewhere: zeros
//
// The walk goes through the taps first, with tiles of the matrix as before. While the taps of one step of channels are
// multiplied, the pixels of the next come, all of them STAGES - 1 steps before the end.
constexpr int MOST_TAPS = 32, ZEROS = 64;  // all banks: who reads zeros does so in the bank where the pixel would be

template <class Tile, int STAGES>
__global__ void __launch_bounds__(Tile::threads, Tile::resident) shared_windows(Product<bf16> p, int row_tiles) {
  constexpr int STAGE = Tile::columns * STEP<bf16>;
  static_assert(sizeof(Staged<Tile>) <= (STAGES * STAGE + 2 * Tile::rows * STEP<bf16>) * sizeof(bf16), "it takes their place");
  SHARED_DYNAMIC(unsigned char, memory);
  auto& rows = *reinterpret_cast<Rows<Tile::rows>*>(memory);
  bf16 *zeros = reinterpret_cast<bf16*>(&rows + 1), *stages = zeros + ZEROS, *pixels = stages + STAGES * STAGE;
  Share<false> share(p, Tile::rows, Tile::columns, STEP<bf16>, row_tiles);
  if (share.m0 >= share.M) return;
  share.find_rows(p, rows);
  if (threadIdx.x < ZEROS) zeros[threadIdx.x] = bf16(0.0f);
  __syncthreads();

  const Window& w = share.part.window;
  int lane = threadIdx.x % 32, taps = w.kh * w.kw;
  unsigned meets[Tile::DOWN] = {};  // of the rows that this lane loads, one of each of the warp's fragments: a bit for each tap
#pragma unroll 1
  for (int tap = 0, p = 0; p < w.kh; p++)
#pragma unroll 1
    for (int q = 0; q < w.kw; q++, tap++)
#pragma unroll
      for (int i = 0; i < Tile::DOWN; i++) {
        const Position& at = rows.position[Tile::row(i) + lane % 16];
        meets[i] |= unsigned(unsigned(at.row + p) < unsigned(w.h) && unsigned(at.column + q) < unsigned(w.w)) << tap;
      }

  int all = (p.C1 + STEP<bf16> - 1) / STEP<bf16>, first = all * share.split / p.splits;  // steps of channels
  int steps = (all * (share.split + 1) / p.splits - first) * taps;
  share.k0 = first * STEP<bf16>, share.K = p.C1;  // k: a channel, under tap (0, 0)
  PixelRows<Tile> windows(p, share);
  MatrixTiles<Tile, true> matrix(p, share);
  int count = windows.count(w.w, w.kh, w.kw), size = count * windows.DOWN * STEP<bf16>;
  int at_once = (count + taps - STAGES + 1) / (taps - STAGES + 2);
  int tap_ahead = 0;
  auto copy_matrix = [&](int step) {
    if (step < steps) {
      matrix.copy(stages + step % STAGES * STAGE);
      if (++tap_ahead < taps)
        matrix.move(p.C1, 0);
      else
        tap_ahead = 0, matrix.move(STEP<bf16> - (taps - 1) * p.C1, STEP<bf16>);
    }
    cp_async_commit();
  };
  Tile tile;
  if (steps) windows.copy(pixels, 0, count);
  for (int s = 0; s < STAGES - 1; s++) copy_matrix(s);
  bf16 *now = pixels, *next = pixels + size;
  for (int step = 0, tap = 0, q = 0, below = 0; step < steps; step++) {  // below: p w + q
    if (tap == 0) windows.advance();
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step - tap + taps < steps) windows.copy(next, min(tap * at_once, count), min((tap + 1) * at_once, count));
    copy_matrix(step + STAGES - 1);
    auto load = [&](unsigned(&to)[4], int i, int k) {
      unsigned at = chunk_at<bf16, windows.CHUNKS, false>(Tile::row(0) + lane % 16 + below, k / 8 + lane / 16);
      ldmatrix(to, meets[i] >> tap & 1 ? now + at + i * 16 * STEP<bf16> : zeros + at % ZEROS);
    };
    tile.template add<typename Tile::Matrix>(load, stages + step % STAGES * STAGE);
    below++;
    if (++q == w.kw) q = 0, below += w.w - w.kw;
    if (++tap == taps) {
      tap = 0, below = 0;
      bf16* read = now;
      now = next, next = read;
    }
  }
  finish_rows<Tile>(tile, *reinterpret_cast<Staged<Tile>*>(stages), Finish<Tile::rows>(rows, share.n0, share.output(p)));
}

// ---- the passes before and after

// Float32 rows, of two arrays side by side, as rows of bf16 with `width` numbers; what is beyond theirs is zero.
struct Rounding {
  bf16* to = nullptr;
  const float *x = nullptr, *x2 = nullptr;
  int width1 = 0, width2 = 0, width = 0;
  long fours = 0;        // of numbers
  bool vectors = false;  // whether those of x and x2 can be loaded at once
  static constexpr int A_THREAD = 4;

  __device__ float4 load(long i) const {
    if (vectors && width1 == width) return reinterpret_cast<const float4*>(x)[i];
    long row = i / (width / 4);
    int c = int(i - row * (width / 4)) * 4, N = width1 + width2;
    auto at = [&](int c) { return c < width1 ? x + row * width1 + c : x2 + row * width2 + (c - width1); };
    if (vectors) return c < N ? *reinterpret_cast<const float4*>(at(c)) : float4{};
    return {c < N ? *at(c) : 0, c + 1 < N ? *at(c + 1) : 0, c + 2 < N ? *at(c + 2) : 0, c + 3 < N ? *at(c + 3) : 0};
  }
  __device__ void run(unsigned block) const {
    float4 v[A_THREAD] = {};
    long first = long(block) * A_THREAD * blockDim.x + threadIdx.x;
#pragma unroll
    for (int u = 0; u < A_THREAD; u++)
      if (first + u * blockDim.x < fours) v[u] = load(first + u * blockDim.x);
#pragma unroll
    for (int u = 0; u < A_THREAD; u++) {
      uint2 packed = {pack_bf16(v[u].x, v[u].y), pack_bf16(v[u].z, v[u].w)};
      if (first + u * blockDim.x < fours) reinterpret_cast<uint2*>(to)[first + u * blockDim.x] = packed;
    }
  }
};

// The weights (kh, kw, C, N) as a product's matrix with kh x kw taps; those of a spread image are sorted by remainder (see
// Part). Straight: for each tap a row for each of the C channels, a column for each of N. If every pixel of the input is
// repeated, a tap p with pixel a of those (a < up) meets the stored one under tap p - a: such taps' weights are added.
// Turned, for dx: the kernel turned round, a row for each of N, a column for each of the `wanted` channels from `first` on;
// here taps p meet the same dy where a - p is the same.
template <class T>
struct Arrangement {
  T* to = nullptr;
  int kh = 0, kw = 0, spread = 1, rows = 0, columns = 0;  // with padding
  bool turned = false;
  int first = 0, wanted = 0;

  // A block arranges 32 x 32 numbers, which pass through shared memory: reads and writes are both coalesced.
  __host__ __device__ long blocks() const { return long(kh) * kw * ((rows + 31) / 32) * ((columns + 31) / 32); }
  __device__ void run(unsigned block, const Conv& c) const {
    __shared__ float tile[32][33];  // [k][n]
    int tx = threadIdx.x % 32, ty = threadIdx.x / 32, across = (columns + 31) / 32, down = (rows + 31) / 32;
    int column0 = int(block % across) * 32, row0 = int(block / across % down) * 32, tap = int(block / across / down);
    int k0 = turned ? column0 : row0, n0 = turned ? row0 : column0;
    int t = tap / kw, u = tap % kw, C = c.C1 + c.C2;
    for (int y = ty; y < 32; y += 8) {
      float sum = 0;
      int k = k0 + y, n = n0 + tx;
      if (k < wanted && n < c.N)
        for (int i = 0; i < c.up; i++)
          for (int j = 0; j < c.up; j++) {
            int p = turned ? i - t + c.kh - 1 : t + i - c.up + 1, q = turned ? j - u + c.kw - 1 : u + j - c.up + 1;
            if (p >= 0 && p < c.kh && q >= 0 && q < c.kw) sum += c.weights[(long(p * c.kw + q) * C + first + k) * c.N + n];
          }
      tile[y][tx] = sum;
    }
    __syncthreads();
    int s = spread, v = t % s, h = u % s;
    int place = taps_before(kh, s, v) * kw + (taps_before(kh, s, v + 1) - taps_before(kh, s, v)) * taps_before(kw, s, h) +
                t / s * (taps_before(kw, s, h + 1) - taps_before(kw, s, h)) + u / s;
    for (int y = ty; y < 32; y += 8) {
      int row = row0 + y, column = column0 + tx;
      if (row < rows && column < columns) to[(long(place) * rows + row) * columns + column] = T(turned ? tile[tx][y] : tile[y][tx]);
    }
  }
};

// All that a convolution's products read and that is not there as they want it, by one launch.
template <class T>
__global__ void prepare(Conv c, Arrangement<T> weights, Rounding image, Rounding matrix, unsigned image_blocks, unsigned matrix_blocks) {
  unsigned block = blockIdx.x;
  if (block < image_blocks) return image.run(block);
  block -= image_blocks;
  if (block < matrix_blocks) return matrix.run(block);
  weights.run(block - matrix_blocks, c);
}

__device__ void add(float& v, float a) { v += a; }
__device__ void add(float4& v, float4 a) { v.x += a.x, v.y += a.y, v.z += a.z, v.w += a.w; }

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

void add_partial(const float* partial, int splits, long rows, long rows_an_image, const Output& out) {
  int N = out.N1 + out.N2;
  if (out.vectors)
    LAUNCH((add_splits<4>), blocks_for(rows * (N / 4), 32), 256, 0, stream(), partial, splits, rows, rows_an_image, out);
  else
    LAUNCH((add_splits<1>), blocks_for(rows * N, 32), 256, 0, stream(), partial, splits, rows, rows_an_image, out);
}

// How a product is cut into blocks. LARGE tiles where they fill the chip, or TALL ones, as large and half as wide, where
// fewer columns of these are in vain.
enum Size { LARGE, TALL, SMALL, NARROW };

constexpr int STAGES = 4;  // of bf16

template <class T>
constexpr int NARROW_WIDTH = sizeof(T) == 2 ? 16 : 8;
template <class T, bool OF_WEIGHTS>  // 192: 3 x 3 taps of 64 channels are 3 tiles; 128 for want of registers
constexpr int TALL_ROWS = !OF_WEIGHTS ? 256 : sizeof(T) == 2 ? 192 : 128;

template <class T, bool OF_WEIGHTS>
struct Multiplication {
  Product<T> p;
  int rung;
  Size size = SMALL;
  int parts = 1;
  long rows = 0;  // of the largest part

  // Cuts the product, of which only the pointers may still be missing.
  Multiplication(const Product<T>& product, int rung) : p(product), rung(rung) {
    const Window& w = p.window;
    int s = p.spread;
    parts = std::min(s, w.H) * std::min(s, w.W);
    long positions = p.B * ceiling(w.H, s) * ceiling(w.W, s), taps = ceiling(w.kh, s) * ceiling(w.kw, s);
    rows = OF_WEIGHTS ? taps * p.channels() : positions;
    long steps = ceiling(OF_WEIGHTS ? positions : taps * p.channels(), STEP<T>), most = std::max(1L, steps / 8);
    long chip = multiprocessors(), resident = 4;  // blocks that run at once on a multiprocessor
    Size large = ceiling(p.N, 64) % 2 ? TALL : LARGE;
    if (p.N <= NARROW_WIDTH<T>)
      size = NARROW;
    else if (rows > 64 && tiles(large) * most >= chip)
      size = large, resident = 2;
    if (shares_windows()) most = std::min(most, ceiling(p.C1, STEP<T>));
    p.splits = int(std::clamp(resident * chip / std::max(1L, tiles(size)), 1L, most));
  }
  int tile_rows(Size size) const { return size == TALL ? TALL_ROWS<T, OF_WEIGHTS> : size == SMALL ? 64 : 128; }
  int tile_columns(Size size) const { return size == LARGE ? 128 : size == NARROW ? NARROW_WIDTH<T> : 64; }
  long tiles(Size size) const { return parts * ceiling(rows, tile_rows(size)) * ceiling(p.N, tile_columns(size)); }

  // Whether v6 can be used: as many rows and columns of positions as of pixels in each part, and room for these.
  bool shares_windows() const {
    const Window& w = p.window;
    int s = p.spread, least = w.kh / s * (w.kw / s), taps = int(ceiling(w.kh, s) * ceiling(w.kw, s));
    return rung == SHARED_WINDOWS && !OF_WEIGHTS && w.stride == 1 && w.H == s * w.h && w.W == s * w.w &&
           least >= STAGES - 1 && taps <= MOST_TAPS && windows_bytes() <= 96 << 10;
  }
  size_t windows_bytes() const {
    const Window& w = p.window;
    long pixels = tile_rows(size) + (ceiling(w.kh, p.spread) - 1) * w.w + ceiling(w.kw, p.spread) - 1;
    return tile_rows(size) * sizeof(Rows<1>) + ZEROS * sizeof(bf16) +
           (STAGES * tile_columns(size) + 2 * ceiling(pixels, 32) * 32) * STEP_BYTES;
  }
  size_t partial_floats() const { return p.splits > 1 ? room<float>(size_t(p.splits) * p.out_rows * p.N) : 0; }

  void run(const T* x, const T* matrix, float* partial) {
    if (p.out_rows == 0 || p.N == 0) return;
    p.x = x, p.matrix = matrix, p.partial = partial;
    p.x_vectors = in_chunks({p.x, p.x2}, {p.C1, p.C2}), p.matrix_vectors = in_chunks({matrix}, {p.columns});
    if (rung == SHARED_TILES) p.splits = 1;
    launch();
    if (p.splits > 1) add_partial(partial, p.splits, p.out_rows, long(p.window.H) * p.window.W, p.out);
  }

 private:
  void launch() const {
    if constexpr (sizeof(T) == 2) {
      constexpr int TALL_TILE = TALL_ROWS<T, OF_WEIGHTS>;
      if (size == LARGE) launch_tensor<TensorTile<128, 128, 64, 64, 2, OF_WEIGHTS>>();
      if (size == TALL) launch_tensor<TensorTile<TALL_TILE, 64, TALL_TILE / 4, 64, 2, OF_WEIGHTS>>();
      if (size == SMALL) launch_tensor<TensorTile<64, 64, 32, 32, 4, OF_WEIGHTS>>();
      if (size == NARROW) launch_tensor<TensorTile<128, NARROW_WIDTH<T>, 32, NARROW_WIDTH<T>, 4, OF_WEIGHTS>>();
    } else if (rung == SHARED_TILES) {
      long row_tiles = ceiling(rows, SIDE);
      LAUNCH((shared_tiles<OF_WEIGHTS>), unsigned(parts * row_tiles * ceiling(p.N, SIDE)), SIDE * SIDE, 0, stream(), p,
             int(row_tiles));
    } else {
      if (size == LARGE) launch_floats<FloatTile<128, 128, 8, 8, OF_WEIGHTS>>();
      if (size == TALL) launch_floats<FloatTile<TALL_ROWS<T, OF_WEIGHTS>, 64, 8, 8, OF_WEIGHTS>>();
      if (size == SMALL) launch_floats<FloatTile<64, 64, 8, 4, OF_WEIGHTS>>();
      if (size == NARROW) launch_floats<FloatTile<128, NARROW_WIDTH<T>, 4, 4, OF_WEIGHTS>>();
    }
  }
  template <class Tile>
  void launch_tensor() const {
    if constexpr (!OF_WEIGHTS)
      if (shares_windows()) {
        LAUNCH((shared_windows<Tile, STAGES>), blocks(), Tile::threads, windows_bytes(), stream(), p,
               int(ceiling(rows, Tile::rows)));
        return;
      }
    launch_pipeline<Tile, STAGES>();
  }
  template <class Tile>
  void launch_floats() const {
    if (rung == PIPELINED) return launch_pipeline<Tile, 2>();
    LAUNCH((register_tiles<Tile>), blocks(), Tile::threads, 0, stream(), p, int(ceiling(rows, Tile::rows)));
  }
  template <class Tile, int STAGES>
  void launch_pipeline() const {
    LAUNCH((pipelined<Tile, STAGES>), blocks(), Tile::threads, (pipeline_bytes<Tile, STAGES>()), stream(), p,
           int(ceiling(rows, Tile::rows)));
  }
  unsigned blocks() const { return unsigned(tiles(size) * p.splits); }
};

// ---- the products of a convolution

long pixels(const Conv& c) { return long(c.B) * c.h * c.w; }
long positions(const Conv& c) { return long(c.B) * c.H * c.W; }

// Whether ints will do to count them.
bool countable(const Conv& c) {
  return std::max(pixels(c), positions(c)) <= MOST_PIXELS && long(std::max(c.h, c.w)) * c.up * c.up < 1L << 32;
}

// Of windows of x: of both inputs, or of what they are rounded to, side by side.
template <class T>
Product<T> windows_of_x(const Conv& c) {
  Product<T> p;
  p.B = c.B, p.C = c.C1 + c.C2, p.C1 = c.C1, p.C2 = c.C2;
  if constexpr (sizeof(T) == 2)
    p.C1 = padded<T>(p.C), p.C2 = 0;
  else
    p.x2 = c.x2;
  p.N = c.N, p.columns = padded<T>(c.N), p.out.N1 = c.N;
  return p;
}

template <class T>
Product<T> forward_product(const Conv& c) {
  Product<T> p = windows_of_x<T>(c);
  int more = c.up - 1;
  p.window = {c.h, c.w, 1, c.kh + more, c.kw + more, c.stride, c.top + more, c.left + more, c.H, c.W};
  p.spread = c.up, p.out_rows = positions(c);
  p.out.y = c.y, p.out.bias = c.bias, p.out.shift = c.shift, p.out.residual = c.residual, p.out.silu = c.silu;
  p.out.vectors = in_chunks({c.y, c.bias, c.shift, c.residual}, {c.N});
  return p;
}

template <class T>
Product<T> dw_product(const Conv& c, float* dw) {
  Product<T> p = windows_of_x<T>(c);
  p.window = {c.h, c.w, c.up, c.kh, c.kw, c.stride, c.top, c.left, c.H, c.W};
  p.out_rows = long(c.kh) * c.kw * p.C;
  p.out.y = dw, p.out.vectors = in_chunks({dw}, {c.N});
  return p;
}

// dx, and dx2 beside it: windows of dy with the weights turned round.
template <class T>
Product<T> dx_product(const Conv& c, float* dx, float* dx2) {
  Product<T> p;
  p.B = c.B, p.C = c.N, p.C1 = padded<T>(c.N), p.spread = c.stride;
  p.window = {c.H, c.W, 1, c.kh + c.up - 1, c.kw + c.up - 1, c.up, c.kh - 1 - c.top, c.kw - 1 - c.left, c.h, c.w};
  p.out.y = dx, p.out.N1 = dx ? c.C1 : 0, p.out.y2 = dx2, p.out.N2 = dx2 ? c.C2 : 0;
  p.out.vectors = in_chunks({dx, dx2}, {p.out.N1, p.out.N2});
  p.N = p.out.N1 + p.out.N2, p.columns = padded<T>(p.N), p.out_rows = pixels(c);
  return p;
}

// The matrix of a product, of which the channels of x from `first` on are wanted, unless it is c.weights as they are.
template <class T>
Arrangement<T> arrangement(const Product<T>& p, bool turned, int first, int wanted) {
  return {nullptr, p.window.kh, p.window.kw, p.spread, p.channels(), p.columns, turned, first, wanted};
}
template <class T>
size_t floats_of(const Arrangement<T>& a) {
  return room<T>(size_t(a.kh) * a.kw * a.rows * a.columns);
}

Rounding rounding(const float* x, int width1, const float* x2, int width2, long rows) {
  Rounding r;
  r.x = x, r.x2 = x2, r.width1 = width1, r.width2 = width2, r.width = padded<bf16>(width1 + width2);
  r.fours = rows * (r.width / 4), r.vectors = in_chunks({x, x2}, {width1, width2});
  return r;
}
size_t floats_of(const Rounding& r) { return room<bf16>(size_t(r.fours) * 4); }

template <class T>
void prepare_all(const Conv& c, const Arrangement<T>& weights, const Rounding& image, const Rounding& matrix) {
  unsigned of_image = unsigned(ceiling(image.fours, 256 * Rounding::A_THREAD));
  unsigned of_matrix = unsigned(ceiling(matrix.fours, 256 * Rounding::A_THREAD)), of_weights = unsigned(weights.blocks());
  if (of_image + of_matrix + of_weights)
    LAUNCH((prepare<T>), of_image + of_matrix + of_weights, 256, 0, stream(), c, weights, image, matrix, of_image, of_matrix);
}

template <class T>
void forward(const Conv& c, int rung) {
  constexpr bool rounds = sizeof(T) == 2;
  Multiplication<T, false> product(forward_product<T>(c), rung);
  Rounding image;
  Arrangement<T> weights;
  if (rounds) image = rounding(c.x, c.C1, c.x2, c.C2, pixels(c));
  if (rounds || c.up > 1) weights = arrangement(product.p, false, 0, product.p.C);
  float* space = workspace(floats_of(image) + floats_of(weights) + product.partial_floats());
  image.to = reinterpret_cast<bf16*>(space);
  weights.to = reinterpret_cast<T*>(space + floats_of(image));
  prepare_all(c, weights, image, {});
  float* partial = space + floats_of(image) + floats_of(weights);
  if constexpr (rounds)
    product.run(image.to, weights.to, partial);
  else
    product.run(c.x, c.up > 1 ? weights.to : c.weights, partial);
}

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
  int rung = countable(c) ? forward_ladder.rung() : NAIVE;
  if (rung >= TENSOR_CORES && c.up > 1 && c.stride > 1) rung = PIPELINED;  // nobody's layer: exact rather than fast
  if (rung == NAIVE)
    LAUNCH(naive_forward, blocks_for(n, 256), 256, 0, stream(), c);
  else
    rung >= TENSOR_CORES ? forward<bf16>(c, rung) : forward<float>(c, rung);
}

void conv2d_backward(const Conv& c, const float* dy, float* dx, float* dx2, float* dw, float* dshift) {
  if (dshift) sum_of_positions(c, dy, dshift);
  int x_rung = countable(c) ? dx_ladder.rung() : NAIVE, w_rung = countable(c) ? dw_ladder.rung() : NAIVE;
  bool of_x = (dx || dx2) && x_rung != NAIVE, of_w = dw && w_rung != NAIVE;
  naive_gradients(c, dy, of_x ? nullptr : dx, of_x ? nullptr : dx2, of_w ? nullptr : dw);

  bool x_rounds = of_x && x_rung >= TENSOR_CORES, w_rounds = of_w && w_rung >= TENSOR_CORES;
  Multiplication<float, false> x_fp32(dx_product<float>(c, dx, dx2), x_rung);
  Multiplication<bf16, false> x_bf16(dx_product<bf16>(c, dx, dx2), x_rung);
  Multiplication<float, true> w_fp32(dw_product<float>(c, dw), w_rung);
  Multiplication<bf16, true> w_bf16(dw_product<bf16>(c, dw), w_rung);

  Rounding image, matrix;  // x and dy
  if (w_rounds) image = rounding(c.x, c.C1, c.x2, c.C2, pixels(c));
  if (x_rounds || w_rounds) matrix = rounding(dy, c.N, nullptr, 0, positions(c));
  Arrangement<float> turned_fp32;
  Arrangement<bf16> turned_bf16;
  int first = dx ? 0 : c.C1;
  if (of_x && !x_rounds) turned_fp32 = arrangement(x_fp32.p, true, first, x_fp32.p.N);
  if (x_rounds) turned_bf16 = arrangement(x_bf16.p, true, first, x_bf16.p.N);

  size_t of_partial = std::max(!of_x ? 0 : x_rounds ? x_bf16.partial_floats() : x_fp32.partial_floats(),
                               !of_w ? 0 : w_rounds ? w_bf16.partial_floats() : w_fp32.partial_floats());
  size_t of_image = floats_of(image), of_matrix = floats_of(matrix), of_turned = floats_of(turned_fp32) + floats_of(turned_bf16);
  float* space = workspace(of_image + of_matrix + of_turned + of_partial);
  image.to = reinterpret_cast<bf16*>(space), matrix.to = reinterpret_cast<bf16*>(space + of_image);
  float *turned = space + of_image + of_matrix, *partial = turned + of_turned;
  turned_fp32.to = turned, turned_bf16.to = reinterpret_cast<bf16*>(turned);

  x_rounds ? prepare_all(c, turned_bf16, image, matrix) : prepare_all(c, turned_fp32, image, matrix);
  if (of_x) x_rounds ? x_bf16.run(matrix.to, turned_bf16.to, partial) : x_fp32.run(dy, turned, partial);
  if (of_w) w_rounds ? w_bf16.run(image.to, matrix.to, partial) : w_fp32.run(c.x, dy, partial);
}

}  // namespace minidiff::cuda
