// One source, two compilers: nvcc builds a .cu for the GPU, any C++17 compiler builds it for the emulator. Two macros stand
// where CUDA's syntax cannot pass a C++ compiler:
//
//   LAUNCH((kernel<4>), grid, block, shared_bytes, stream, arguments...);   for  kernel<4><<<grid, block, ...>>>(...)
//   SHARED_DYNAMIC(float, tile);                                            for  extern __shared__ float tile[];
//
// A launch that fails throws std::runtime_error, which names the kernel and its launch configuration. All PTX is in ptx.h.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#else
#include "../emulator/emulator.h"
#endif

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace minidiff::cuda {

// CUDA's words. A kernel's fault is told by whatever is asked of the device next, and a launch is not waited for.
inline std::string text_of(cudaError_t error) {
  bool fault = error == cudaErrorIllegalAddress || error == cudaErrorLaunchTimeout || error == cudaErrorAssert ||
               (error >= cudaErrorHardwareStackError && error <= cudaErrorLaunchFailure);
  return cudaGetErrorString(error) +
         std::string(fault ? ", in this kernel or in one before it: CUDA_LAUNCH_BLOCKING=1 tells in which" : "");
}

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
    if (error == cudaSuccess) return;
    cudaGetLastError();  // forgets it: the next launch has nothing to do with it
    fail(text_of(error));
  }
};

inline void check_asked(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + text_of(error));
}

inline int device_in_use() {
  int device = 0;
  check_asked(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// What the device in use says of itself.
inline int device_attribute(cudaDeviceAttr which) {
  int value = 0;
  check_asked(cudaDeviceGetAttribute(&value, which, device_in_use()), "cudaDeviceGetAttribute");
  return value;
}

// A kernel's static and dynamic shared memory are 48 KiB together at most, unless more was asked for. `allowed`, what may be
// dynamic, is 48 KiB before anybody asked, or these less the static ones.
inline bool must_ask_for_shared_memory(size_t dynamic_bytes, size_t static_bytes, size_t allowed) {
  constexpr size_t EVERYBODYS = 48 << 10;
  bool asked = allowed > EVERYBODYS;
  return dynamic_bytes > allowed || (!asked && static_bytes + dynamic_bytes > EVERYBODYS);
}

template <class... P>
void allow_shared_memory(const Configuration& c, void (*kernel)(P...)) {
  if (!c.shared_bytes) return;
  auto function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes of;
  c.check(cudaFuncGetAttributes(&of, function));
  if (!must_ask_for_shared_memory(c.shared_bytes, of.sharedSizeBytes, size_t(of.maxDynamicSharedSizeBytes))) return;
  size_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (c.shared_bytes + of.sharedSizeBytes > limit)
    c.fail("the device has at most " + std::to_string(limit) + " bytes of shared memory for a block, and the kernel's " +
           "static variables take " + std::to_string(of.sharedSizeBytes));
  c.check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(c.shared_bytes)));
}

}  // namespace minidiff::cuda

#define LAUNCH(kernel_, grid_, block_, shared_bytes_, stream_, ...)                                                   \
  do {                                                                                                               \
    const ::minidiff::cuda::Configuration launch_{#kernel_, (grid_), (block_), size_t(shared_bytes_)};               \
    ::minidiff::cuda::allow_shared_memory(launch_, kernel_);                                                         \
    MINIDIFF_START(kernel_, launch_, stream_, ##__VA_ARGS__);                                                        \
    launch_.check(cudaGetLastError());                                                                               \
  } while (0)

#ifdef __CUDACC__

#define MINIDIFF_START(kernel_, c, stream_, ...) kernel_<<<c.grid, c.block, c.shared_bytes, (stream_)>>>(__VA_ARGS__)

#define SHARED_DYNAMIC(T, name)                                             \
  extern __shared__ __align__(128) unsigned char minidiff_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(minidiff_dynamic_shared)

#else

#define MINIDIFF_START(kernel_, c, stream_, ...) \
  ::minidiff::emulator::launch_kernel(c.kernel, kernel_, c.grid, c.block, c.shared_bytes, (stream_), ##__VA_ARGS__)

#define SHARED_DYNAMIC(T, name) T* name = reinterpret_cast<T*>(::minidiff::emulator::dynamic_shared())

#endif
