// One small kernel for each instruction the emulator knows; test_emulator.py compares them with NumPy.
#include "export.h"

using namespace minidiff::cuda;

__global__ void indices(int* out) {  // (blocks, threads, 6)
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* o = out + 6 * (block * int(blockDim.x * blockDim.y * blockDim.z) + thread);
  o[0] = blockIdx.x, o[1] = blockIdx.y, o[2] = blockIdx.z;
  o[3] = threadIdx.x, o[4] = threadIdx.y, o[5] = threadIdx.z;
}
FUNCTION(run_indices, (int* out), LAUNCH(indices, dim3(3, 2, 2), dim3(5, 3, 2), 0, 0, out))

template <class T>
__global__ void shuffles(T* out, const T* in, int kind, int argument, int width) {
  T v = in[threadIdx.x];
  if (kind == 0) v = __shfl_sync(~0u, v, argument, width);
  if (kind == 1) v = __shfl_xor_sync(~0u, v, argument, width);
  if (kind == 2) v = __shfl_down_sync(~0u, v, argument, width);
  if (kind == 3) v = __shfl_up_sync(~0u, v, argument, width);
  out[threadIdx.x] = v;
}
FUNCTION(run_shuffles_int, (int* out, const int* in, int kind, int argument, int width),
         LAUNCH((shuffles<int>), 1, 64, 0, 0, out, in, kind, argument, width))
FUNCTION(run_shuffles_double, (double* out, const double* in, int kind, int argument, int width),
         LAUNCH((shuffles<double>), 1, 64, 0, 0, out, in, kind, argument, width))

__global__ void votes(unsigned* out, const int* in, unsigned mask) {  // (14, threads)
  int i = threadIdx.x, n = blockDim.x, v = in[i];
  unsigned u = unsigned(v);
  int all_same;
  if (mask >> (i % 32) & 1) {
    out[0 * n + i] = __ballot_sync(mask, v > 0);
    out[1 * n + i] = unsigned(__any_sync(mask, v > 3));
    out[2 * n + i] = unsigned(__all_sync(mask, v > -4));
    out[3 * n + i] = __match_any_sync(mask, v);
    out[4 * n + i] = __match_all_sync(mask, v / 100, &all_same);
    out[5 * n + i] = unsigned(__reduce_add_sync(mask, v));
    out[6 * n + i] = unsigned(__reduce_min_sync(mask, v));
    out[7 * n + i] = unsigned(__reduce_max_sync(mask, v));
    out[8 * n + i] = __reduce_and_sync(mask, u);
    out[9 * n + i] = __reduce_or_sync(mask, u);
    out[10 * n + i] = __reduce_xor_sync(mask, u);
    __syncwarp(mask);
  }
  out[11 * n + i] = unsigned(__syncthreads_count(v > 0));
  out[12 * n + i] = unsigned(__syncthreads_or(v > 3) != 0);
  out[13 * n + i] = unsigned(__syncthreads_and(v > -4) != 0);
}
FUNCTION(run_votes, (unsigned* out, const int* in, int threads, unsigned mask),
         LAUNCH(votes, 1, threads, 0, 0, out, in, mask))

// d (16, 8) = a (16, K) b (K, 8) + c; K is 16 for kinds 0 (bf16) and 1 (f16), 8 for tf32
__global__ void products(float* d, const void* a, const void* b, const float* c, int kind) {
  int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned ra[4], rb[2];
  float rc[4];
  auto pair = [](const void* p, int low, int high) {
    auto h = static_cast<const unsigned short*>(p);
    return unsigned(h[high]) << 16 | h[low];
  };
  for (int i = 0; i < 4; i++) {
    int row = g + (i & 1) * 8, column = 2 * t + (i >> 1) * 8;
    if (kind < 2) ra[i] = pair(a, 16 * row + column, 16 * row + column + 1);
    else ra[i] = static_cast<const unsigned*>(a)[8 * row + t + (i >> 1) * 4];
    rc[i] = c[8 * (g + (i >> 1) * 8) + 2 * t + (i & 1)];
  }
  for (int i = 0; i < 2; i++) {
    int row = 2 * t + i * 8;
    if (kind < 2) rb[i] = pair(b, 8 * row + g, 8 * (row + 1) + g);
    else rb[i] = static_cast<const unsigned*>(b)[8 * (t + i * 4) + g];
  }
  if (kind == 0) mma_m16n8k16_bf16(rc, ra, rb, rc);
  if (kind == 1) mma_m16n8k16_f16(rc, ra, rb, rc);
  if (kind == 2) mma_m16n8k8_tf32(rc, ra, rb, rc);
  for (int i = 0; i < 4; i++) d[8 * (g + (i >> 1) * 8) + 2 * t + (i & 1)] = rc[i];
}
FUNCTION(run_products, (float* d, const void* a, const void* b, const float* c, int kind),
         LAUNCH(products, 1, 32, 0, 0, d, a, b, c, kind))

template <int COUNT>
__global__ void matrices(unsigned* out, const unsigned short* in, bool transposed) {  // out (32, COUNT), in (COUNT, 8, 8)
  constexpr int STRIDE = 24;  // rows of 8 numbers, 48 bytes apart
  __shared__ __align__(16) unsigned short s[COUNT * 8 * STRIDE];
  for (int i = threadIdx.x; i < COUNT * 64; i += 32) s[i / 8 * STRIDE + i % 8] = in[i];
  __syncwarp();
  unsigned r[COUNT];
  const void* row = int(threadIdx.x) < 8 * COUNT ? s + threadIdx.x * STRIDE : nullptr;
  if (transposed) ldmatrix_trans(r, row);
  else ldmatrix(r, row);
  for (int i = 0; i < COUNT; i++) out[threadIdx.x * COUNT + i] = r[i];
}
FUNCTION(run_matrices, (unsigned* out, const unsigned short* in, int count, int transposed),
         if (count == 1) LAUNCH((matrices<1>), 1, 32, 0, 0, out, in, transposed);
         if (count == 2) LAUNCH((matrices<2>), 1, 32, 0, 0, out, in, transposed);
         if (count == 4) LAUNCH((matrices<4>), 1, 32, 0, 0, out, in, transposed))

// Each of 64 threads copies BYTES bytes, of which `given` come from the source.
template <int BYTES>
__global__ void copies(char* out, const char* in, int given) {
  SHARED_DYNAMIC(char, s);
  cp_async<BYTES>(s + threadIdx.x * BYTES, in + threadIdx.x * BYTES, given);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  int other = blockDim.x - 1 - threadIdx.x;
  for (int i = 0; i < BYTES; i++) out[other * BYTES + i] = s[other * BYTES + i];
}
FUNCTION(run_copies, (char* out, const char* in, int bytes, int given),
         if (bytes == 4) LAUNCH((copies<4>), 1, 64, 256, 0, out, in, given);
         if (bytes == 8) LAUNCH((copies<8>), 1, 64, 512, 0, out, in, given);
         if (bytes == 16) LAUNCH((copies<16>), 1, 64, 1024, 0, out, in, given))

// What a thread sees of three groups of copies, after a wait that leaves `left` of them under way. Fast build only.
__global__ void landings(float* out, const float* in, int left) {
  __shared__ float s[4];
  for (int i = 0; i < 3; i++) {
    cp_async<4>(s + i, in + i);
    cp_async_commit();
  }
  cp_async<4>(s + 3, in + 3);  // in no group yet
  if (left == 0) cp_async_wait<0>();
  if (left == 1) cp_async_wait<1>();
  if (left == 2) cp_async_wait<2>();
  if (left < 0) cp_async_wait_all();
  for (int i = 0; i < 4; i++) out[i] = s[i];
  cp_async_wait_all();
}
FUNCTION(run_landings, (float* out, const float* in, int left), LAUNCH(landings, 1, 1, 0, 0, out, in, left))

struct Totals {
  float f;
  int i, least, most, bits, inc, dec, swapped, exchanged;
  unsigned u;
  double d;
  __half2 h;
  __nv_bfloat162 b;
};
__global__ void atomics(Totals* t) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&t->f, 0.5f);
  add_to(&t->f, 0.25f);
  atomicAdd(&t->d, 0.5);
  atomicAdd(&t->i, i);
  atomicSub(&t->u, 1u);
  atomicMin(&t->least, -i);
  atomicMax(&t->most, i);
  atomicOr(&t->bits, 1 << (i % 8));
  atomicInc(reinterpret_cast<unsigned*>(&t->inc), 9u);
  atomicDec(reinterpret_cast<unsigned*>(&t->dec), 9u);
  atomicExch(&t->exchanged, 7);
  atomicAdd(&t->h, __floats2half2_rn(1, 2));
  atomicAdd(&t->b, __floats2bfloat162_rn(1, 2));
  int seen = atomicCAS(&t->swapped, 0, 0), old;
  do old = atomicCAS(&t->swapped, seen, seen + 2);
  while (old != seen && (seen = old, true));
}
FUNCTION(run_atomics, (void* t), LAUNCH(atomics, 3, 40, 0, 0, static_cast<Totals*>(t)))

__constant__ float table[4];
__global__ void small(float* out, const float* x, const float* y, int n) {  // (12, n)
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float a = __ldg(x + i), b = __ldg(y + i);
    __half ha = __float2half(a), hb = __float2half(b);
    __nv_bfloat16 ba = __float2bfloat16(a), bb = __float2bfloat16(b);
    __half2 h2 = __hfma2(__halves2half2(ha, hb), __float2half2_rn(2), __floats2half2_rn(1, -1));
    __nv_bfloat162 b2 = __hmul2(__halves2bfloat162(ba, bb), __float2bfloat162_rn(3));
    float rows[] = {float(ha), float(ba), float(ha + hb), float(ba * bb), __low2float(h2), __high2float(h2),
                    __low2float(b2), float(__hmax(ba, bb)), fast_exp2(a), __uint_as_float(round_to_tf32(a)),
                    __uint_as_float(pack_bf16(a, b)), __uint_as_float(pack_f16(a, b))};
    for (int r = 0; r < 12; r++) __stcs(out + r * n + i, rows[r]);
  }
}
FUNCTION(run_small, (float* out, const float* x, const float* y, int n), LAUNCH(small, 1, 64, 0, 0, out, x, y, n))

__global__ void constants(float* out) { out[threadIdx.x] = table[3 - threadIdx.x]; }
FUNCTION(run_constants, (float* out, const float* values), cudaMemcpyToSymbol(table, values, sizeof table);
         LAUNCH(constants, 1, 4, 0, 0, out))

__global__ void integers(unsigned* out, const unsigned* x, const unsigned* y, int n) {  // (8, n)
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    unsigned a = x[i], b = y[i];
    unsigned rows[] = {__umulhi(a, b),        __brev(a),  unsigned(__popc(a)), unsigned(__clz(int(a))),
                       unsigned(__ffs(int(a))), __byte_perm(a, b, 0x6240), __funnelshift_l(a, b, b), max(a, b)};
    for (int r = 0; r < 8; r++) out[r * n + i] = rows[r];
  }
}
FUNCTION(run_integers, (unsigned* out, const unsigned* x, const unsigned* y, int n),
         LAUNCH(integers, 1, 64, 0, 0, out, x, y, n))

__global__ void vectors(float4* out, const float4* in) { store_once(out + threadIdx.x, load_once(in + threadIdx.x)); }
FUNCTION(run_vectors, (float4* out, const float4* in), LAUNCH(vectors, 1, 8, 0, 0, out, in))

__global__ void speaks() {
  if (threadIdx.x == 3) printf("thread %d speaks\n", int(threadIdx.x));
}
FUNCTION(run_speaks, (), LAUNCH(speaks, 1, 4, 0, 0); fflush(stdout))

__global__ void order_of_threads(int* out, int* next) { out[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x; }
FUNCTION(run_order, (int* out, int* next), LAUNCH(order_of_threads, 3, 64, 0, 0, out, next))

template <int N>
__global__ void templated(float* out, const float* in) {  // shared memory in a template, and in a function called twice
  __shared__ float s[N];
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[N - 1 - threadIdx.x];
}
FUNCTION(run_templated, (float* out, const float* in), LAUNCH((templated<64>), 1, 64, 0, 0, out, in);
         LAUNCH((templated<32>), 1, 32, 0, 0, out + 64, in))
