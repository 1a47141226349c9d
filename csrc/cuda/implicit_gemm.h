// Implicit GEMM: products C = A B in which A is never stored. A holds the windows of an image, a row for each output
// position and a column for each tap and channel; whoever needs a piece of A gathers it from the image:
//
//              k = (tap, channel)                 N                           image
//            ┌────────┬──────────┐         ┌──────┬───┐                  ┌──────────────┐
//   m = (b,  │        │▓▓▓▓ BK ──►   ×    │      │▓▓▓│ BK               │  ┌─────┐     │  a row of A: the window
//   i, j)    │        │▓▓▓▓      │         │      │ │ │                  │  │░░░░░│     │  under a position. The same
//            ├────────┼──────────┤ BM      ├──────┼─▼─┤                  │  │░░░░░│     │  pixel lies in kh kw windows:
//            │        │          │         │      │   │                  │  └─────┘     │  stored, A were so many
//            └────────┴──────────┘         └──────┴───┘ BN               └──────────────┘  times the image
//
// A block computes a tile of BM x BN numbers of C; it walks along k in steps of 64 bytes, and for each step brings a tile of
// A and one of B to shared memory. Chunks of 16 bytes are what threads copy. A tile of A has rows of four chunks, moved
// about so that eight rows that stand below each other in one chunk column lie in different banks:
//
//          chunk  0 1 2 3 │ 0 1 2 3             chunk ^ (row / 2) % 4
//   rows 0, 1     0 1 2 3 │ 0 1 2 3
//   rows 2, 3     1 0 3 2 │ 1 0 3 2             a column of eight rows, and a line of eight chunks (128 bytes,
//   rows 4, 5     2 3 0 1 │ 2 3 0 1             all 32 banks once), both take one pass over the banks
//   rows 6, 7     3 2 1 0 │ 3 2 1 0
//
// The gradient of the weights is a product with the same A, transposed: there positions are summed over, tiles of A have a
// row for each position, as they are gathered, and the multiplying threads read them the other way.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "activations.cuh"
#include "ptx.h"
#include "stream.h"

namespace minidiff::cuda {
namespace {

using bf16 = __nv_bfloat16;

constexpr int STEP_BYTES = 64;  // of k: 16 floats or 32 bf16
constexpr int CHUNK_BYTES = 16;
template <class T>
constexpr int CHUNK = CHUNK_BYTES / int(sizeof(T));  // numbers
template <class T>
constexpr int STEP = STEP_BYTES / int(sizeof(T));

__device__ inline void add(float& v, float a) { v += a; }
__device__ inline void add(float2& v, float2 a) { v.x += a.x, v.y += a.y; }
__device__ inline void add(float4& v, float4 a) { v.x += a.x, v.y += a.y, v.z += a.z, v.w += a.w; }

// ---- the matrices

// How the windows of output positions lie over the stored images, every pixel of which counts `up` times both ways.
struct Window {
  int h, w, up;
  int kh, kw, stride, top, left;
  int H, W;  // positions
};

// What a product writes: columns 0.. of N1 to y, those behind to y2, + bias (N,) + shift (B, N) + residual; SiLU of that.
struct Output {
  float *y = nullptr, *y2 = nullptr;
  int N1 = 0, N2 = 0;
  const float *bias = nullptr, *shift = nullptr, *residual = nullptr;
  bool silu = false, vectors = false;

  __device__ float finished(float v, long pixel, int b, int n) const {
    int N = N1 + N2;
    if (bias) v += bias[n];
    if (shift) v += shift[long(b) * N + n];
    if (residual) v += residual[pixel * N + n];
    return silu ? activated<SILU>(v) : v;
  }
  __device__ float* at(long pixel, int n) const { return n < N1 ? y + pixel * N1 + n : y2 + pixel * N2 + (n - N1); }

  // Columns n.. of a row that belongs to this pixel of image b.
  template <int COUNT>
  __device__ void put(long pixel, int b, int n, const float (&v)[COUNT]) const {
    if constexpr (COUNT > 1)
      if (vectors) {
        if (n >= N1 + N2) return;
        if constexpr (COUNT == 4)
          put_vector(pixel, b, n, make_float4(v[0], v[1], v[2], v[3]));
        else
          put_vector(pixel, b, n, make_float2(v[0], v[1]));
        return;
      }
#pragma unroll
    for (int e = 0; e < COUNT; e++)
      if (n + e < N1 + N2) *at(pixel, n + e) = finished(v[e], pixel, b, n + e);
  }

 private:
  __device__ static float2 activate(float2 v) { return {activated<SILU>(v.x), activated<SILU>(v.y)}; }
  __device__ static float4 activate(float4 v) {
    return {activated<SILU>(v.x), activated<SILU>(v.y), activated<SILU>(v.z), activated<SILU>(v.w)};
  }
  template <class V>
  __device__ void put_vector(long pixel, int b, int n, V v) const {
    int N = N1 + N2;
    if (bias) add(v, *reinterpret_cast<const V*>(bias + n));
    if (shift) add(v, *reinterpret_cast<const V*>(shift + long(b) * N + n));
    if (residual) add(v, *reinterpret_cast<const V*>(residual + pixel * N + n));
    *reinterpret_cast<V*>(at(pixel, n)) = silu ? activate(v) : v;
  }
};

// A product with windows: OF_WEIGHTS false: C (positions, N) = windows (positions, taps C) @ matrix (taps C, columns);
// OF_WEIGHTS true: C (taps C, N) = windows^T @ matrix (positions, columns).
template <class T>
struct Product {
  const T *x = nullptr, *x2 = nullptr;  // images (B, h, w, C1) and, beside them, (B, h, w, C2)
  int B = 0, C1 = 0, C2 = 0;            // channels as they are stored, with padding
  int C = 0;                            // without
  Window window;
  int spread = 1;                       // see Part
  const T* matrix = nullptr;
  int columns = 0, N = 0;               // of the matrix as it is stored, and of the result
  bool x_vectors = false, matrix_vectors = false;  // whether chunks can be copied at once
  Output out;
  long out_rows = 0;
  int splits = 1;                       // of k, each of which writes sums of its own to
  float* partial = nullptr;             // (splits, out_rows, N)

  __host__ __device__ int channels() const { return C1 + C2; }
};

// Between the pixels of the image lie spread - 1 zeros: the gradient of a convolution with that stride reads such an image.
// Most of its taps fall on zeros. But output pixels whose row and column leave the same remainders when divided by spread
// have all their nonzero taps in common; so the product falls into spread^2 parts, each an ordinary one, without zeros, with
// its own taps (t = t0, t0 + spread, ...), which lie side by side in the matrix.
struct Part {
  Window window;
  int row, column;  // remainders
  long first_k;     // of the matrix
};

// In one direction: of `count` taps, those that leave a remainder less than r when divided by spread.
__host__ __device__ inline int taps_before(int count, int spread, int r) {
  return count / spread * r + (count % spread < r ? count % spread : r);
}

struct PartTaps {
  int t0, count, margin, positions;
};
__device__ inline PartTaps part_taps(int taps, int spread, int stride, int margin, int positions, int remainder) {
  int over = (margin - remainder * stride) % spread;
  int t0 = over < 0 ? over + spread : over;
  return {t0, taps_before(taps, spread, t0 + 1) - taps_before(taps, spread, t0),
          (margin - remainder * stride - t0) / spread, (positions - remainder + spread - 1) / spread};
}

template <class T>
__device__ Part part_of(const Product<T>& p, int number) {
  const Window& w = p.window;
  int across = min(p.spread, w.W), row = number / across, column = number % across;
  PartTaps v = part_taps(w.kh, p.spread, w.stride, w.top, w.H, row);
  PartTaps h = part_taps(w.kw, p.spread, w.stride, w.left, w.W, column);
  long taps = long(taps_before(w.kh, p.spread, v.t0)) * w.kw + long(v.count) * taps_before(w.kw, p.spread, h.t0);
  return {{w.h, w.w, w.up, v.count, h.count, w.stride, v.margin, h.margin, v.positions, h.positions}, row, column,
          taps * p.channels()};
}

// ---- where rows and columns of A lie in the image

// A tap and a channel: one column of A.
struct Tap {
  int p, q, c;
  __device__ Tap(const Window& w, int channels, long k) {
    int tap = int(k / max(channels, 1)), across = max(w.kw, 1);
    c = int(k - long(tap) * channels), p = tap / across, q = tap % across;
  }
  __device__ void advance(int n, const Window& w, int channels) {
    for (c += n; c >= channels; c -= channels)
      if (++q == w.kw) q = 0, p++;
  }
};

constexpr int OUTSIDE = -(1 << 30);  // a row that lies outside of any image, under whatever tap

// A position: one row of A.
struct alignas(16) Position {
  long image;       // the number of the image's first pixel
  int row, column;  // of the seen image, under tap (0, 0)
};

// The position with this number; b, i and j: its image, row and column.
__device__ inline Position position_of(const Window& w, long number, int& b, int& i, int& j) {
  long line = number / w.W;
  j = int(number - line * w.W), b = int(line / w.H), i = int(line - long(b) * w.H);
  return {long(b) * w.h * w.w, i * w.stride - w.top, j * w.stride - w.left};
}

// The number of the pixel under a tap; -1 for padding.
__device__ inline long pixel_under(const Window& w, const Position& at, int p, int q) {
  int row = at.row + p, column = at.column + q;
  if (row < 0 || column < 0) return -1;
  if (w.up > 1) row /= w.up, column /= w.up;
  return row < w.h && column < w.w ? at.image + long(row) * w.w + column : -1;
}

template <class T>
__device__ const T* channel_at(const Product<T>& p, long pixel, int c) {
  return c < p.C1 ? p.x + pixel * p.C1 + c : p.x2 + pixel * p.C2 + (c - p.C1);
}

// The rows of a tile of C, in shared memory: what they read, if they are positions, and where they are written.
template <int COUNT>
struct Rows {
  Position position[COUNT];
  long out[COUNT];  // a pixel's number, or with OF_WEIGHTS a row of the weights; -1: none
  int b[COUNT];
};

// ---- what a block computes

template <bool OF_WEIGHTS>
struct Share {
  Part part;
  long M, K, m0;
  int n0, split;
  long k0;    // where this split begins
  int steps;  // of BK from there

  // Neighbouring blocks have the same rows: what one gathers the others find in the second-level cache.
  template <class T>
  __device__ Share(const Product<T>& p, int BM, int BN, int BK, long row_tiles) {
    long number = blockIdx.x;
    int column_tiles = (p.N + BN - 1) / BN;
    n0 = int(number % column_tiles) * BN, number /= column_tiles;
    m0 = number % row_tiles * BM, number /= row_tiles;
    split = int(number % p.splits);
    part = part_of(p, int(number / p.splits));
    const Window& w = part.window;
    M = long(p.B) * w.H * w.W, K = long(w.kh) * w.kw * p.channels();
    if (OF_WEIGHTS) {
      long swap = M;
      M = K, K = swap;
    }
    long all = (K + BK - 1) / BK, first = all * split / p.splits;
    k0 = first * BK, steps = int(all * (split + 1) / p.splits - first);
  }

  // Row m of the product: its position, what it writes (see Rows) and its image.
  template <class T>
  __device__ void find_row(const Product<T>& p, long m, Position& position, long& out, int& b) const {
    position = {0, OUTSIDE, OUTSIDE}, out = -1, b = 0;
    if (m >= M) return;
    if (OF_WEIGHTS) {
      long tap = m / p.channels();
      int c = int(m - tap * p.channels());
      if (c < p.C) out = tap * p.C + c;
    } else {
      int i, j;
      position = position_of(part.window, m, b, i, j);
      out = (long(b) * p.window.H + part.row + long(p.spread) * i) * p.window.W + part.column + long(p.spread) * j;
    }
  }
  template <class T, int COUNT>
  __device__ void find_rows(const Product<T>& p, Rows<COUNT>& rows) const {
    for (int r = threadIdx.x; r < COUNT; r += blockDim.x) {
      Position position;
      find_row(p, m0 + r, position, rows.out[r], rows.b[r]);
      rows.position[r] = position;
    }
  }

  // Where this split's results go.
  template <class T>
  __device__ Output output(const Product<T>& p) const {
    if (p.splits == 1) return p.out;
    Output o;
    o.y = p.partial + split * p.out_rows * p.N, o.N1 = p.N, o.vectors = p.out.vectors;
    return o;
  }
};

// ---- tiles in shared memory

// Where a chunk of a tile lies whose rows have CHUNKS of them. Rows shorter than 128 bytes share a line of the banks.
template <class T, int CHUNKS, bool SWIZZLED>
__device__ unsigned chunk_at(unsigned row, unsigned chunk) {
  if (SWIZZLED) chunk ^= CHUNKS >= 8 ? row % 8 : row / (8 / CHUNKS) % CHUNKS;
  return (row * CHUNKS + chunk) * CHUNK<T>;
}

template <class Tile>
__device__ unsigned a_chunk_at(unsigned row, unsigned chunk) {  // of A, where it is read along k
  return chunk_at<typename Tile::T, STEP_BYTES / CHUNK_BYTES, true>(row, chunk);
}
// Of tiles with a row for each k. Floats are read along such a row, which needs no swizzle; ldmatrix reads eight rows.
template <class T, int WIDTH>
__device__ unsigned k_chunk_at(unsigned k, unsigned chunk) {
  return chunk_at<T, WIDTH / CHUNK<T>, sizeof(T) == 2>(k, chunk);
}

// 16 bytes, or one float, from global to shared memory; zero if there are none.
template <bool ASYNC, class T>
__device__ void copy_chunk(T* to, const T* from, bool there) {
  if constexpr (ASYNC)
    cp_async<CHUNK_BYTES>(to, from, there ? CHUNK_BYTES : 0);
  else
    *reinterpret_cast<float4*>(to) = there ? *reinterpret_cast<const float4*>(from) : make_float4(0, 0, 0, 0);
}
template <bool ASYNC>
__device__ void copy_float(float* to, const float* from, bool there) {
  if constexpr (ASYNC)
    cp_async<4>(to, from, there ? 4 : 0);
  else
    *to = there ? *from : 0.0f;
}

// Tiles of A, one after the other along k = (tap, channel): [BM][STEP].
template <class Tile, bool ASYNC>
struct GatherRows {
  using T = typename Tile::T;
  static constexpr int PER_ROW = STEP_BYTES / CHUNK_BYTES, PASS = Tile::THREADS / PER_ROW;
  const Product<T>& p;
  const Window& w;
  const Rows<Tile::BM>& rows;
  unsigned row, chunk;
  Tap tap;

  __device__ GatherRows(const Product<T>& p, const Share<false>& s, const Rows<Tile::BM>& rows)
      : p(p), w(s.part.window), rows(rows), row(threadIdx.x / PER_ROW), chunk(threadIdx.x % PER_ROW),
        tap(w, p.channels(), s.k0 + chunk * CHUNK<T>) {}

  __device__ void next(T* A) {
    if (sizeof(T) == 2 || p.x_vectors) {
#pragma unroll
      for (int r = 0; r < Tile::BM; r += PASS) {
        long pixel = tap.p < w.kh ? pixel_under(w, rows.position[row + r], tap.p, tap.q) : -1;
        const T* from = pixel < 0 ? p.x : channel_at(p, pixel, tap.c);
        copy_chunk<ASYNC>(A + a_chunk_at<Tile>(row + r, chunk), from, pixel >= 0);
      }
      tap.advance(STEP<T>, w, p.channels());
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll 1
      for (int e = 0; e < CHUNK<T>; e++, tap.advance(1, w, p.channels()))
#pragma unroll 1
        for (int r = 0; r < Tile::BM; r += PASS) {
          long pixel = tap.p < w.kh ? pixel_under(w, rows.position[row + r], tap.p, tap.q) : -1;
          const T* from = pixel < 0 ? p.x : channel_at(p, pixel, tap.c);
          copy_float<ASYNC>(A + a_chunk_at<Tile>(row + r, chunk) + e, from, pixel >= 0);
        }
      tap.advance(STEP<T> - CHUNK<T>, w, p.channels());
    }
  }
};

// Tiles of A^T, one after the other along k = position: [STEP][BM].
template <class Tile, bool ASYNC>
struct GatherColumns {
  using T = typename Tile::T;
  static constexpr int PER_ROW = Tile::BM / CHUNK<T>, PASS = Tile::THREADS / PER_ROW, COUNT = STEP<T> / PASS;
  const Product<T>& p;
  const Window& w;
  unsigned row, chunk;
  int i[COUNT], j[COUNT];
  long image[COUNT], behind;  // first pixels: of the image with position i, j, and behind the last image
  Tap tap;

  __device__ GatherColumns(const Product<T>& p, const Share<true>& s, const Rows<Tile::BM>&)
      : p(p), w(s.part.window), row(threadIdx.x / PER_ROW), chunk(threadIdx.x % PER_ROW),
        behind(long(p.B) * w.h * w.w), tap(w, p.channels(), s.m0 + chunk * CHUNK<T>) {
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
      int b;
      image[r] = position_of(w, s.k0 + row + r * PASS, b, i[r], j[r]).image;
    }
  }

  __device__ const T* find(int r, const Tap& t, bool& there) const {
    Position at{image[r], i[r] * w.stride - w.top, j[r] * w.stride - w.left};
    long pixel = t.p < w.kh && image[r] < behind ? pixel_under(w, at, t.p, t.q) : -1;
    there = pixel >= 0;
    return there ? channel_at(p, pixel, t.c) : p.x;
  }

  __device__ void next(T* A) {
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
      T* to = A + k_chunk_at<T, Tile::BM>(row + r * PASS, chunk);
      bool there;
      if (sizeof(T) == 2 || p.x_vectors) {
        const T* from = find(r, tap, there);
        copy_chunk<ASYNC>(to, from, there);
      } else if constexpr (sizeof(T) == 4) {
        Tap t = tap;
#pragma unroll 1
        for (int e = 0; e < CHUNK<T>; e++, t.advance(1, w, p.channels())) {
          const T* from = find(r, t, there);
          copy_float<ASYNC>(to + e, from, there);
        }
      }
      for (j[r] += STEP<T>; j[r] >= w.W; j[r] -= w.W)
        if (++i[r] == w.H) i[r] = 0, image[r] += long(w.h) * w.w;
    }
  }
};

template <class Tile, bool ASYNC, bool OF_WEIGHTS>
struct GatherOf {
  using type = GatherRows<Tile, ASYNC>;
};
template <class Tile, bool ASYNC>
struct GatherOf<Tile, ASYNC, true> {
  using type = GatherColumns<Tile, ASYNC>;
};

// Tiles of the matrix, one after the other along k: [STEP][BN].
template <class Tile, bool ASYNC>
struct MatrixTiles {
  using T = typename Tile::T;
  static constexpr int PER_ROW = Tile::BN / CHUNK<T>, CHUNKS = STEP<T> * PER_ROW;
  const Product<T>& p;
  const T* first;          // of the tile
  int left, left_columns;  // of the matrix, from there on

  template <bool OF_WEIGHTS>
  __device__ MatrixTiles(const Product<T>& p, const Share<OF_WEIGHTS>& s)
      : p(p), first(p.matrix + ((OF_WEIGHTS ? 0 : s.part.first_k) + s.k0) * p.columns + s.n0),
        left(int(min(s.K - s.k0, long(s.steps) * STEP<T>))), left_columns(p.columns - s.n0) {}

  __device__ void next(T* B) {
#pragma unroll
    for (int i = 0; i < CHUNKS; i += Tile::THREADS) {
      unsigned number = i + threadIdx.x, k = number / PER_ROW, chunk = number % PER_ROW;
      if (CHUNKS % Tile::THREADS && number >= CHUNKS) break;
      T* to = B + k_chunk_at<T, Tile::BN>(k, chunk);
      const T* from = first + long(k) * p.columns + chunk * CHUNK<T>;
      int count = int(k) < left ? left_columns - int(chunk * CHUNK<T>) : 0;
      if (sizeof(T) == 2 || p.matrix_vectors) {
        copy_chunk<ASYNC>(to, count > 0 ? from : p.matrix, count > 0);
      } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int e = 0; e < CHUNK<T>; e++) copy_float<ASYNC>(to + e, e < count ? from + e : p.matrix, e < count);
      }
    }
    first += long(STEP<T>) * p.columns, left -= STEP<T>;
  }
};

// ---- multiplying: how the threads of a block divide a tile of C among them

template <int COUNT, class F>
__device__ void read_fours(float (&to)[COUNT], const float* from, const F& place) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    float4 v = *reinterpret_cast<const float4*>(from + place(i));
    to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
  }
}

// A thread has TM x TN sums in registers; per k it reads TM + TN numbers for TM TN multiply-adds. A warp's lanes stand
// in 4 rows of 8 (a narrow tile: 16 of 2), so that what they read of A and B in one go are whole lines of the banks, or
// the same chunk for many of them.
template <int BM_, int BN_, int TM, int TN>
struct FloatTile {
  using T = float;
  static constexpr int BM = BM_, BN = BN_, DOWN = BM / TM, ACROSS = BN / TN, THREADS = DOWN * ACROSS;
  static constexpr int LANES_ACROSS = ACROSS < 8 ? ACROSS : 8, LANES_DOWN = 32 / LANES_ACROSS;
  static constexpr int BLOCKS = THREADS >= 256 ? 2 : 1;  // a multiprocessor, at least
  static_assert(TM % 4 == 0 && TN % 4 == 0 && DOWN % LANES_DOWN == 0);
  unsigned tx, ty;
  float sum[TM][TN];

  __device__ FloatTile() {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    tx = warp % (ACROSS / LANES_ACROSS) * LANES_ACROSS + lane % LANES_ACROSS;
    ty = warp / (ACROSS / LANES_ACROSS) * LANES_DOWN + lane / LANES_ACROSS;
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
      for (int j = 0; j < TN; j++) sum[i][j] = 0;
  }

  // Columns in groups of four; so are rows where a tile of A has a row for each k (A_BY_K), else ty, ty + DOWN, ...
  template <bool A_BY_K>
  __device__ unsigned row(int i) const { return A_BY_K ? (i / 4 * DOWN + ty) * 4 + i % 4 : ty + i * DOWN; }
  __device__ unsigned column(int j) const { return (j / 4 * ACROSS + tx) * 4; }

  // Of A two k at a time: half a chunk of each row, or two rows. Were the loop unrolled, more of A would be read ahead
  // than there are registers for.
  template <bool A_BY_K>
  __device__ void multiply(const float* A, const float* B) {
#pragma unroll 1
    for (int k0 = 0; k0 < STEP<T>; k0 += 2) {
      float a[2][TM];
      if constexpr (!A_BY_K) {
#pragma unroll
        for (int i = 0; i < TM; i++) {
          float2 v = *reinterpret_cast<const float2*>(A + a_chunk_at<FloatTile>(row<A_BY_K>(i), k0 / 4) + k0 % 4);
          a[0][i] = v.x, a[1][i] = v.y;
        }
      }
#pragma unroll
      for (int k = 0; k < 2; k++) {
        if constexpr (A_BY_K) read_fours(a[k], A + (k0 + k) * BM, [&](int i) { return row<A_BY_K>(i); });
        float b[TN];
        read_fours(b, B + (k0 + k) * BN, [&](int j) { return column(j); });
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
          for (int j = 0; j < TN; j++) sum[i][j] = fmaf(a[k][i], b[j], sum[i][j]);
      }
    }
  }

  template <bool A_BY_K>
  __device__ void finish(const Rows<BM>& rows, int n0, const Output& out) const {
#pragma unroll
    for (int i = 0; i < TM; i++) {
      unsigned r = row<A_BY_K>(i);
      long out_row = rows.out[r];
      if (out_row < 0) continue;
#pragma unroll
      for (int j = 0; j < TN; j += 4)
        out.put(out_row, rows.b[r], n0 + int(column(j)), {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]});
    }
  }
};

// A warp has WM x WN sums, as fragments of mma.sync (see ptx.h): for 16 k it loads WM / 16 fragments of A and WN / 8 of B
// for WM WN / 128 products.
template <int BM_, int BN_, int WM, int WN, int BLOCKS_>
struct TensorTile {
  using T = bf16;
  static constexpr int BM = BM_, BN = BN_, ACROSS = BN / WN, THREADS = BM / WM * ACROSS * 32, BLOCKS = BLOCKS_;
  static_assert(WM % 16 == 0 && WN % 16 == 0);
  unsigned lane, m, n;  // m, n: the warp's first row and column
  float sum[WM / 16][WN / 8][4];

  __device__ TensorTile() : lane(threadIdx.x % 32) {
    unsigned warp = threadIdx.x / 32;
    m = warp / ACROSS * WM, n = warp % ACROSS * WN;
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
      for (int j = 0; j < WN / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[i][j][e] = 0;
  }

  template <bool A_BY_K>
  __device__ void multiply(const bf16* A, const bf16* B) {
#pragma unroll
    for (int k = 0; k < STEP<T>; k += 16) {
      unsigned a[WM / 16][4], b[WN / 8][2];
#pragma unroll
      for (int i = 0; i < WM / 16; i++) {
        if constexpr (A_BY_K)
          ldmatrix_trans(a[i], A + k_chunk_at<T, BM>(k + lane % 8 + lane / 16 * 8, (m + i * 16) / 8 + lane / 8 % 2));
        else
          ldmatrix(a[i], A + a_chunk_at<TensorTile>(m + i * 16 + lane % 16, k / 8 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < WN / 8; j += 2) {
        unsigned both[4];
        ldmatrix_trans(both, B + k_chunk_at<T, BN>(k + lane % 16, n / 8 + j + lane / 16));
        b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
      }
#pragma unroll
      for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int j = 0; j < WN / 8; j++) mma_m16n8k16_bf16(sum[i][j], a[i], b[j], sum[i][j]);
    }
  }

  template <bool>
  __device__ void finish(const Rows<BM>& rows, int n0, const Output& out) const {
#pragma unroll
    for (int i = 0; i < WM / 8; i++) {
      unsigned r = m + i * 8 + lane / 4;
      long out_row = rows.out[r];
      if (out_row < 0) continue;
#pragma unroll
      for (int j = 0; j < WN / 8; j++)
        out.put(out_row, rows.b[r], n0 + int(n + j * 8 + lane % 4 * 2),
                {sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]});
    }
  }
};

// ---- passes before and after

// The sum of what the splits found, always in the same order, and what goes with it.
template <int COUNT>
__global__ void add_splits(const float* partial, int splits, long rows, long rows_an_image, Output out) {
  int N = out.N1 + out.N2, across = (N + COUNT - 1) / COUNT;
  long i = long(blockIdx.x) * blockDim.x + threadIdx.x, row = i / across;
  int n = int(i - row * across) * COUNT;
  if (row >= rows) return;
  float v[COUNT] = {};
  for (int s = 0; s < splits; s++) {
    const float* from = partial + (s * rows + row) * N + n;
    if constexpr (COUNT == 4) {
      float4 a = *reinterpret_cast<const float4*>(from);
      v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w;
    } else {
      v[0] += *from;
    }
  }
  out.put(row, int(row / rows_an_image), n, v);
}

// Float32 rows, of two arrays side by side, as rows of bf16 with `width` numbers; what is beyond them is zero. Of every
// `padded_group` rows the first `group` are there.
__global__ void round_rows(bf16* out, int width, long rows, int group, int padded_group, const float* x, int width1,
                           const float* x2, int width2, bool vectors) {
  int across = width / 4;
  long i = long(blockIdx.x) * blockDim.x + threadIdx.x, row = i / across;
  if (row >= rows) return;
  int c = int(i - row * across) * 4, N = width1 + width2;
  long of_group = row / padded_group, in_group = row - of_group * padded_group, from = of_group * group + in_group;
  float4 v = {};
  if (in_group < group) {
    auto at = [&](int c) { return c < width1 ? x + from * width1 + c : x2 + from * width2 + (c - width1); };
    if (!vectors)
      v = {c < N ? *at(c) : 0, c + 1 < N ? *at(c + 1) : 0, c + 2 < N ? *at(c + 2) : 0, c + 3 < N ? *at(c + 3) : 0};
    else if (c < N)
      v = *reinterpret_cast<const float4*>(at(c));
  }
  uint2 packed = {pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)};
  *reinterpret_cast<uint2*>(out + row * width + c) = packed;
}

}  // namespace
}  // namespace minidiff::cuda
