// The device in use, the stream of the present call (a thread's own), and workspaces: memory that grows where it must and is
// then kept.
#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>

#include "../view.h"
#include "ladder.h"
#include "stream.h"

namespace minidiff {
namespace cuda {
namespace {

struct Workspace {
  float* data = nullptr;
  size_t floats = 0;
};

thread_local cudaStream_t current = nullptr;

// By device and stream, on which one kernel runs after the other: ops on two of them must not write into each other's. Every
// thread has a cudaStreamPerThread of its own. No lock: calls run one at a time (device.h).
std::map<std::tuple<int, cudaStream_t, std::thread::id>, Workspace> workspaces;

Workspace& workspace_in_use() {
  auto thread = current == cudaStreamPerThread ? std::this_thread::get_id() : std::thread::id();
  return workspaces[{ordinal_in_use(), current, thread}];
}

// Null where there is no room.
float* allocated(size_t floats) {
  float* data = nullptr;
  cudaError_t e = cudaMalloc(&data, floats * sizeof(float));
  if (e == cudaSuccess) return data;
  cudaGetLastError();  // told here: the next launch has nothing to do with it
  if (e == cudaErrorMemoryAllocation) return nullptr;
  throw std::runtime_error(std::string(op_in_use) + ": cudaMalloc of a workspace: " + text_of(e));
}

}  // namespace

cudaStream_t stream() { return current; }
void set_stream(uintptr_t s) { current = reinterpret_cast<cudaStream_t>(s); }

float* workspace(size_t floats) {
  Workspace& w = workspace_in_use();
  if (w.floats >= floats) return w.data;
  // what it was stays: a CUDA graph may hold on to it. Doubling where there is room, so that all of them together are twice
  // the last at most.
  Workspace grown{nullptr, std::max(floats, 2 * w.floats)};
  grown.data = allocated(grown.floats);
  if (!grown.data && grown.floats > floats) grown = {allocated(floats), floats};
  if (!grown.data)
    throw OutOfMemory(std::string(op_in_use) + ": the GPU has no " + std::to_string(floats * sizeof(float)) +
                      " bytes left to work in");
  w = grown;
  return w.data;
}

int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}
int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

}  // namespace cuda

int ordinal_in_use() { return cuda::device_in_use(); }

}  // namespace minidiff
