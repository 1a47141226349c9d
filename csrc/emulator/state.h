// What the files of the emulator share. There is one machine in a library, and a lock: kernels run one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"
#include "emulator.h"

#pragma GCC visibility push(hidden)

namespace minidiff::emulator {

constexpr int MAX_THREADS = 1024;
constexpr size_t PAGE = 4096, STACK_BYTES = 256 << 10, DYNAMIC_BYTES = 256 << 10;

struct Thread {
  enum State : uint8_t { ready, at_barrier, at_warp, done };
  void* top = nullptr;  // of its stack, while it sleeps
  int stack = -1;       // -1: not started
  uint3 index = {};
  uint16_t number = 0, warp = 0, lane = 0;
  State state = ready;
  Site site = {};  // where it waits
  unsigned mask = 0;
  void* record = nullptr;
  int first_copy = -1, last_copy = -1;  // of cp.async, under way
  unsigned group = 0;                   // of copies, that is open
};

struct Warp {
  unsigned ready = 0, exists = 0, done = 0, at_barrier = 0, at_warp = 0;
};

struct Copy {  // cp.async: the data lands at the wait
  char* to;
  uint8_t bytes;
  unsigned group;
  int next;
  Site site;
  char data[16];
};

// Why a kernel was given up. Places in the code are program counters until somebody reads them.
struct Failure {
  bool happened = false;
  std::string text;
  uintptr_t pc = 0, other_pc = 0;  // text has "{pc}" and "{other}" where these places belong
};

// Global memory somebody told us of. Cells are the checked build's notes about it (check.cpp).
struct Cell;
struct Region {
  char* start = nullptr;
  size_t bytes = 0;
  std::string name;
  bool shared = false, writable = true, undefined = false;
  int uses = 1;
  size_t mapped = 0;  // by cudaMalloc
  Cell *cells = nullptr, *split_cells = nullptr;
};

struct SharedVariable {
  size_t offset, bytes;  // in the library's thread-local storage
  std::string name;
};

struct Machine {
  std::mutex lock;
  Options options;

  void* main = nullptr;       // the launching thread's stack
  const void* owner = nullptr;  // the system's thread whose fibers run; null while the emulator itself works
  Thread* current = nullptr;
  Thread threads[MAX_THREADS];
  Warp warps[MAX_THREADS / 32];
  unsigned ready_warps = 0;
  unsigned n = 0, n_warps = 0, live = 0, waiting = 0, returned = 0;
  Site barrier_site = {};
  bool divergent = false;
  Votes votes = {}, last_votes = {};
  uint64_t random = 1;
  uint64_t block = 0;  // its number in the grid

  char* stacks = nullptr;
  int free_stacks[MAX_THREADS], n_free = 0;
  char *dynamic_map = nullptr, *dynamic = nullptr;  // shared memory, its end at a guard page
  size_t dynamic_bytes = 0;
  char* statics = nullptr;  // the launching thread's thread-local storage of this library
  std::vector<SharedVariable> variables;
  std::vector<size_t> guards;  // bytes of the compiler's own beside them
  std::vector<Copy> copies;
  int free_copy = -1;

  const char *image_start = nullptr, *image_end = nullptr;  // of this library in memory

  const Launch* launch = nullptr;
  std::string kernel;
  bool checked = false, ever_checked = false;
  Failure failure;
  uintptr_t last_access = 0;              // a program counter, in the checked build
  volatile bool expired = false;          // the watchdog has had enough
  volatile uint64_t progress = 0;         // barriers, collectives, finished threads
  uint64_t turns_in_vain = 0, atomics_in_a_row = 0;

  std::map<char*, Region> regions;  // by their start
  std::map<const void*, size_t> allowed_dynamic;  // shared memory that was asked for, by kernel

  std::map<std::string, size_t> count_of;
  std::vector<Count> counts;
  Count* count = nullptr;
  std::map<std::pair<const char*, int>, std::pair<Site, uint64_t>> sync_points;
  std::vector<std::pair<std::string, int>> skipped;
};
extern Machine machine;

// While one of these lives, what the checked build is told is not about the kernel.
struct Quiet {
  const void* owner = machine.owner;
  Quiet() { machine.owner = nullptr; }
  Quiet(const Quiet&) = delete;
  ~Quiet() { machine.owner = owner; }
};

[[noreturn]] void fail(const std::string& text);                                        // from a fiber
[[noreturn]] void leave_fibers();  // after machine.failure is set
bool is_skipped(const Site&);
void note_sync(const Site&);
std::string where_threads_are();
std::string thread_name(unsigned number, uint64_t block);  // "thread (3, 0, 0) of block (0, 1, 0)"
std::string place(const Site&);                            // "gemm.cu:17"
std::string base_name(const char* path);

// faults.cpp: while it lives, signals of the kernel's own making end the kernel, not the process
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;

 private:
  struct Saved;
  Saved* saved;
};

void drop_notes(Region&);  // of the checked build

// symbols.cpp
void find_statics();                     // machine.statics and, once, machine.variables
struct Place {
  std::string file;  // without its folders; empty: not known
  int line = 0;
  std::string text;  // "tile.h:12 (from gemm.cu:40)", or the program counter
};
std::vector<Place> places_of(const std::vector<uintptr_t>& pcs);

// check.cpp: what the checked build is told
void check_launch_start();
void check_block_start();
void check_block_end();
void check_barrier();
void check_sync_warp(unsigned warp, unsigned mask);
void check_fence();
void check_atomic(void* p, size_t bytes, const Site&);
void check_copy_start(void* to, size_t bytes, const void* from, size_t source_bytes, const Site&);
void check_copy_end(void* to, size_t bytes, const Site&);
void check_set_by_host(void* p, size_t bytes);

// A place in the code, by a small number. Either a program counter or a site.
struct Where {
  uintptr_t pc;
  Site site;
};
const Where& where(uint16_t number);

// profile.cpp
bool profiling();
void profile_access(const char* p, size_t bytes, const Region&, bool store, uint16_t place);
void profile_block_end();

}  // namespace minidiff::emulator

#pragma GCC visibility pop
