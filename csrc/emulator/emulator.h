// CUDA C++ for an ordinary compiler: with this header g++ compiles a .cu into code that runs on the CPU.
//
// Every CUDA thread is a fiber, a stack and a few registers of its own; the fibers of a block take turns on one core, and
// blocks run one after another. A fiber runs until it has to wait for others:
//
//   thread 0   ────────┐ __syncthreads           ┌───────────────┐ __shfl_xor_sync    ┌──────
//   thread 1           └────────┐                └──┐            └───────┐            │
//   ...                         └── ...             └── ...              └── ... ─────┘
//                               the last to arrive releases all          the last lane computes all lanes' results
//
// A kernel is stepped through with gdb like any function: threadIdx, blockIdx, blockDim and gridDim are variables.
// Compile with -std=c++17 -fvisibility=hidden -g -x c++, and for the checked build, which reports races, uninitialised and
// out-of-bounds accesses (check.cpp), with -O1 -fsanitize=thread -fsanitize=bounds -fsanitize-undefined-trap-on-error
// -fno-tree-sra -fno-tree-vectorize -fno-tree-slp-vectorize -fno-store-merging --param tsan-distinguish-volatile=1; the
// files of this folder are compiled without any of these and linked with the kernels, without libtsan.
#pragma once

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "device_math.h"
#include "small_floats.h"
#include "vector_types.h"

#if !defined(__linux__) || !(defined(__x86_64__) || defined(__aarch64__))
#error "the CUDA emulator runs on Linux on x86-64 (and AArch64) only: build minidiff without it"
#endif

#ifdef __SANITIZE_THREAD__
#define MINIDIFF_CHECKED true
#else
#define MINIDIFF_CHECKED false
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __managed__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// Thread-local: the linker then puts all of a library's shared memory into one place that can be found at run time, with
// the variables' names, also of those in templates. It can so be poisoned and watched. Each begins with bank 0, and what
// its size leaves of a multiple of 128 bytes is nobody's.
#define __shared__ static thread_local __attribute__((aligned(128)))

// The default arguments of a function that wants to know where it was called.
#define MINIDIFF_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define MINIDIFF_SITE(what) (::minidiff::emulator::Site{what, file, line})
#define MINIDIFF_UNWATCHED __attribute__((no_sanitize("thread", "undefined")))

#pragma GCC visibility push(hidden)

namespace minidiff::emulator {
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;
}  // namespace minidiff::emulator

// Each file has its own names for them: a debugger then finds those of the library it has stopped in.
#define MINIDIFF_NAME __attribute__((used)) static
MINIDIFF_NAME uint3& threadIdx = minidiff::emulator::thread_index;
MINIDIFF_NAME uint3& blockIdx = minidiff::emulator::block_index;
MINIDIFF_NAME dim3& blockDim = minidiff::emulator::block_size;
MINIDIFF_NAME dim3& gridDim = minidiff::emulator::grid_size;
#undef MINIDIFF_NAME
constexpr int warpSize = 32;

typedef struct CUstream_st* cudaStream_t;

namespace minidiff::emulator {

struct Site {
  const char* what;  // a literal: the instruction
  const char* file;
  int line;
};

struct Launch {
  const char* kernel;
  const void* function;
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(void*);
  void* arguments;
  size_t argument_bytes;
  bool checked;
};
void launch(const Launch&);  // throws std::runtime_error: what went wrong, in which kernel, launched how

template <class... P>
void launch_kernel(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   typename Same<P>::type... arguments) {
  auto call = [=] { kernel(arguments...); };
  auto body = [](void* p) { (*static_cast<decltype(call)*>(p))(); };
  auto function = reinterpret_cast<const void*>(kernel);
  launch({name, function, grid, block, shared_bytes, body, &call, sizeof call, MINIDIFF_CHECKED});
}

void* dynamic_shared();
bool is_shared(const void* p);   // in this block's shared memory
unsigned lane();                 // of the current thread in its warp
unsigned live_lanes();           // that have not returned
void yield(const Site&);         // lets other threads run
long long clock();
void fence();
[[noreturn]] void fail_here(const Site&, const char* what);  // outside a kernel: ends the program

struct Votes {
  int all, any, count;
};
Votes barrier(const Site&, bool predicate);

// Runs `compute` once, in the last lane of the mask to arrive; records[lane] is what that lane brought, on its stack.
using Compute = void (*)(void* const* records, unsigned mask, const Site&);
void collective(const Site&, unsigned mask, void* record, Compute compute);
void whole_warp(const Site&, void* record, Compute compute);  // all 32 lanes, in the same line: .sync.aligned
void sync_warp(const Site&, unsigned mask);
[[noreturn]] void outside_mask(const Site&, unsigned mask, int lane);

enum class Access : uint8_t { read, write, atomic, unordered_read };
void touched(const void* p, size_t bytes, Access, const Site&);  // an access that the compiler does not announce

void copy_async(void* to, const void* from, int bytes, int source_bytes, const Site&);
void commit_copies();
void wait_copies(unsigned groups_left, const Site&);
void wait_all_copies(const Site&);

// Plain memory accesses that stay unwatched where the compiler announces all others.
template <class T>
__attribute__((noinline)) MINIDIFF_UNWATCHED T peek(const T* p) {
  return *p;
}
template <class T>
__attribute__((noinline)) MINIDIFF_UNWATCHED void poke(T* p, T value) {
  *p = value;
}

template <class T>
inline T load(const T* p, const Site& site) {
  if (!MINIDIFF_CHECKED) return *p;
  touched(p, sizeof(T), Access::read, site);
  return peek(p);
}
template <class T>
inline void store(T* p, T value, const Site& site) {
  if (!MINIDIFF_CHECKED) return void(*p = value);
  touched(p, sizeof(T), Access::write, site);
  poke(p, value);
}

}  // namespace minidiff::emulator

#pragma GCC visibility pop

// An assertion that fails ends the kernel, not the program.
#undef assert
#ifdef NDEBUG
#define assert(condition) ((void)0)
#else
#define assert(condition) \
  ((condition) ? (void)0 : ::minidiff::emulator::fail_here({"assert", __FILE__, __LINE__}, "failed: " #condition))
#endif

#include "atomics.h"
#include "host.h"
#include "warp.h"
