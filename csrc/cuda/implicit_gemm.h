// Implicit GEMM: products C = A B in which A is never stored. A holds the windows of an image, a row for each output
// position and a column for each tap and channel; whoever needs a piece of A gathers it from the image:
//
//              k = (tap, channel)                 N                           image
//            ┌────────┬──────────┐         ┌──────┬───┐                  ┌──────────────┐
//   m = (b,  │        │▓▓▓▓ STEP─►   ×    │      │▓▓▓│ STEP             │  ┌─────┐     │  a row of A: the window
//   i, j)    │        │▓▓▓▓      │         │      │ │ │                  │  │░░░░░│     │  under a position. The same
//            ├────────┼──────────┤ rows    ├──────┼─▼─┤                  │  │░░░░░│     │  pixel lies in kh kw windows:
//            │        │          │         │      │   │                  │  └─────┘     │  stored, A were so many
//            └────────┴──────────┘         └──────┴───┘ columns          └──────────────┘  times the image
//
// A block computes a tile of rows x columns numbers of C; it walks along k in steps of 64 bytes, and for each step brings a
// tile of A and one of B to shared memory. Chunks of 16 bytes are what threads copy. Where one of A lies is a sum, so that a
// step costs a few instructions for each: the pixel under tap (0, 0), which belongs to the row, and how far behind it the
// tap and the channel are, which belongs to the column.
//
// The gradient of the weights is a product with the same A, transposed: there positions are summed over, tiles of A have a
// row for each position, as they are gathered, and the multiplying threads read them the other way.
//
// Arrays have at most MOST_PIXELS pixels and as many positions: their numbers are ints.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "activations.cuh"
#include "stream.h"
#include "tiles.h"

namespace minidiff::cuda {
namespace {

using bf16 = __nv_bfloat16;

constexpr int STEP_BYTES = 64;  // of k: 16 floats or 32 bf16
constexpr int CHUNK_BYTES = 16;
template <class T>
constexpr int CHUNK = CHUNK_BYTES / int(sizeof(T));  // numbers
template <class T>
constexpr int STEP = STEP_BYTES / int(sizeof(T));
constexpr long MOST_PIXELS = 1L << 30;

// ---- the matrices

// How the windows of output positions lie over the stored images, every pixel of which counts `up` times both ways.
struct Window {
  int h, w, up;
  int kh, kw, stride, top, left;
  int H, W;  // positions

  // n / up, for up > 1 and n below 2^32 / up
  __device__ int divided(int n) const { return int(__umulhi(unsigned(n), 0xffffffffu / unsigned(up) + 1)); }
};

// What a product writes: columns 0.. of N1 to y, those behind to y2, + bias (N,) + shift (B, N) + residual; SiLU of that.
struct Output {
  float *y = nullptr, *y2 = nullptr;
  int N1 = 0, N2 = 0;
  const float *bias = nullptr, *shift = nullptr, *residual = nullptr;
  bool silu = false, vectors = false;

  // Columns n.. of a row that belongs to this pixel of image b.
  template <int COUNT>
  __device__ void put(long pixel, int b, int n, const float (&sums)[COUNT]) const {
    int N = N1 + N2, count = min(N - n, COUNT);
    if (count <= 0) return;
    float v[COUNT];
#pragma unroll
    for (int e = 0; e < COUNT; e++) v[e] = sums[e];
    auto add = [&](const float* from) {
      float added[COUNT];
      load_row(added, from, vectors, count);
#pragma unroll
      for (int e = 0; e < COUNT; e++) v[e] += added[e];
    };
    if (bias) add(bias + n);
    if (shift) add(shift + long(b) * N + n);
    if (residual) add(residual + pixel * N + n);
    if (silu)
#pragma unroll
      for (int e = 0; e < COUNT; e++) v[e] = activated<SILU>(v[e]);
    auto at = [&](int n) { return n < N1 ? y + pixel * N1 + n : y2 + pixel * N2 + (n - N1); };
    if (COUNT == 4 && vectors) {
      store_row(at(n), v, true, COUNT);
    } else {
#pragma unroll
      for (int e = 0; e < COUNT; e++)
        if (e < count) *at(n + e) = v[e];
    }
  }
};

// A product with windows: OF_WEIGHTS false: C (positions, N) = windows (positions, taps C) @ matrix (taps C, columns);
// OF_WEIGHTS true: C (taps C, N) = windows^T @ matrix (positions, columns).
template <class T>
struct Product {
  const T *x = nullptr, *x2 = nullptr;  // images (B, h, w, C1) and, beside them, (B, h, w, C2); of bf16 there is one
  int B = 0, C1 = 0, C2 = 0;            // channels as they are stored, with padding
  int C = 0;                            // without
  Window window;
  int spread = 1;                       // see Part
  const T* matrix = nullptr;
  int columns = 0, N = 0;               // of the matrix as it is stored, and of the result
  bool x_vectors = false, matrix_vectors = false;  // whether chunks can be copied at once; of bf16 they can
  Output out;
  long out_rows = 0;
  int splits = 1;                       // of k, each of which writes sums of its own to
  float* partial = nullptr;             // (splits, out_rows, N)

  __host__ __device__ int channels() const { return C1 + C2; }
};

// Between the pixels of the image lie spread - 1 zeros: the gradient of a convolution with that stride reads such an image,
// and so does one whose input is repeated, with taps that each stand for several. Most of the taps fall on zeros. But output
// pixels whose row and column leave the same remainders when divided by spread have all their nonzero taps in common; so the
// product falls into spread^2 parts, each an ordinary one, without zeros, with its own taps (t = t0, t0 + spread, ...), which
// lie side by side in the matrix.
struct Part {
  Window window;
  int row, column;  // remainders
  int first_k;      // of the matrix
};

// In one direction: of `count` taps, those that leave a remainder less than r when divided by spread.
__host__ __device__ inline int taps_before(int count, int spread, int r) {
  return count / spread * r + min(count % spread, r);
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
  if (p.spread == 1) return {w, 0, 0, 0};
  int across = min(p.spread, w.W), row = number / across, column = number % across;
  PartTaps v = part_taps(w.kh, p.spread, w.stride, w.top, w.H, row);
  PartTaps h = part_taps(w.kw, p.spread, w.stride, w.left, w.W, column);
  int taps = taps_before(w.kh, p.spread, v.t0) * w.kw + v.count * taps_before(w.kw, p.spread, h.t0);
  return {{w.h, w.w, w.up, v.count, h.count, w.stride, v.margin, h.margin, v.positions, h.positions}, row, column,
          taps * p.channels()};
}

// ---- rows and columns of A

constexpr int OUTSIDE = -(1 << 30);  // a row or a tap that meets no pixel

// A position: one row of A. Where tap (0, 0) falls on the seen image, and in the stored one, if that is the same (`up` is 1),
// the pixel's number; else that of the image's first pixel.
struct Position {
  int pixel, row, column;
};
__device__ inline Position position_at(const Window& w, int b, int i, int j) {
  int row = i * w.stride - w.top, column = j * w.stride - w.left, image = b * w.h * w.w;
  return {w.up == 1 ? image + row * w.w + column : image, row, column};
}
// b, i and j: the image, row and column of the position with this number.
__device__ inline Position position_of(const Window& w, int number, int& b, int& i, int& j) {
  int line = number / w.W;
  j = number - line * w.W, b = line / w.H, i = line - b * w.H;
  return position_at(w, b, i, j);
}

// A tap and a channel.
struct Tap {
  int p, q, c;
  __device__ Tap(const Window& w, int channels, int k) {
    int tap = k / max(channels, 1), across = max(w.kw, 1);
    c = k - tap * channels, p = tap / across, q = tap % across;
  }
  __device__ void advance(int n, const Window& w, int channels) {
    for (c += n; c >= channels; c -= channels)
      if (++q == w.kw) q = 0, p++;
  }
};

// A column of A, or a chunk of them: a tap, and a channel of one of the two inputs.
template <class T>
struct Column {
  int p, q;
  int pixel_bytes;    // from pixel to pixel
  const char* first;  // what a position with pixel 0 meets

  Column() = default;
  __device__ Column(const Product<T>& product, const Window& w, const Tap& tap) {
    p = tap.p < w.kh ? tap.p : OUTSIDE, q = tap.q;
    bool second = sizeof(T) == 4 && tap.c >= product.C1;
    int C = second ? product.C2 : product.C1, pixel = w.up == 1 ? tap.p * w.w + tap.q : 0;
    pixel_bytes = C * int(sizeof(T));
    first = reinterpret_cast<const char*>((second ? product.x2 - product.C1 : product.x) + long(pixel) * C + tap.c);
  }
  __device__ const T* at(int pixel) const { return reinterpret_cast<const T*>(first + long(pixel) * pixel_bytes); }

  // What a position meets here; there: whether it is a pixel, not padding.
  __device__ const T* find(const Window& w, const Position& position, bool& there) const {
    int row = position.row + p, column = position.column + q;
    there = unsigned(row) < unsigned(w.h) && unsigned(column) < unsigned(w.w);
    return at(position.pixel);
  }
  __device__ const T* find_repeated(const Window& w, const Position& position, bool& there) const {
    int row = position.row + p, column = position.column + q;
    there = unsigned(row) < unsigned(w.h * w.up) && unsigned(column) < unsigned(w.w * w.up);
    return at(position.pixel + w.divided(row) * w.w + w.divided(column));
  }
};

// ---- what a block computes

// The rows of a tile of C, in shared memory: what they read, if they are positions, and where they are written.
template <int COUNT>
struct Rows {
  Position position[COUNT];
  int out[COUNT];  // a pixel's number, or with OF_WEIGHTS a row of the weights; -1: none
  int b[COUNT];
};

template <bool OF_WEIGHTS>
struct Share {
  Part part;
  int M, K, m0, n0, split;
  int k0;     // where this split begins
  int steps;  // from there

  // Neighbouring blocks have the same rows: what one gathers the others find in the second-level cache.
  template <class T>
  __device__ Share(const Product<T>& p, int rows, int columns, int step, int row_tiles) {
    int number = int(blockIdx.x), column_tiles = (p.N + columns - 1) / columns;
    n0 = number % column_tiles * columns, number /= column_tiles;
    m0 = number % row_tiles * rows, number /= row_tiles;
    split = number % p.splits;
    part = part_of(p, number / p.splits);
    const Window& w = part.window;
    int positions = p.B * w.H * w.W, taps = w.kh * w.kw * p.channels();
    M = OF_WEIGHTS ? taps : positions, K = OF_WEIGHTS ? positions : taps;
    long all = (long(K) + step - 1) / step;
    int first = int(all * split / p.splits);
    k0 = first * step, steps = int(all * (split + 1) / p.splits) - first;
  }

  // Row m of the product: its position, what it writes (see Rows) and its image.
  template <class T>
  __device__ void find_row(const Product<T>& p, int m, Position& position, int& out, int& b) const {
    position = {0, OUTSIDE, OUTSIDE}, out = -1, b = 0;
    if (m >= M) return;
    if (OF_WEIGHTS) {
      int tap = m / p.channels(), c = m - tap * p.channels();
      if (c < p.C) out = tap * p.C + c;
    } else {
      int i, j;
      position = position_of(part.window, m, b, i, j);
      out = (b * p.window.H + part.row + p.spread * i) * p.window.W + part.column + p.spread * j;
    }
  }
  template <class T, int COUNT>
  __device__ void find_rows(const Product<T>& p, Rows<COUNT>& rows) const {
    for (int r = threadIdx.x; r < COUNT; r += blockDim.x) find_row(p, m0 + r, rows.position[r], rows.out[r], rows.b[r]);
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

// ---- tiles on their way into shared memory

// Where a chunk of a tile lies. Tiles of floats with a row for each k are read along that row, which needs no swizzle.
template <class T, int CHUNKS, bool BY_K>
__device__ unsigned chunk_at(unsigned row, unsigned chunk) {
  return (sizeof(T) == 4 && BY_K ? row * CHUNKS + chunk : swizzled<CHUNKS>(row, chunk)) * CHUNK<T>;
}

// 16 bytes, or one float, from global to shared memory; zero if there are none.
template <bool ASYNC, class T>
__device__ void copy_chunk(T* to, const T* from, bool there) {
  if constexpr (ASYNC)
    cp_async_if<CHUNK_BYTES>(to, from, there);
  else
    *reinterpret_cast<float4*>(to) = there ? *reinterpret_cast<const float4*>(from) : make_float4(0, 0, 0, 0);
}
template <bool ASYNC>
__device__ void copy_float(float* to, const float* from, bool there) {
  if constexpr (ASYNC)
    cp_async_if<4>(to, from, there);
  else
    *to = there ? *from : 0.0f;
}

// Tiles of A, one after the other along k = (tap, channel): [rows][STEP]. A thread keeps to its rows.
template <class Tile, bool ASYNC>
struct GatherRows {
  using T = typename Tile::T;
  static constexpr int CHUNKS = STEP_BYTES / CHUNK_BYTES, DOWN = Tile::threads / CHUNKS, COUNT = Tile::rows / DOWN;
  static_assert(COUNT * DOWN == Tile::rows && DOWN % 8 == 0, "all threads copy alike");
  const Product<T>& p;
  const Window& w;
  int place;  // in a tile
  Position positions[COUNT];
  Tap tap;

  __device__ GatherRows(const Product<T>& p, const Share<false>& s, const Rows<Tile::rows>& rows)
      : p(p), w(s.part.window), place(chunk_at<T, CHUNKS, false>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS)),
        tap(w, p.channels(), s.k0 + threadIdx.x % CHUNKS * CHUNK<T>) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) positions[i] = rows.position[threadIdx.x / CHUNKS + i * DOWN];
  }

  __device__ void next(T* A) {
    bool there;
    if (sizeof(T) == 2 || p.x_vectors) {
      Column<T> column(p, w, tap);
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        const T* from = column.find(w, positions[i], there);
        copy_chunk<ASYNC>(A + place + i * DOWN * STEP<T>, from, there);
      }
      tap.advance(STEP<T>, w, p.channels());
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll 1
      for (int e = 0; e < CHUNK<T>; e++, tap.advance(1, w, p.channels())) {
        Column<T> column(p, w, tap);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
          const T* from = column.find(w, positions[i], there);
          copy_float<ASYNC>(A + place + i * DOWN * STEP<T> + e, from, there);
        }
      }
      tap.advance(STEP<T> - CHUNK<T>, w, p.channels());
    }
  }
};

// Tiles of the pixels under all windows of a tile, one after the other along the channels: [pixels][STEP]. The image is as
// large as the result, so they follow each other in memory, and row r of the product meets pixel r + p w + q under tap (p, q).
template <class Tile>
struct PixelRows {
  using T = bf16;
  static constexpr int CHUNKS = STEP_BYTES / CHUNK_BYTES, DOWN = Tile::threads / CHUNKS;
  const Product<T>& p;
  int place, pixel, c;  // in a tile; the thread's first pixel and its channel
  const T* from;

  // How many chunks a thread copies.
  static __host__ __device__ int count(int width, int kh, int kw) {
    return (Tile::rows + (kh - 1) * width + kw - 1 + DOWN - 1) / DOWN;
  }
  __device__ PixelRows(const Product<T>& p, const Share<false>& s)
      : p(p), place(chunk_at<T, CHUNKS, false>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS)),
        pixel(s.m0 - s.part.window.top * s.part.window.w - s.part.window.left + int(threadIdx.x / CHUNKS)),
        c(s.k0 + threadIdx.x % CHUNKS * CHUNK<T>), from(p.x + long(pixel) * p.C1 + c) {}

  // The chunks from `first` to `end` that this thread copies.
  __device__ void copy(T* pixels, int first, int end) const {
#pragma unroll 1
    for (int i = first * DOWN; i < end * DOWN; i += DOWN)
      copy_chunk<true>(pixels + place + i * STEP<T>, from + long(i) * p.C1,
                       unsigned(pixel + i) < unsigned(p.B * p.window.h * p.window.w) && c < p.C1);
  }
  __device__ void advance() { from += STEP<T>, c += STEP<T>; }
};

// From a position to the one `step` behind it: how far it is, and what more where a row of positions ends in between, or an
// image.
struct Walk {
  Position far, row_end, image_end;
  int last_row, last_column;  // of an image, and one more

  __device__ Walk(const Window& w, int step) : last_row(w.H * w.stride - w.top), last_column(w.W * w.stride - w.left) {
    int W = max(w.W, 1), H = max(w.H, 1), lines = step / W, images = lines / H;
    auto move = [&](int image, int row, int column) {
      int pixels = w.up == 1 ? row * w.stride * w.w + column * w.stride : 0;
      return Position{image * w.h * w.w + pixels, row * w.stride, column * w.stride};
    };
    far = move(images, lines - images * H, step - lines * W);
    row_end = move(0, 1, -w.W), image_end = move(1, -w.H, 0);
  }
  __device__ void advance(Position& at) const {
    auto move = [&](const Position& by) { at.pixel += by.pixel, at.row += by.row, at.column += by.column; };
    move(far);
    if (at.column >= last_column) move(row_end);
    if (at.row >= last_row) move(image_end);
  }
};

// Tiles of A^T, one after the other along k = position: [STEP][rows]. A thread keeps to its chunks of taps and channels;
// eight threads copy a line of 128 bytes.
template <class Tile, bool ASYNC>
struct GatherColumns {
  using T = typename Tile::T;
  static constexpr int CHUNKS = Tile::rows / CHUNK<T>, ACROSS = Tile::threads > 8 * STEP<T> ? Tile::threads / STEP<T> : 8;
  static constexpr int DOWN = Tile::threads / ACROSS, COLUMNS = CHUNKS / ACROSS, POSITIONS = STEP<T> / DOWN;
  static_assert(COLUMNS * ACROSS == CHUNKS && POSITIONS * DOWN == STEP<T> && DOWN % 8 == 0, "all threads copy alike");
  const Product<T>& p;
  const Window& w;
  int place, m, left;  // in a tile; the thread's first column; positions from its first one on
  Column<T> columns[COLUMNS];
  Position positions[POSITIONS];
  Walk walk;

  __device__ GatherColumns(const Product<T>& p, const Share<true>& s, const Rows<Tile::rows>&)
      : p(p), w(s.part.window), place(chunk_at<T, CHUNKS, true>(threadIdx.x / ACROSS, threadIdx.x % ACROSS)),
        m(s.m0 + threadIdx.x % ACROSS * CHUNK<T>), left(s.K - s.k0 - int(threadIdx.x / ACROSS)), walk(w, STEP<T>) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) columns[i] = Column<T>(p, w, Tap(w, p.channels(), m + i * ACROSS * CHUNK<T>));
    int b, i, j;
#pragma unroll
    for (int k = 0; k < POSITIONS; k++) positions[k] = position_of(w, s.K - left + k * DOWN, b, i, j);
  }

  __device__ void next(T* A) {
    if (sizeof(T) == 4 && !p.x_vectors)
      copy_floats(A);
    else if (w.up == 1)
      copy_chunks(A, [&](const Column<T>& c, const Position& at, bool& there) { return c.find(w, at, there); });
    else
      copy_chunks(A, [&](const Column<T>& c, const Position& at, bool& there) { return c.find_repeated(w, at, there); });
#pragma unroll
    for (int k = 0; k < POSITIONS; k++) walk.advance(positions[k]);
    left -= STEP<T>;
  }

 private:
  template <class F>
  __device__ void copy_chunks(T* A, const F& find) const {
#pragma unroll
    for (int k = 0; k < POSITIONS; k++)
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) {
        bool there;
        const T* from = find(columns[i], positions[k], there);
        copy_chunk<ASYNC>(A + place + k * DOWN * Tile::rows + i * ACROSS * CHUNK<T>, from, there && k * DOWN < left);
      }
  }
  __device__ void copy_floats(T* A) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll 1
      for (int e = 0; e < COLUMNS * CHUNK<T>; e++) {
        int i = e / CHUNK<T> * ACROSS * CHUNK<T> + e % CHUNK<T>;
        Column<T> column(p, w, Tap(w, p.channels(), m + i));
#pragma unroll
        for (int k = 0; k < POSITIONS; k++) {
          bool there;
          const T* from = w.up == 1 ? column.find(w, positions[k], there) : column.find_repeated(w, positions[k], there);
          copy_float<ASYNC>(A + place + k * DOWN * Tile::rows + i, from, there && k * DOWN < left);
        }
      }
    }
  }
};

// Tiles of the matrix, one after the other along k: [STEP][columns].
template <class Tile, bool ASYNC>
struct MatrixTiles {
  using T = typename Tile::T;
  static constexpr int CHUNKS = Tile::columns / CHUNK<T>, DOWN = Tile::threads / CHUNKS;
  static_assert(Tile::threads % CHUNKS == 0 && DOWN % 8 == 0, "all threads copy alike");
  const Product<T>& p;
  int place, left, left_columns;  // in a tile; of the matrix, from the thread's first chunk on
  const T* from;

  template <bool OF_WEIGHTS>
  __device__ MatrixTiles(const Product<T>& p, const Share<OF_WEIGHTS>& s)
      : p(p), place(chunk_at<T, CHUNKS, true>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS)) {
    int k = s.k0 + threadIdx.x / CHUNKS, n = s.n0 + threadIdx.x % CHUNKS * CHUNK<T>;
    from = p.matrix + long((OF_WEIGHTS ? 0 : s.part.first_k) + k) * p.columns + n;
    left_columns = p.columns - n, left = left_columns > 0 && threadIdx.x / CHUNKS < STEP<T> ? s.K - k : 0;
  }

  __device__ void next(T* B) {
    copy(B);
    move(STEP<T>, STEP<T>);
  }
  // On to the tile that begins so many rows further on, whose first row has so many fewer behind it.
  __device__ void move(int rows, int fewer) { from += long(rows) * p.columns, left -= fewer; }
  __device__ void copy(T* B) const {
#pragma unroll
    for (int i = 0; i < STEP<T>; i += DOWN) {
      if (DOWN > STEP<T> && threadIdx.x / CHUNKS >= STEP<T>) break;
      T* to = B + place + i * Tile::columns;
      const T* row = from + long(i) * p.columns;
      if (sizeof(T) == 2 || p.matrix_vectors) {
        copy_chunk<ASYNC>(to, row, i < left);
      } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int e = 0; e < CHUNK<T>; e++) copy_float<ASYNC>(to + e, row + e, i < left && e < left_columns);
      }
    }
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
template <int ROWS, int COLUMNS, int TM, int TN, bool OF_WEIGHTS>
struct FloatTile : Tile<ROWS, COLUMNS, STEP<float>, ROWS / TM * (COLUMNS / TN), ROWS / TM * (COLUMNS / TN) >= 256 ? 2 : 1> {
  using T = float;
  static constexpr bool of_weights = OF_WEIGHTS;
  static constexpr int DOWN = ROWS / TM, ACROSS = COLUMNS / TN, CHUNKS = STEP_BYTES / CHUNK_BYTES;
  static constexpr int LANES_ACROSS = ACROSS < 8 ? ACROSS : 8, LANES_DOWN = 32 / LANES_ACROSS;
  static_assert(TM % 4 == 0 && TN % 4 == 0 && DOWN % LANES_DOWN == 0);
  float sum[TM][TN] = {};

  static __device__ int tx() { return threadIdx.x / 32 % (ACROSS / LANES_ACROSS) * LANES_ACROSS + threadIdx.x % LANES_ACROSS; }
  static __device__ int ty() {
    return threadIdx.x / 32 / (ACROSS / LANES_ACROSS) * LANES_DOWN + threadIdx.x % 32 / LANES_ACROSS;
  }
  // Columns in groups of four; so are rows where a tile of A has a row for each k, else ty, ty + DOWN, ...
  static __device__ int row(int i, int ty) { return OF_WEIGHTS ? (i / 4 * DOWN + ty) * 4 + i % 4 : ty + i * DOWN; }
  static __device__ int column(int j) { return (j / 4 * ACROSS + tx()) * 4; }

  // Of A two k at a time: half a chunk of each row, or two rows. Were the loop unrolled, more of A would be read ahead
  // than there are registers for.
  __device__ void multiply(const float* A, const float* B) {
#pragma unroll 1
    for (int k0 = 0; k0 < STEP<T>; k0 += 2) {
      float a[2][TM];
      if constexpr (!OF_WEIGHTS) {
#pragma unroll
        for (int i = 0; i < TM; i++) {
          float2 v = *reinterpret_cast<const float2*>(A + chunk_at<T, CHUNKS, false>(row(i, ty()), k0 / 4) + k0 % 4);
          a[0][i] = v.x, a[1][i] = v.y;
        }
      }
#pragma unroll
      for (int k = 0; k < 2; k++) {
        if constexpr (OF_WEIGHTS) read_fours(a[k], A + (k0 + k) * ROWS, [&](int i) { return row(i, ty()); });
        float b[TN];
        read_fours(b, B + (k0 + k) * COLUMNS, [&](int j) { return column(j); });
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
          for (int j = 0; j < TN; j++) sum[i][j] = fmaf(a[k][i], b[j], sum[i][j]);
      }
    }
  }

  // One row of every thread's at a time.
  static constexpr int SLABS = TM, SLAB_ROWS = DOWN;
  static __device__ int row_of(int slab, int r) { return row(slab, r); }
  __device__ void stage(int slab, float (*to)[COLUMNS + STAGE_PAD]) const {
#pragma unroll
    for (int i = 0; i < TM; i++) {
      if (i != slab) continue;
#pragma unroll
      for (int j = 0; j < TN; j += 4)
        *reinterpret_cast<float4*>(&to[ty()][column(j)]) = make_float4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]);
    }
  }
};

// A warp has WARP_ROWS x WARP_COLUMNS sums.
template <int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int RESIDENT, bool OF_WEIGHTS>
struct TensorTile : Tile<ROWS, COLUMNS, STEP<bf16>, ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32, RESIDENT>,
                    Fragments<Tile<ROWS, COLUMNS, STEP<bf16>, ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32, RESIDENT>,
                              WARP_ROWS, WARP_COLUMNS> {
  using T = bf16;
  using Matrix = SwizzledTile<COLUMNS, STEP<T>, false>;
  static constexpr bool of_weights = OF_WEIGHTS;
  __device__ void multiply(const bf16* A, const bf16* B) {
    this->template add<SwizzledTile<ROWS, STEP<T>, !OF_WEIGHTS>, Matrix>(A, B);
  }
};

// What finish_rows wants of a tile: where its rows and columns go.
template <int ROWS>
struct Finish {
  const Rows<ROWS>& rows;
  int n0;
  Output out;
  const float* residual;

  __device__ Finish(const Rows<ROWS>& rows, int n0, const Output& to) : rows(rows), n0(n0), out(to), residual(to.residual) {
    out.residual = nullptr;
  }
  __device__ bool adds() const { return residual; }
  __device__ void load(float (&to)[4], int row, int column) const {
    int N = out.N1 + out.N2, count = rows.out[row] < 0 ? 0 : N - n0 - column;
    load_row(to, residual + long(rows.out[row]) * N + n0 + column, out.vectors && count > 0, count);
  }
  __device__ void operator()(int row, int column, const float* sums) const {
    if (rows.out[row] < 0) return;
    float v[4];
    load_row(v, sums + column, true, 4);
    out.put(rows.out[row], rows.b[row], n0 + column, v);
  }
};

// ---- the pass after

// The sum of what the splits found, always in the same order, and what goes with it. Eight warps divide the splits of 32
// times COUNT neighbours among them, so that enough loads are under way where the result is small.
template <int COUNT>
__global__ void add_splits(const float* partial, int splits, long rows, long rows_an_image, Output out) {
  constexpr int WARPS = 8;
  __shared__ __align__(16) float sums[WARPS][32][COUNT];
  int N = out.N1 + out.N2, across = (N + COUNT - 1) / COUNT, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  long i = long(blockIdx.x) * 32 + lane, row = i / across;
  int n = int(i - row * across) * COUNT;
  float v[COUNT] = {}, more[COUNT];
  if (row < rows)
#pragma unroll 4
    for (int s = warp; s < splits; s += WARPS) {
      load_row(more, partial + (s * rows + row) * N + n, true, COUNT);
#pragma unroll
      for (int e = 0; e < COUNT; e++) v[e] += more[e];
    }
  store_row(sums[warp][lane], v, true, COUNT);
  __syncthreads();
  if (warp > 0 || row >= rows) return;
#pragma unroll
  for (int w = 1; w < WARPS; w++) {
    load_row(more, sums[w][lane], true, COUNT);
#pragma unroll
    for (int e = 0; e < COUNT; e++) v[e] += more[e];
  }
  out.put(row, int(row / rows_an_image), n, v);
}

}  // namespace
}  // namespace minidiff::cuda
