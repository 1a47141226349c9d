// What the matrix products of linear layers are made of, besides tiles.h: where tiles lie in memory, how they come into
// shared memory, how threads multiply them, and what is done with the sums before they are stored.
//
//   C (M, N) = A (M, K) @ B (K, N)
//
// A line is a row of A or a column of B, so that both operands look alike: K numbers, `lines` of them. Where k is the
// contiguous direction in memory the operand lies along k (A stored (M, K), B stored (N, K)), else across it.
//
//                    N lines of B                 A block of threads owns a tile of C and walks along K in steps of
//                   ┌─────┬─────┐                 DEPTH. Each step it copies the lines of A and of B that it needs:
//                 K │     │░░░░░│
//                   └─────┴─────┘                       shared memory   a[DEPTH][rows + 4], b[DEPTH][columns + 4]
//            K      ┌─────┬─────┐
//   lines ┌─────┐   │     │     │                 whichever way they are stored. With GEGLU the upper half of a tile's
//   of A  │░░░░░│ M │     │█████│                 columns are not the next ones, but those N / 2 further on, which gate
//         └─────┘   └─────┴─────┘                 the lower half's.
#pragma once

#include "../kernels.h"
#include "activations.cuh"
#include "tiles.h"

namespace minidiff::cuda {

template <class T>
struct Operand {
  const T* data;
  long stride;  // from one line to the next, or across k from one k to the next
  bool along_k;
  bool vector;  // 16 bytes can be loaded at once: aligned, and no group of them is only partly inside
  __device__ const T* at(long line, long k) const { return data + (along_k ? line * stride + k : k * stride + line); }
};

// y (M, columns) = activation(sums + bias + residual); z (M, N), what the activation is applied to, is kept if not null.
struct Epilogue {
  float *y, *z;
  const float *bias, *residual;
  long N, columns;  // of z and of y
  int activation;
  bool vector;  // four columns can be loaded and stored at once
};

template <class T>
struct Product {
  Operand<T> a, b;
  long M, N, K;
  long second;  // with GEGLU: the line of b where the gates begin
  long part;    // K is split into parts of this length, below 2^31; the sums of part blockIdx.y go to their own y (M, N)
  Epilogue out;
};

// From the sums of a row i and the columns j..j + V - 1; with GEGLU also those of their gates.
template <int V>
__device__ __forceinline__ void finish(const Epilogue& e, long i, long j, const float* sums, const float* gates) {
  if (j >= e.columns) return;
  bool geglu = e.activation == GEGLU;
  int count = e.columns - j < V ? int(e.columns - j) : V;
  float s[V], g[V], added[V];
#pragma unroll
  for (int c = 0; c < V; c++) s[c] = sums[c], g[c] = gates[c];
  if (e.bias) {
    load_row(added, e.bias + j, e.vector, count);
#pragma unroll
    for (int c = 0; c < V; c++) s[c] += added[c];
    if (geglu) {
      load_row(added, e.bias + e.columns + j, e.vector, count);
#pragma unroll
      for (int c = 0; c < V; c++) g[c] += added[c];
    }
  }
  if (e.residual) {
    load_row(added, e.residual + i * e.N + j, e.vector, count);
#pragma unroll
    for (int c = 0; c < V; c++) s[c] += added[c];
  }
  if (e.z) {
    store_row(e.z + i * e.N + j, s, e.vector, count);
    if (geglu) store_row(e.z + i * e.N + e.columns + j, g, e.vector, count);
  }
  if (e.activation != NO_ACTIVATION) {
    Gate gate(e.activation);
#pragma unroll
    for (int c = 0; c < V; c++) {
      float x = geglu ? g[c] : s[c];
      s[c] *= geglu ? x * gate.phi(x) : gate.phi(x);
    }
  }
  store_row(e.y + i * e.columns + j, s, e.vector, count);
}

// The lines of a tile: two halves that need not follow each other.
struct Lines {
  long first, second, first_end, second_end;
  template <int EXTENT>
  __device__ __forceinline__ long number(int line) const {
    return line < EXTENT / 2 ? first + line : second + line - EXTENT / 2;
  }
  template <int EXTENT>
  __device__ __forceinline__ long end(int line) const {
    return line < EXTENT / 2 ? first_end : second_end;
  }
};

// Which tile this block computes. Eight tiles of rows make a band, and blocks that run at the same time go down a band's
// columns of tiles one after the other: their operands are then still in the second-level cache.
template <class T>
struct Place {
  unsigned down, across;  // which tile of y it is
  Lines rows, columns;    // columns: of B as stored
  long k;                 // the part's first,
  int ks;                 // and how many

  template <class P>
  __device__ explicit Place(const Product<P>& p) {
    constexpr int BAND = 8;
    bool geglu = p.out.activation == GEGLU;
    unsigned wide = unsigned(geglu ? tiles_of(p.out.columns, T::columns / 2) : tiles_of(p.out.columns, T::columns));
    unsigned high = unsigned(tiles_of(p.M, T::rows));
    unsigned band = blockIdx.x / (BAND * wide), within = blockIdx.x % (BAND * wide);
    if (high > band * BAND + BAND) high = band * BAND + BAND;
    high -= band * BAND;
    down = band * BAND + within % high;
    across = within / high;
    rows = {row(), row() + T::rows / 2, p.M, p.M};
    columns = geglu ? Lines{column(p), p.second + column(p), p.out.columns, p.second + p.out.columns}
                    : Lines{column(p), column(p) + T::columns / 2, p.N, p.N};
    k = long(blockIdx.y) * p.part;
    ks = int(p.K - k < p.part ? p.K - k : p.part);
  }
  __device__ __forceinline__ long row() const { return long(down) * T::rows; }
  template <class P>
  __device__ __forceinline__ long column(const Product<P>& p) const {  // of y; of the tile's lower half
    return long(across) * (p.out.activation == GEGLU ? T::columns / 2 : T::columns);
  }
  // Of `left` ks those in the next tile.
  static __device__ __forceinline__ int of_step(int left) { return left < T::depth ? left : T::depth; }
};

template <class T, class P>
dim3 grid_of(const Product<P>& p, int parts) {
  int width = p.out.activation == GEGLU ? T::columns / 2 : T::columns;
  return dim3(unsigned(tiles_of(p.out.columns, width) * tiles_of(p.M, T::rows)), parts);
}

// A thread's share of a tile: COUNT groups of V floats that are neighbours in memory, and the place of the first. Along k
// the threads take 8 ks, a sector of 32 bytes, of as many lines as they can; across k V lines each, and then the next ks.
// Only across k may the halves of a tile lie apart: the w of GEGLU is stored (K, N).
template <int EXTENT, int DEPTH, int THREADS, bool ALONG_K, int V>
struct Share {
  static constexpr int COUNT = EXTENT * DEPTH / V / THREADS, LANES = ALONG_K ? 8 / V : EXTENT / V, STEP = THREADS / LANES;
  static constexpr int STEPS = ALONG_K ? EXTENT / STEP : 1;  // of lines, for each k
  static_assert(COUNT * THREADS * V == EXTENT * DEPTH && STEPS > 0, "all threads load alike");
  const float* from;
  int lines;  // from there to the end

  __device__ __forceinline__ Share(const Operand<float>& o, const Lines& all, long k0) {
    long number = all.number<EXTENT>(line(0)), left = (ALONG_K ? all.second_end : all.end<EXTENT>(line(0))) - number;
    from = o.at(number, k0 + k(0));
    lines = left < 0 ? 0 : left < EXTENT ? int(left) : EXTENT;
  }
  static __device__ __forceinline__ int line(int i) {
    return ALONG_K ? int(threadIdx.x) / LANES + i % STEPS * STEP : int(threadIdx.x) % LANES * V;
  }
  static __device__ __forceinline__ int k(int i) {
    return ALONG_K ? int(threadIdx.x) % LANES * V + i / STEPS * 8 : int(threadIdx.x) / LANES + i * STEP;
  }
  __device__ __forceinline__ const float* at(int i, const Operand<float>& o) const {
    return ALONG_K ? from + i % STEPS * STEP * o.stride + i / STEPS * 8 : from + i * STEP * o.stride;
  }
  // How many of the group's V floats are inside, if the tile has `ks` ks.
  __device__ __forceinline__ int inside(int i, int ks) const {
    int lines_left = ALONG_K ? lines - i % STEPS * STEP : lines, ks_left = ks - k(i);
    return lines_left <= 0 || ks_left <= 0 ? 0 : ALONG_K ? ks_left : lines_left;
  }
  __device__ __forceinline__ void next(const Operand<float>& o) { from += ALONG_K ? DEPTH : DEPTH * o.stride; }
};

// Through registers, four floats at a time.
template <int EXTENT, int DEPTH, int THREADS, bool ALONG_K>
struct Fetched {
  Share<EXTENT, DEPTH, THREADS, ALONG_K, 4> share;
  float v[EXTENT * DEPTH / 4 / THREADS][4];

  __device__ Fetched(const Operand<float>& o, const Lines& lines, long k) : share(o, lines, k) {}
  __device__ __forceinline__ void fetch(const Operand<float>& o, int ks) {
#pragma unroll
    for (int i = 0; i < share.COUNT; i++) {
      int inside = share.inside(i, ks);
      load_row(v[i], share.at(i, o), inside > 0 && o.vector, inside);
    }
    share.next(o);
  }
  __device__ __forceinline__ void store(SharedTile<EXTENT, DEPTH>& to) const {
#pragma unroll
    for (int i = 0; i < share.COUNT; i++) {
      int line = share.line(i), k = share.k(i);
      if (ALONG_K) {
#pragma unroll
        for (int c = 0; c < 4; c++) to[k + c][line] = v[i][c];
      } else {
        *reinterpret_cast<float4*>(&to[k][line]) = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
      }
    }
  }
};

// By cp.async. It cannot turn a group of 4 round, so along k every float is copied on its own.
template <int EXTENT, int DEPTH, int THREADS, bool ALONG_K>
struct Copied {
  static constexpr int V = ALONG_K ? 1 : 4;
  Share<EXTENT, DEPTH, THREADS, ALONG_K, V> share;

  __device__ Copied(const Operand<float>& o, const Lines& lines, long k) : share(o, lines, k) {}
  __device__ __forceinline__ void copy(SharedTile<EXTENT, DEPTH>& to, const Operand<float>& o, int ks) {
#pragma unroll
    for (int i = 0; i < share.COUNT; i++) {
      int inside = share.inside(i, ks);
      float* there = &to[share.k(i)][share.line(i)];
      if (V == 1 || o.vector) {
        cp_async<4 * V>(there, share.at(i, o), inside > 0 ? 4 * V : 0);
      } else {
#pragma unroll
        for (int c = 0; c < V; c++) cp_async<4>(there + c, share.at(i, o) + c, c < inside ? 4 : 0);
      }
    }
    share.next(o);
  }
};

// Shared memory of a block that walks along K with BUFFERS tiles; at the end slabs of the sums take their place.
template <class T, int BUFFERS>
union Shared {
  struct {
    SharedTile<T::rows, T::depth> a[BUFFERS];
    SharedTile<T::columns, T::depth> b[BUFFERS];
  } tiles;
  float staged[T::rows / 4][T::columns + STAGE_PAD];
};

// What finish_rows wants of a product.
template <class T, class P>
struct Finish {
  const Product<P>& p;
  const Place<T>& place;
  Epilogue out;
  const float* residual;

  __device__ Finish(const Product<P>& p, const Place<T>& place) : p(p), place(place), out(p.out), residual(out.residual) {
    out.y += blockIdx.y * p.M * p.N;
    if (adds()) out.residual = nullptr;
  }
  // The 128 registers of a thread among 512 on a multiprocessor have no room for what would be asked for.
  __device__ __forceinline__ bool adds() const { return T::threads < 256 && residual; }
  __device__ __forceinline__ void load(float (&to)[4], int row, int column) const {
    long i = place.row() + row, j = place.column(p) + column, left = i < p.M ? out.columns - j : 0;
    load_row(to, residual + i * out.N + j, out.vector && left > 0, left < 4 ? int(left) : 4);
  }
  __device__ __forceinline__ void operator()(int row, int column, const float* sums) const {
    bool geglu = out.activation == GEGLU;
    if (place.row() + row >= p.M || (geglu && column >= T::columns / 2)) return;
    float s[4], gates[4];
    load_row(s, sums + column, true, 4);
    load_row(gates, sums + (geglu ? T::columns / 2 + column : column), true, 4);
    finish<4>(out, place.row() + row, place.column(p) + column, s, gates);
  }
};

// All sums of a tile. Sums: Outputs or Fragments.
template <class T, class Sums, class P>
__device__ __forceinline__ void finish_tile(const Sums& sums, float (*staged)[T::columns + STAGE_PAD], const Product<P>& p,
                                            const Place<T>& place) {
  finish_rows<T>(sums, staged, Finish<T, P>(p, place));
}

// A thread's 8 x 8 outputs: 4 rows in each half of the tile, times 4 columns in each half.
//
//   a warp   8 lanes   ┌────┬────┬ ─ ┬────┐  next to each other: 128 bytes of a row of C, 8 float4s of b without a
//   4 lanes  below     │4x4 │    │   │    │  conflict; the 4 float4s of a go to 8 lanes each by broadcast
//   each other         └────┴────┴ ─ ┴────┘
template <class T>
struct Outputs {
  static_assert(T::rows * T::columns == 64 * T::threads && T::columns % 64 == 0 && T::rows % 64 == 0, "8 x 8 a thread");
  float sums[8][8] = {};

  static __device__ __forceinline__ int row() {
    return (int(threadIdx.x) / 32 / (T::columns / 64) * 4 + int(threadIdx.x) % 32 / 8) * 4;
  }
  static __device__ __forceinline__ int column() {
    return (int(threadIdx.x) / 32 % (T::columns / 64) * 8 + int(threadIdx.x) % 8) * 4;
  }
  __device__ __forceinline__ void add(const SharedTile<T::rows, T::depth>& a, const SharedTile<T::columns, T::depth>& b) {
    int r = row(), c = column();
#pragma unroll
    for (int k = 0; k < T::depth; k++) {
      float4 a0 = *reinterpret_cast<const float4*>(&a[k][r]), a1 = *reinterpret_cast<const float4*>(&a[k][r + T::rows / 2]);
      float4 b0 = *reinterpret_cast<const float4*>(&b[k][c]);
      float4 b1 = *reinterpret_cast<const float4*>(&b[k][c + T::columns / 2]);
      float as[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
      float bs[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j] += as[i] * bs[j];
    }
  }

  static constexpr int SLABS = 4, SLAB_ROWS = T::rows / SLABS;
  static __device__ __forceinline__ int row_of(int slab, int r) {
    return r / 2 * 4 + slab % 2 * 2 + r % 2 + slab / 2 * (T::rows / 2);
  }
  __device__ __forceinline__ void stage(int slab, float (*to)[T::columns + STAGE_PAD]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i / 2 != slab) continue;
#pragma unroll
      for (int j = 0; j < 8; j += 4)
        *reinterpret_cast<float4*>(&to[row() / 2 + i % 2][column() + j / 4 * (T::columns / 2)]) =
            make_float4(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]);
    }
  }
};

// Tiles of bf16, copied from an operand.
template <int EXTENT, int DEPTH, bool ALONG_K>
struct Swizzled : SwizzledTile<EXTENT, DEPTH, ALONG_K> {
  using SwizzledTile<EXTENT, DEPTH, ALONG_K>::ROWS, SwizzledTile<EXTENT, DEPTH, ALONG_K>::CHUNKS;
  using SwizzledTile<EXTENT, DEPTH, ALONG_K>::place;

  template <int THREADS>
  static __device__ __forceinline__ void copy(__nv_bfloat16* to, const Operand<__nv_bfloat16>& o, const Lines& lines,
                                              long k0, int ks) {
    static_assert(ROWS * CHUNKS % THREADS == 0, "all threads copy alike");
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
      int row = (int(threadIdx.x) + i * THREADS) / CHUNKS, chunk = (int(threadIdx.x) + i * THREADS) % CHUNKS;
      int line = ALONG_K ? row : chunk * 8, k = ALONG_K ? chunk * 8 : row;
      long number = lines.number<EXTENT>(line), lines_left = lines.end<EXTENT>(line) - number;
      long left = ALONG_K ? ks - k : lines_left;
      bool inside = lines_left > 0 && k < ks;
      const __nv_bfloat16* from = o.data + (ALONG_K ? number * o.stride + k0 + k : (k0 + k) * o.stride + number);
      cp_async<16>(to + place(row, chunk), inside ? from : o.data, inside ? left < 8 ? int(left) * 2 : 16 : 0);
    }
  }
};

}  // namespace minidiff::cuda
