// One source, two compilers: nvcc builds a .cu for the GPU, any C++17 compiler builds it for the emulator. Two macros stand
// where CUDA's syntax cannot pass a C++ compiler:
//
//   LAUNCH((kernel<4>), grid, block, shared_bytes, stream, arguments...);   for  kernel<4><<<grid, block, ...>>>(...)
//   SHARED_DYNAMIC(float, tile);                                            for  extern __shared__ float tile[];
//
// A launch that fails throws std::runtime_error, which names the kernel and its launch configuration. More than 48 KiB of
// dynamic shared memory are asked for as CUDA wants it (cudaFuncSetAttribute), and refused where the device has less.
// All PTX is in ptx.h.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace minidiff::cuda {

struct Configuration {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;

  [[noreturn]] void fail(const std::string& why) const {
    auto text = [](dim3 d) {
      return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
    };
    std::string name = kernel;
    if (name.front() == '(') name = name.substr(1, name.size() - 2);
    throw std::runtime_error(name + ": " + why + "; launched with grid " + text(grid) + ", block " +
                             text(block) + ", " + std::to_string(shared_bytes) + " bytes of dynamic shared memory");
  }
  void check(cudaError_t error) const {
    if (error != cudaSuccess) fail(cudaGetErrorString(error));
  }
};

template <class... P>
void allow_shared_memory(const Configuration& c, void (*kernel)(P...)) {
  constexpr size_t always = 48 << 10;
  if (c.shared_bytes <= always) return;
  int device, limit;
  c.check(cudaGetDevice(&device));
  c.check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (c.shared_bytes > size_t(limit)) c.fail("the device has at most " + std::to_string(limit) + " bytes for a block");
  c.check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(c.shared_bytes)));
}

}  // namespace minidiff::cuda

#define LAUNCH(kernel_, grid_, block_, shared_bytes_, stream_, ...)                                                   \
  do {                                                                                                               \
    const ::minidiff::cuda::Configuration launch_{#kernel_, (grid_), (block_), size_t(shared_bytes_)};               \
    ::minidiff::cuda::allow_shared_memory(launch_, kernel_);                                                         \
    kernel_<<<launch_.grid, launch_.block, launch_.shared_bytes, (stream_)>>>(__VA_ARGS__);                          \
    launch_.check(cudaGetLastError());                                                                               \
  } while (0)

#define SHARED_DYNAMIC(T, name)                                             \
  extern __shared__ __align__(128) unsigned char minidiff_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(minidiff_dynamic_shared)

#else

#include "../emulator/emulator.h"

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                       \
  ::minidiff::emulator::launch_kernel(#kernel, kernel, (grid), (block), (shared_bytes), (stream), ##__VA_ARGS__)

#define SHARED_DYNAMIC(T, name) T* name = reinterpret_cast<T*>(::minidiff::emulator::dynamic_shared())

#endif
