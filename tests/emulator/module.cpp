// The emulator's interface with C names, for ctypes.
#include <cstdio>
#include <cstring>
#include <exception>

#include "api.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace minidiff::emulator;

static std::string text;

EXPORT void set_options(int order, uint64_t seed, int poison, int early_return, double stall_seconds, uint64_t stall_turns,
                        int shared_bytes) {
  Options o;
  o.order = Order(order);
  o.seed = seed;
  o.poison = poison;
  o.early_return = early_return;
  o.stall_seconds = stall_seconds;
  o.stall_turns = stall_turns;
  o.device.sharedMemPerBlockOptin = size_t(shared_bytes);
  set_options(o);
}

EXPORT int is_checked() { return checked(); }

template <class F>
const char* caught(F f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    text = e.what();
    return text.c_str();
  }
}

EXPORT const char* add_array(const void* p, size_t bytes, const char* name, int writable, int undefined) {
  return caught([&] { add_buffer(p, bytes, name, writable, undefined ? Content::undefined : Content::defined); });
}
EXPORT void remove_array(const void* p) { remove_buffer(p); }

EXPORT void reset() { reset_counts(); }
EXPORT const char* skip(const char* file, int line) {
  return caught([&] { skip_sync(file, line); });
}
EXPORT void profile_on(int records, uint64_t block) { start_profile(records, block); }
EXPORT void profile_off() { stop_profile(); }

// Tables as text, a row a line, columns between tabs.
template <class Rows, class F>
const char* table(const Rows& rows, F columns) {
  text.clear();
  for (const auto& row : rows) text += columns(row) + "\n";
  return text.c_str();
}
template <class... T>
std::string tabbed(const T&... t) {
  std::string s;
  auto one = [&](const auto& x) {
    if constexpr (std::is_convertible_v<decltype(x), std::string>) s += std::string(x) + "\t";
    else s += std::to_string(x) + "\t";
  };
  (one(t), ...);
  return s;
}

EXPORT const char* count_table() {
  return table(counts(), [](const Count& c) {
    return tabbed(c.kernel, c.launches, c.blocks, c.threads, c.barriers, c.collectives, c.switches);
  });
}
EXPORT const char* sync_table() {
  return table(sync_points(), [](const SyncPoint& p) { return tabbed(p.what, p.file, p.line, p.times); });
}
EXPORT const char* profile_table() {
  return table(profile(), [](const ProfileRow& r) {
    return tabbed(r.kernel, r.file, r.line, r.shared ? "shared" : "global", r.store ? "store" : "load", r.bytes, r.requests,
                  r.transactions, r.ideal);
  });
}
EXPORT const char* access_table(const char* file, int line, int shared, int store) {
  return table(access_records(file, line, shared, store),
               [](const AccessRecord& r) { return tabbed(r.request, r.thread, r.offset); });
}
EXPORT int runtime_calls() {  // the host's side of CUDA: how many calls answered otherwise than expected
  int wrong = 0, value = 0, blocks = 0;
  auto expect = [&](bool holds) { wrong += !holds; };
  cudaDeviceProp d;
  float *p = nullptr, host[3] = {1, 2, 3}, back[3] = {};
  expect(cudaGetDeviceProperties(&d, 0) == cudaSuccess && d.multiProcessorCount == 16);
  expect(cudaGetDeviceProperties(&d, 1) == cudaErrorInvalidDevice);
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 16);
  expect(cudaGetDeviceCount(&value) == cudaSuccess && value == 1);
  expect(cudaMalloc(&p, sizeof host) == cudaSuccess && p);
  expect(cudaMemcpyAsync(p, host, sizeof host, cudaMemcpyHostToDevice) == cudaSuccess);
  expect(cudaMemcpy(back, p, sizeof back, cudaMemcpyDeviceToHost) == cudaSuccess && back[2] == 3);
  expect(cudaMemsetAsync(p, 0, sizeof host) == cudaSuccess && p[1] == 0);
  expect(cudaFree(p) == cudaSuccess);
  expect(cudaFree(p) == cudaErrorInvalidValue);
  expect(!strcmp(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory"));
  expect(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, 0, 256, 100 << 10) == cudaSuccess && blocks == 2);
  return wrong;
}
