// The device in use, the stream of the present call (a thread's own), and the workspace: memory that grows where it must and
// is then kept.
#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

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
std::map<int, Workspace> workspaces;  // by device

void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  cudaGetLastError();  // told here: the next launch has nothing to do with it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e));
}

}  // namespace

cudaStream_t stream() { return current; }
void set_stream(uintptr_t s) { current = reinterpret_cast<cudaStream_t>(s); }

float* workspace(size_t floats) {
  Workspace& w = workspaces[ordinal_in_use()];
  if (w.floats < floats) {
    // what it was stays: a CUDA graph may hold on to it. Doubling, so that all of them together are twice the last at most.
    floats = std::max(floats, 2 * w.floats);
    check(cudaMalloc(&w.data, floats * sizeof(float)), "cudaMalloc of a workspace");
    w.floats = floats;
  }
  return w.data;
}

int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}
int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

}  // namespace cuda

int ordinal_in_use() {
  int device = 0;
  cuda::check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

}  // namespace minidiff
