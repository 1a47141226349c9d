// One mistake a kernel. The line that must be named ends in "// here", the line that it conflicts with in "// there".
#include "export.h"

using namespace minidiff::cuda;

__global__ void divergent_barrier(float* p) {
  if (threadIdx.x < 64) {
    p[threadIdx.x] = 1;
    __syncthreads();  // there
  } else {
    __syncthreads();  // here
  }
}
FUNCTION(run_divergent_barrier, (float* p), LAUNCH(divergent_barrier, 1, 128, 0, 0, p))

__global__ void early_return(float* p) {
  if (threadIdx.x >= 100) return;
  p[threadIdx.x] = 0;
  __syncthreads();  // here
}
FUNCTION(run_early_return, (float* p), LAUNCH(early_return, 1, 128, 0, 0, p))

__global__ void shuffle_in_branch(float* p) {
  float v = threadIdx.x;
  if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(~0u, v, 1);  // here
  else __syncthreads();                                       // there
  p[threadIdx.x] = v;
}
FUNCTION(run_shuffle_in_branch, (float* p), LAUNCH(shuffle_in_branch, 1, 64, 0, 0, p))

__global__ void shuffle_outside_mask(float* p) {
  if (threadIdx.x < 16) p[threadIdx.x] = __shfl_sync(0xffffu, float(threadIdx.x), 20);  // here
}
FUNCTION(run_shuffle_outside_mask, (float* p), LAUNCH(shuffle_outside_mask, 1, 32, 0, 0, p))

__global__ void not_in_mask(float* p) {
  __syncwarp(0xffffu);  // here
  p[threadIdx.x] = 0;
}
FUNCTION(run_not_in_mask, (float* p), LAUNCH(not_in_mask, 1, 32, 0, 0, p))

__global__ void returned_lanes(float* p) {
  if (threadIdx.x > 20) return;
  p[threadIdx.x] = __shfl_down_sync(~0u, 1.f, 1);  // here
}
FUNCTION(run_returned_lanes, (float* p), LAUNCH(returned_lanes, 1, 32, 0, 0, p))

__global__ void read_too_early(float* p) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;               // there
  if (threadIdx.x == 0) __nanosleep(1);
  p[threadIdx.x] = s[(threadIdx.x + 37) % 64];  // here
}
FUNCTION(run_read_too_early, (float* p), LAUNCH(read_too_early, 1, 64, 0, 0, p))

__global__ void written_too_early(float* p) {
  __shared__ float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  p[threadIdx.x] = s[(threadIdx.x + 37) % 64];  // there
  s[threadIdx.x] = 0;                           // here
}
FUNCTION(run_written_too_early, (float* p), LAUNCH(written_too_early, 1, 64, 0, 0, p))

__global__ void written_twice(float* p) {
  __shared__ float s[8];
  s[threadIdx.x / 2] = threadIdx.x;  // here there
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x / 2];
}
FUNCTION(run_written_twice, (float* p), LAUNCH(written_twice, 1, 16, 0, 0, p))

__global__ void race_in_warp(float* p) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;             // there
  float v = __shfl_sync(~0u, 1.f, 0);       // orders nothing
  p[threadIdx.x] = s[31 - threadIdx.x] + v;  // here
}
FUNCTION(run_race_in_warp, (float* p), LAUNCH(race_in_warp, 1, 32, 0, 0, p))

__global__ void half_synced(float* p) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;                            // there
  __syncwarp(threadIdx.x < 16 ? 0xffffu : 0xffff0000u);
  p[threadIdx.x] = s[31 - threadIdx.x];                    // here
}
FUNCTION(run_half_synced, (float* p), LAUNCH(half_synced, 1, 32, 0, 0, p))

__global__ void bytes_race(float* p) {
  __shared__ unsigned char s[64];
  s[threadIdx.x] = 1;  // there
  __syncwarp();
  p[threadIdx.x] = s[(threadIdx.x + 32) % 64];  // here
}
FUNCTION(run_bytes_race, (float* p), LAUNCH(bytes_race, 1, 64, 0, 0, p))

__global__ void unwritten_shared(float* p) {
  __shared__ float s[64];
  if (threadIdx.x < 63) s[threadIdx.x] = 1;
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];  // here
}
FUNCTION(run_unwritten_shared, (float* p), LAUNCH(unwritten_shared, 2, 64, 0, 0, p))

__global__ void left_by_last_block(float* p) {
  SHARED_DYNAMIC(float, s);
  if (blockIdx.x == 0) s[threadIdx.x] = 1;
  __syncthreads();
  p[threadIdx.x + 64 * blockIdx.x] = s[threadIdx.x];  // here
}
FUNCTION(run_left_by_last_block, (float* p), LAUNCH(left_by_last_block, 2, 64, 256, 0, p))

__global__ void past_dynamic(float* p, int n) {
  SHARED_DYNAMIC(float, s);
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = 1;  // here
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}
FUNCTION(run_past_dynamic, (float* p), LAUNCH(past_dynamic, 1, 32, 260, 0, p, 66))
FUNCTION(run_far_past_dynamic, (float* p), LAUNCH(past_dynamic, 1, 32, 256, 0, p, 128))

__global__ void past_static(float* p, int k) {
  __shared__ float s[32];
  s[threadIdx.x + k] = 1;  // here
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}
FUNCTION(run_past_static, (float* p), LAUNCH(past_static, 1, 32, 0, 0, p, 1))

__device__ void fill(float* s, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = 1;  // here
}
__global__ void past_pointer(float* p) {
  __shared__ float s[40];
  fill(s, 41);
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}
FUNCTION(run_past_pointer, (float* p), LAUNCH(past_pointer, 1, 32, 0, 0, p))

__global__ void past_local(float* p, int n) {
  float local[8];
  for (int i = 0; i < n; i++) local[i] = p[i];  // here
  p[threadIdx.x] = local[threadIdx.x % 8];
}
FUNCTION(run_past_local, (float* p), LAUNCH(past_local, 1, 32, 0, 0, p, 9))

__global__ void past_global(float* p) { p[blockIdx.x * blockDim.x + threadIdx.x] = 1; }  // here
FUNCTION(run_past_global, (float* p), LAUNCH(past_global, 2, 256, 0, 0, p))

__global__ void before_global(float* out, const float* p) { out[threadIdx.x] = p[int(threadIdx.x) - 1]; }  // here
FUNCTION(run_before_global, (float* p), LAUNCH(before_global, 1, 32, 0, 0, p + 32, p))

__global__ void null_pointer(float* p, const float* nothing) { p[threadIdx.x] = nothing[threadIdx.x]; }  // here
FUNCTION(run_null_pointer, (float* p), LAUNCH(null_pointer, 1, 32, 0, 0, p, nullptr))

__global__ void blocks_race(float* p) {
  if (threadIdx.x == 0) p[0] += blockIdx.x;  // here there
}
FUNCTION(run_blocks_race, (float* p), LAUNCH(blocks_race, 2, 32, 0, 0, p))

__global__ void threads_race(float* p) { p[0] += threadIdx.x; }  // here there
FUNCTION(run_threads_race, (float* p), LAUNCH(threads_race, 1, 64, 0, 0, p))

__global__ void mixed_with_atomics(float* p) {
  if (threadIdx.x == 0) p[0] = 1;  // there
  else atomicAdd(p, 1.f);          // here
}
FUNCTION(run_mixed_with_atomics, (float* p), LAUNCH(mixed_with_atomics, 1, 32, 0, 0, p))

__global__ void writes_input(const float* in) { const_cast<float*>(in)[threadIdx.x] = 1; }  // here
FUNCTION(run_writes_input, (const float* in), LAUNCH(writes_input, 1, 32, 0, 0, in))

__global__ void reads_output(float* out, float* p) { p[threadIdx.x] = out[threadIdx.x]; }  // here
FUNCTION(run_reads_output, (float* out, float* p), LAUNCH(reads_output, 1, 32, 0, 0, out, p))

__global__ void misaligned_vector(float* p) {
  float4 v = *reinterpret_cast<const float4*>(p + 4 * threadIdx.x + 1);  // here
  p[threadIdx.x + 128] = v.x + v.w;
}
FUNCTION(run_misaligned_vector, (float* p), LAUNCH(misaligned_vector, 1, 8, 0, 0, p))

__global__ void others_local(float* p) {
  __shared__ float* address;
  float mine[4] = {1, 2, 3, float(threadIdx.x)};
  if (threadIdx.x == 0) address = mine;
  __syncthreads();
  p[threadIdx.x] = address[threadIdx.x % 4];  // here
}
FUNCTION(run_others_local, (float* p), LAUNCH(others_local, 1, 32, 0, 0, p))

__global__ void copy_not_waited(float* p) {
  __shared__ float s[32];
  cp_async<4>(s + threadIdx.x, p + threadIdx.x);  // there
  cp_async_commit();
  p[32 + threadIdx.x] = s[threadIdx.x];  // here
  cp_async_wait<0>();
}
FUNCTION(run_copy_not_waited, (float* p), LAUNCH(copy_not_waited, 1, 32, 0, 0, p))

__global__ void copy_of_last_group(float* p) {
  __shared__ float s[64];
  for (int i = 0; i < 2; i++) {
    cp_async<4>(s + 32 * i + threadIdx.x, p + 32 * i + threadIdx.x);  // there
    cp_async_commit();
  }
  cp_async_wait<1>();
  float sum = s[threadIdx.x];
  sum += s[32 + threadIdx.x];  // here
  cp_async_wait<0>();
  p[64 + threadIdx.x] = sum;
}
FUNCTION(run_copy_of_last_group, (float* p), LAUNCH(copy_of_last_group, 1, 32, 0, 0, p))

__global__ void copy_not_committed(float* p) {
  __shared__ float s[32];
  cp_async<4>(s + threadIdx.x, p + threadIdx.x);  // there
  cp_async_wait<0>();
  p[32 + threadIdx.x] = s[threadIdx.x];  // here
  cp_async_wait_all();
}
FUNCTION(run_copy_not_committed, (float* p), LAUNCH(copy_not_committed, 1, 32, 0, 0, p))

__global__ void copy_without_barrier(float* p) {
  __shared__ float s[64];
  cp_async<4>(s + threadIdx.x, p + threadIdx.x);  // there
  cp_async_wait_all();
  if (threadIdx.x == 0) __nanosleep(1);
  p[64 + threadIdx.x] = s[63 - threadIdx.x];  // here
}
FUNCTION(run_copy_without_barrier, (float* p), LAUNCH(copy_without_barrier, 1, 64, 0, 0, p))

__global__ void copy_before_read(float* p) {
  __shared__ float s[64];
  s[threadIdx.x] = 1;
  __syncthreads();
  p[64 + threadIdx.x] = s[63 - threadIdx.x];      // there
  cp_async<4>(s + threadIdx.x, p + threadIdx.x);  // here
  cp_async_wait_all();
}
FUNCTION(run_copy_before_read, (float* p), LAUNCH(copy_before_read, 1, 64, 0, 0, p))

__global__ void copy_never_waited(float* p) {
  __shared__ float s[32];
  cp_async<4>(s + threadIdx.x, p + threadIdx.x);  // here
  cp_async_commit();
}
FUNCTION(run_copy_never_waited, (float* p), LAUNCH(copy_never_waited, 1, 32, 0, 0, p))

__global__ void copy_past_source(float* p) {
  __shared__ __align__(16) float s[128];
  cp_async<16>(s + 4 * threadIdx.x, p + 256 + 16 * threadIdx.x);  // here
  cp_async_wait_all();
}
FUNCTION(run_copy_past_source, (float* p), LAUNCH(copy_past_source, 1, 32, 0, 0, p))

__global__ void copy_misaligned(float* p) {
  __shared__ __align__(16) float s[128];
  cp_async<16>(s + 4 * threadIdx.x, p + 4 * threadIdx.x + 2);  // here
  cp_async_wait_all();
}
FUNCTION(run_copy_misaligned, (float* p), LAUNCH(copy_misaligned, 1, 8, 0, 0, p))

__global__ void copy_to_global(float* p) {
  cp_async<4>(p + threadIdx.x, p + 32 + threadIdx.x);  // here
  cp_async_wait_all();
}
FUNCTION(run_copy_to_global, (float* p), LAUNCH(copy_to_global, 1, 8, 0, 0, p))

__global__ void ldmatrix_misaligned(unsigned* p) {
  __shared__ __align__(16) unsigned short s[1024];
  for (int i = threadIdx.x; i < 1024; i += 32) s[i] = 1;
  __syncwarp();
  unsigned r[4];
  ldmatrix(r, s + 20 * threadIdx.x);  // here
  p[threadIdx.x] = r[0];
}
FUNCTION(run_ldmatrix_misaligned, (unsigned* p), LAUNCH(ldmatrix_misaligned, 1, 32, 0, 0, p))

__global__ void ldmatrix_of_global(unsigned* p) {
  unsigned r[1];
  ldmatrix(r, p + 4 * threadIdx.x);  // here
  p[threadIdx.x] = r[0];
}
FUNCTION(run_ldmatrix_of_global, (unsigned* p), LAUNCH(ldmatrix_of_global, 1, 32, 0, 0, p))

__global__ void ldmatrix_too_early(unsigned* p) {
  __shared__ __align__(16) unsigned short s[64];
  s[2 * threadIdx.x] = s[2 * threadIdx.x + 1] = 1;  // there
  unsigned r[1];
  ldmatrix(r, s + 8 * (threadIdx.x % 8));  // here
  p[threadIdx.x] = r[0];
}
FUNCTION(run_ldmatrix_too_early, (unsigned* p), LAUNCH(ldmatrix_too_early, 1, 32, 0, 0, p))

__global__ void product_in_half(float* p) {
  unsigned a[4] = {}, b[2] = {};
  float c[4] = {};
  if (threadIdx.x < 16) mma_m16n8k16_bf16(c, a, b, c);  // here
  p[threadIdx.x] = c[0];
}
FUNCTION(run_product_in_half, (float* p), LAUNCH(product_in_half, 1, 32, 0, 0, p))

__global__ void product_on_two_lines(float* p) {
  unsigned a[4] = {}, b[2] = {};
  float c[4] = {};
  if (threadIdx.x < 16) mma_m16n8k16_bf16(c, a, b, c);  // there
  else mma_m16n8k16_bf16(c, a, b, c);                   // here
  p[threadIdx.x] = c[0];
}
FUNCTION(run_product_on_two_lines, (float* p), LAUNCH(product_on_two_lines, 1, 32, 0, 0, p))

__global__ void deep_stack(float* p) {  // here, or where it is first used:
  volatile float big[1 << 17];
  for (int i = 0; i < 1 << 17; i++) big[i] = 1;  // here
  p[threadIdx.x] = big[threadIdx.x];
}
FUNCTION(run_deep_stack, (float* p), LAUNCH(deep_stack, 1, 32, 0, 0, p))

__global__ void division(int* p, int zero) { p[threadIdx.x] = 7 / zero; }  // here
FUNCTION(run_division, (int* p), LAUNCH(division, 1, 32, 0, 0, p, 0))

__global__ void spins(volatile float* p) {
  while (p[0] == 0) {  // here
  }
}
FUNCTION(run_spins, (float* p), LAUNCH(spins, 1, 32, 0, 0, p))

__global__ void waits_for_spinner(int* p) {
  if (threadIdx.x == 5)
    while (atomicAdd(p, 0) == 0) {  // here
    }
  __syncthreads();  // there
}
FUNCTION(run_waits_for_spinner, (int* p), LAUNCH(waits_for_spinner, 1, 64, 0, 0, p))

__global__ void asserts(float* p) { assert(p[threadIdx.x] < 20); }  // here
FUNCTION(run_asserts, (float* p), LAUNCH(asserts, 1, 32, 0, 0, p))

__global__ void traps(float* p) {
  if (p[threadIdx.x] == 5) __trap();  // here
}
FUNCTION(run_traps, (float* p), LAUNCH(traps, 1, 32, 0, 0, p))

__global__ void nothing(float*) {}
FUNCTION(run_too_many_threads, (float* p), LAUNCH(nothing, 1, 2048, 0, 0, p))
FUNCTION(run_too_much_shared, (float* p), LAUNCH(nothing, 1, 32, 240 << 10, 0, p))

template <int STATIC_BYTES>
__global__ void both_kinds(float* p) {
  SHARED_DYNAMIC(float, dynamic);
  __shared__ float own[STATIC_BYTES / 4];
  own[threadIdx.x] = dynamic[threadIdx.x] = 1;
  p[threadIdx.x] = own[threadIdx.x] + dynamic[threadIdx.x];
}
FUNCTION(run_both_kinds, (float* p), LAUNCH(both_kinds<8192>, 1, 32, 44 << 10, 0, p))
FUNCTION(run_too_much_together, (float* p), LAUNCH(both_kinds<8192>, 1, 32, 224 << 10, 0, p))
#ifndef __CUDACC__
FUNCTION(run_not_asked, (float* p),
         minidiff::emulator::launch_kernel("both_kinds", both_kinds<16384>, 1, 32, 44 << 10, 0, p))
#endif

// What a GPU says, which the emulator does not.
FUNCTION(run_check, (int error), minidiff::cuda::Configuration{"nothing", 1, 32, 0}.check(cudaError_t(error)))
EXPORT int must_ask(int dynamic_bytes, int static_bytes, int allowed) {
  return minidiff::cuda::must_ask_for_shared_memory(dynamic_bytes, static_bytes, allowed);
}

FUNCTION(run_no_blocks, (float* p), LAUNCH(nothing, 0, 32, 0, 0, p))
FUNCTION(run_fine, (float* p), LAUNCH(nothing, 1, 32, 0, 0, p))
