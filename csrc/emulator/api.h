// What the module that offers emulated kernels to Python can set and ask. Everything here may be called from any thread;
// a call waits until the kernel that runs is done. Mistakes are std::runtime_error or std::invalid_argument.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "host.h"

#pragma GCC visibility push(hidden)

namespace minidiff::emulator {

enum class Order : uint8_t { forward, reverse, random };  // in which lanes, warps and blocks take their turns

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;             // of the random order
  bool poison = true;            // shared memory starts as NaN, and so do undefined buffers
  bool early_return = false;     // whether threads may return before a barrier the others reach
  double stall_seconds = 20;     // without a barrier, a shuffle or a finished thread: the kernel is given up; 0: never
  uint64_t stall_turns = 1000000;  // turns of waiting threads in which nothing else happens; 0: any number
  cudaDeviceProp device;         // what host code is told about the device, and what launches are held to
};
Options options();
void set_options(const Options&);
bool checked();  // whether some kernel that ran was compiled for the checked build

// Global memory of which the checked build knows the exact extent; as soon as there is any, everything else is out of
// bounds. An undefined buffer holds nothing until kernels write it. Adding one again, or a view that starts where it does,
// counts; so does removing. A view within another buffer is told apart by its start.
enum class Content : uint8_t { defined, undefined };
void add_buffer(const void* p, size_t bytes, const std::string& name, bool writable, Content content);
void remove_buffer(const void* p);
struct Buffer {
  Buffer(const void* p, size_t bytes, const std::string& name, bool writable, Content content) : p(p) {
    add_buffer(p, bytes, name, writable, content);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { remove_buffer(p); }
  const void* p;
};

size_t device_bytes();  // what cudaMalloc has given and cudaFree not taken back

struct Count {
  std::string kernel;
  uint64_t launches = 0, blocks = 0, threads = 0, barriers = 0, collectives = 0, switches = 0;
};
std::vector<Count> counts();  // by kernel, in the order of their first launch
void reset_counts();

// Where kernels synchronised: barriers, __syncwarp and the waits of cp.async. skip_sync makes one of them do nothing from
// now on: a test must notice. It refuses a line where no kernel that ran has synchronised. An empty file ends all skipping.
struct SyncPoint {
  std::string what, file;  // the file without its folders
  int line;
  uint64_t times;
};
std::vector<SyncPoint> sync_points();
void skip_sync(const std::string& file, int line);

// The profile (checked build): while it is on, every access of kernels to shared and global memory is counted by source
// line. The k-th time that lanes of a warp come by is one request. It costs `transactions` passes over the banks of shared
// memory or sectors of 32 bytes of global memory; `ideal` is how many it had if the same bytes lay side by side.
void start_profile(int records = 0, uint64_t block = 0);  // and keep the first `records` requests of a line in that block
void stop_profile();
struct ProfileRow {
  std::string kernel, file;
  int line;
  bool shared, store;
  int bytes;  // of one thread's access
  uint64_t requests, transactions, ideal;
};
std::vector<ProfileRow> profile();

// What one thread touched: request counts from 0 within the line, kind and width; offset is in bytes from the start of the
// buffer or of shared memory.
struct AccessRecord {
  int request, thread;
  int64_t offset;
};
std::vector<AccessRecord> access_records(const std::string& file, int line, bool shared, bool store);

}  // namespace minidiff::emulator

#pragma GCC visibility pop
