// What the products of linear.cu and conv2d.cu have in common, however their factors come into shared memory: how tiles lie
// there, how the tensor cores multiply them, and how the sums leave.
//
//            COLUMNS                A block of threads owns a tile of the product and walks along K in steps of DEPTH, for
//         ┌───────────┐             each of which it has ROWS x DEPTH numbers of the left factor in shared memory and
//   ROWS  │░░░░░│     │             DEPTH x COLUMNS of the right one. A warp owns a part of the tile, in fragments of 16 x 8
//         │─────┼─────│             (ptx.h). At the end the sums go out by way of shared memory, a slab of rows at a time.
//         └───────────┘
#pragma once

#include "ptx.h"

namespace minidiff::cuda {

inline __host__ __device__ long tiles_of(long n, long tile) { return (n + tile - 1) / tile; }

// V floats beside each other, the first `count` of which are there; all at once if `vector` says that this can be done.
template <int V>
__device__ __forceinline__ void load_row(float (&to)[V], const float* from, bool vector, int count) {
  if (V == 4 && vector) {
    float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1 % V] = v.y, to[2 % V] = v.z, to[3 % V] = v.w;
  } else {
#pragma unroll
    for (int c = 0; c < V; c++) to[c] = c < count ? from[c] : 0;
  }
}
template <int V>
__device__ __forceinline__ void store_row(float* to, const float (&from)[V], bool vector, int count) {
  if (V == 4 && vector) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1 % V], from[2 % V], from[3 % V]);
  } else {
#pragma unroll
    for (int c = 0; c < V; c++)
      if (c < count) to[c] = from[c];
  }
}

// resident: blocks that a multiprocessor shall hold at once, which bounds a thread's registers.
template <int ROWS, int COLUMNS, int DEPTH, int THREADS, int RESIDENT>
struct Tile {
  static constexpr int rows = ROWS, columns = COLUMNS, depth = DEPTH, threads = THREADS, resident = RESIDENT;
};

constexpr int PAD = 4;  // floats behind each k of a tile: 8 ks by 4 lines, and 8 float4s of a k, are then in different banks

template <int EXTENT, int DEPTH>
using SharedTile = float[DEPTH][EXTENT + PAD];

// Tiles of bf16 for the tensor cores, as they are stored: a row is a line's ks, or across k a k's lines. (A line is a row of
// the left factor, or a column of the right one.) Rows are in chunks of 16 bytes, which change places from row to row, so
// that the 8 rows of a matrix that ldmatrix reads are in different banks, and the padding costs nothing:
//
//   rows of 4 chunks   0 1 2 3 | 0 1 2 3       rows of 8 and more   0 1 2 3 4 5 6 7
//                      1 0 3 2 | 1 0 3 2                            1 0 3 2 5 4 7 6
//                      2 3 0 1 | 2 3 0 1                            2 3 0 1 6 7 4 5   ...
template <int CHUNKS>
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned chunk) {  // in chunks
  static_assert(CHUNKS == 2 || CHUNKS == 4 || CHUNKS % 8 == 0, "the swizzle is made for these");
  return row * CHUNKS + (chunk ^ (CHUNKS < 8 ? row / (8 / CHUNKS) % CHUNKS : row % 8));
}

template <int EXTENT, int DEPTH, bool ALONG_K>
struct SwizzledTile {
  static constexpr int ROWS = ALONG_K ? EXTENT : DEPTH, CHUNKS = (ALONG_K ? DEPTH : EXTENT) / 8, SIZE = EXTENT * DEPTH;

  static __device__ __forceinline__ int place(int row, int chunk) { return swizzled<CHUNKS>(row, chunk) * 8; }
  // Four 8 x 8 matrices from 16 lines and 16 ks, as the halves of mma's a: lines 0-7 and 8-15 of ks 0-7, then of 8-15.
  static __device__ __forceinline__ void lines_first(unsigned (&r)[4], const __nv_bfloat16* tile, int line, int k) {
    int lane = int(threadIdx.x) % 32;
    if (ALONG_K)
      ldmatrix(r, tile + place(line + lane % 16, k / 8 + lane / 16));
    else
      ldmatrix_trans(r, tile + place(k + lane / 16 * 8 + lane % 8, line / 8 + lane / 8 % 2));
  }
  // And as two of mma's b: ks 0-7 and 8-15 of lines 0-7, then of 8-15.
  static __device__ __forceinline__ void ks_first(unsigned (&r)[4], const __nv_bfloat16* tile, int line, int k) {
    int lane = int(threadIdx.x) % 32;
    if (ALONG_K)
      ldmatrix(r, tile + place(line + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
    else
      ldmatrix_trans(r, tile + place(k + lane % 16, line / 8 + lane / 16));
  }
};

constexpr int STAGE_PAD = 8;  // floats behind each row of sums: 4 rows by 4 float2s, and 8 float4s of a row, are in different banks

// The outputs of a warp of tensor cores: ROWS rows, and COLUMNS / 2 columns in each half of the tile, in mma's fragments of
// 16 x 8. The first half of a row of fragments is in the tile's lower half.
template <class T, int ROWS, int COLUMNS>
struct Fragments {
  static constexpr int DOWN = ROWS / 16, ACROSS = COLUMNS / 8;
  static_assert(T::rows * T::columns == ROWS * COLUMNS * (T::threads / 32), "the warps cover the tile");
  float sums[DOWN][ACROSS][4] = {};

  static __device__ __forceinline__ int row(int i) {
    return int(threadIdx.x) / 32 / (T::columns / COLUMNS) * ROWS + 16 * i;
  }
  static __device__ __forceinline__ int column(int j) {
    int warp = int(threadIdx.x) / 32 % (T::columns / COLUMNS);
    return j / (ACROSS / 2) * (T::columns / 2) + warp * (COLUMNS / 2) + j % (ACROSS / 2) * 8;
  }
  template <class A, class B>
  __device__ __forceinline__ void add(const __nv_bfloat16* a, const __nv_bfloat16* b) {
    add<B>([&](unsigned(&to)[4], int i, int k) { A::lines_first(to, a, row(i), k); }, b);
  }
  // load(to, i, k): the left factor's 16 lines of fragments i, 16 ks from k on, as by lines_first.
  template <class B, class Load>
  __device__ __forceinline__ void add(const Load& load, const __nv_bfloat16* b) {
#pragma unroll
    for (int k = 0; k < T::depth; k += 16) {
      unsigned as[DOWN][4], bs[ACROSS / 2][4];
#pragma unroll
      for (int i = 0; i < DOWN; i++) load(as[i], i, k);
#pragma unroll
      for (int j = 0; j < ACROSS / 2; j++) B::ks_first(bs[j], b, column(2 * j), k);
#pragma unroll
      for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++) {
          unsigned one[2] = {bs[j / 2][j % 2 * 2], bs[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16_bf16(sums[i][j], as[i], one, sums[i][j]);
        }
    }
  }
  // The same from tiles of float32, rounded to tf32. Fragment columns t and t + 4 are ks 2t and 2t + 1, for a and b alike:
  // the sum does not mind, and the 8 lines by 4 ks that a warp loads at once are in different banks.
  __device__ __forceinline__ void add(const SharedTile<T::rows, T::depth>& a, const SharedTile<T::columns, T::depth>& b) {
    int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
#pragma unroll
    for (int k = 0; k < T::depth; k += 8) {
      unsigned as[DOWN][4];
#pragma unroll
      for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) as[i][e] = round_to_tf32(a[k + 2 * t + e / 2][row(i) + g + e % 2 * 8]);
#pragma unroll
      for (int j = 0; j < ACROSS; j++) {
        int line = column(j) + g;
        unsigned bs[2] = {round_to_tf32(b[k + 2 * t][line]), round_to_tf32(b[k + 2 * t + 1][line])};
#pragma unroll
        for (int i = 0; i < DOWN; i++) mma_m16n8k8_tf32(sums[i][j], as[i], bs, sums[i][j]);
      }
    }
  }

  static constexpr int SLABS = DOWN, SLAB_ROWS = T::rows / SLABS;
  static __device__ __forceinline__ int row_of(int slab, int r) { return r / 16 * ROWS + slab * 16 + r % 16; }
  __device__ __forceinline__ void stage(int slab, float (*to)[T::columns + STAGE_PAD]) const {
    int lane = int(threadIdx.x) % 32, r = row(0) / ROWS * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < DOWN; i++) {
      if (i != slab) continue;
#pragma unroll
      for (int j = 0; j < ACROSS; j++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          *reinterpret_cast<float2*>(&to[r + 8 * half][column(j) + lane % 4 * 2]) =
              make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
    }
  }
};

// All sums of a tile, through shared memory, a slab of rows at a time: a thread's sums are scattered over the tile, but
// whoever finishes them wants 4 beside each other, and their neighbours in the next lanes. `finish` is told the row, the
// column and where the row's sums are; what is to be added to them from memory it is asked for before the barrier, so that
// these loads are all under way while the sums are staged. The loops over rows are not unrolled: a tile's thousands of
// numbers leave by the same few instructions.
//
// Sums: SLABS slabs of SLAB_ROWS rows, the tile's row_of(slab, r), which stage(slab, staged) writes.
// Finish: bool adds() const; void load(float (&added)[4], row, column) const; void operator()(row, column, sums) const.
template <class T, class Sums, class Finish>
__device__ __forceinline__ void finish_rows(const Sums& sums, float (*staged)[T::columns + STAGE_PAD], const Finish& finish) {
  constexpr int LANES = T::columns / 4, STEP = T::threads / LANES, COUNT = Sums::SLAB_ROWS / STEP;
  static_assert(COUNT * STEP == Sums::SLAB_ROWS, "all threads finish as many rows");
  int first = int(threadIdx.x) / LANES, column = int(threadIdx.x) % LANES * 4;
#pragma unroll 1
  for (int slab = 0; slab < Sums::SLABS; slab++) {
    float added[COUNT][4];
    if (finish.adds())
#pragma unroll
      for (int i = 0; i < COUNT; i++) finish.load(added[i], Sums::row_of(slab, first + i * STEP), column);
    __syncthreads();
    sums.stage(slab, staged);
    __syncthreads();
    if (finish.adds())
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        float4& sum = *reinterpret_cast<float4*>(&staged[first + i * STEP][column]);
        sum = make_float4(sum.x + added[i][0], sum.y + added[i][1], sum.z + added[i][2], sum.w + added[i][3]);
      }
#pragma unroll 1
    for (int r = first; r < Sums::SLAB_ROWS; r += STEP) finish(Sums::row_of(slab, r), column, staged[r]);
  }
}

}  // namespace minidiff::cuda
