// Global memory and the host's side of CUDA. What cudaMalloc gives ends where a page begins that nobody may touch.
#include <sys/mman.h>

#include <cstring>

#include "state.h"

namespace minidiff::emulator {
namespace {

Machine& m = machine;

size_t bytes_given() {
  size_t all = 0;
  for (const auto& [start, region] : m.regions)
    if (region.mapped) all += region.bytes;
  return all;
}

size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

char* map_guarded(size_t bytes) {
  size_t inside = pages(bytes);
  void* p = mmap(nullptr, inside + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  char* first = static_cast<char*>(p) + PAGE;
  mprotect(first, inside, PROT_READ | PROT_WRITE);
  return first + inside - (bytes + 255) / 256 * 256;
}

}  // namespace

void add_buffer(const void* p, size_t bytes, const std::string& name, bool writable, Content content) {
  if (!bytes) return;
  std::lock_guard<std::mutex> guard(m.lock);
  auto* start = static_cast<char*>(const_cast<void*>(p));
  auto [found, added] = m.regions.try_emplace(start);
  Region& r = found->second;
  if (!added) {  // the same again, or a view of it
    r.uses++;
    r.writable |= writable;
    if (bytes <= r.bytes) return;
    drop_notes(r);
    r.bytes = bytes;
    return;
  }
  r.start = start;
  r.bytes = bytes;
  r.name = name;
  r.writable = writable;
  r.undefined = content == Content::undefined;
  if (r.undefined && m.options.poison) memset(start, 0xff, bytes);
}

void remove_buffer(const void* p) {
  std::lock_guard<std::mutex> guard(m.lock);
  auto found = m.regions.find(static_cast<char*>(const_cast<void*>(p)));
  if (found == m.regions.end() || --found->second.uses) return;
  drop_notes(found->second);
  m.regions.erase(found);
}

void set_by_host(void* p, size_t bytes) {
  std::lock_guard<std::mutex> guard(m.lock);
  check_set_by_host(p, bytes);
}

size_t device_bytes() {
  std::lock_guard<std::mutex> guard(m.lock);
  return bytes_given();
}

cudaError_t blocks_per_multiprocessor(int* blocks, int threads, size_t shared_bytes) {
  const cudaDeviceProp& d = m.options.device;
  if (threads < 1 || threads > d.maxThreadsPerBlock || shared_bytes > d.sharedMemPerBlockOptin) {
    *blocks = 0;
    return cudaSuccess;
  }
  *blocks = min(32, d.maxThreadsPerMultiProcessor / ((threads + 31) / 32 * 32));
  *blocks = min(*blocks, int(d.sharedMemPerMultiprocessor / (shared_bytes + 1024)));
  return cudaSuccess;
}

}  // namespace minidiff::emulator

using namespace minidiff::emulator;

cudaError_t cudaMallocBytes(void** p, size_t bytes) {
  *p = nullptr;
  if (!bytes) return cudaSuccess;
  if (device_bytes() + bytes > options().device.totalGlobalMem) return cudaErrorMemoryAllocation;
  char* start = map_guarded(bytes);
  if (!start) return cudaErrorMemoryAllocation;
  add_buffer(start, bytes, "memory from cudaMalloc", true, Content::undefined);
  std::lock_guard<std::mutex> guard(machine.lock);
  machine.regions[start].mapped = pages(bytes) + 2 * PAGE;
  *p = start;
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  size_t mapped, bytes;
  {
    std::lock_guard<std::mutex> guard(machine.lock);
    auto found = machine.regions.find(static_cast<char*>(p));
    if (found == machine.regions.end() || !found->second.mapped) return cudaErrorInvalidValue;
    mapped = found->second.mapped;
    bytes = found->second.bytes;
  }
  remove_buffer(p);
  munmap(static_cast<char*>(p) + (bytes + 255) / 256 * 256 + PAGE - mapped, mapped);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void* kernel) {
  std::lock_guard<std::mutex> guard(machine.lock);
  auto found = machine.allowed_dynamic.find(kernel);
  *of = {0, found == machine.allowed_dynamic.end() ? 0 : int(found->second)};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  std::lock_guard<std::mutex> guard(machine.lock);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > machine.options.device.sharedMemPerBlockOptin) return cudaErrorInvalidValue;
  machine.allowed_dynamic[kernel] = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device) return cudaErrorInvalidDevice;
  *properties = options().device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp d;
  if (cudaError_t error = cudaGetDeviceProperties(&d, device)) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = d.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(d.sharedMemPerBlock); break;
    case cudaDevAttrMultiProcessorCount: *value = d.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *value = d.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = d.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = d.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(d.sharedMemPerMultiprocessor); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(d.sharedMemPerBlockOptin); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    default: return "cudaErrorInvalidValue";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "there is no such device";
    default: return "invalid argument";
  }
}
