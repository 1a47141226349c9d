// The checked build. Kernels are compiled with -fsanitize=thread, but not linked with its library: the compiler then calls
// our __tsan_read4(p) and the like before every access, which is all we need.
//
// Every 4 bytes of shared and of registered global memory have a cell: who wrote last, and which two threads read last,
// when and where. Time is a counter that moves on with every barrier, __syncwarp and fence:
//
//   thread 0   write s[0] at 7          read s[1] at 8    fine: thread 1 wrote before the barrier
//                            barrier: 8
//   thread 1   write s[1] at 7          write s[0] at 8
//   thread 2                            read s[0] at 8    a race: thread 1 wrote after the barrier
//
// An earlier access a is over, for the thread that runs, if
//   - it is that thread's own, or of an earlier launch
//   - a barrier followed it, in the same block
//   - a chain of __syncwarp leads from it to this thread: clocks[c][l] is the time up to which lane c has seen lane l
//   - a chain by atomics does: a's block was fenced after it and then did an atomic, on which this thread did one since
// Otherwise, if one of the two writes and not both are atomic, it is a race, whichever came first this time.
//
// A cell of which only a part is touched is split into four, one a byte.
#include "state.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>

namespace minidiff::emulator {

struct Note {
  uint32_t time = 0;  // 0: never
  uint16_t place = 0;
  uint16_t who = 0;  // a thread's number and the flags below

  static constexpr uint16_t THREAD = 1023, ATOMIC = 1024, IN_FLIGHT = 2048, SPLIT = 4096;
  unsigned thread() const { return who & THREAD; }
  bool is(uint16_t flag) const { return who & flag; }
};

struct Cell {
  Note write, read, other_read;
};

namespace {

Machine& m = machine;

struct Release {  // an atomic, as seen by those that come later to the same address
  uint32_t time, barrier, block_start;
  unsigned thread;
  std::vector<uint32_t> fences;  // the last of each thread
};
struct Acquire {
  void* address;
  size_t releases;  // how many it has seen
  unsigned thread;
  uint32_t time;
};

Region shared_region() {
  Region r;
  r.shared = true;
  return r;
}

struct Checker {
  uint32_t now = 2, launch_start = 2, block_start = 2, barrier = 2;
  std::vector<std::pair<uint32_t, uint64_t>> blocks;  // when each began, and its number
  uint32_t clocks[MAX_THREADS / 32][32][32] = {};
  uint32_t fences[MAX_THREADS] = {};
  bool fenced = false;
  std::unordered_map<void*, std::vector<Release>> releases;
  std::vector<Acquire> acquires;
  Region dynamic = shared_region();
  std::vector<Region> statics;
  Region* last = nullptr;
};
Checker c;

// ---- places

constexpr size_t SLOTS = 1 << 17, MAX_PLACES = 1 << 16;
struct Slot {
  uint64_t key;
  uint16_t number;
};
Slot slots[SLOTS];
std::vector<Where> wheres;

uint16_t number_of(uint64_t key, uintptr_t pc, const Site* site) {
  size_t i = (key * 0x9e3779b97f4a7c15u) >> 47;
  while (slots[i].key && slots[i].key != key) i = (i + 1) % SLOTS;
  if (slots[i].key) return slots[i].number;
  if (wheres.size() == MAX_PLACES) return MAX_PLACES - 1;
  slots[i] = {key, uint16_t(wheres.size())};
  wheres.push_back({pc, site ? *site : Site{}});
  return slots[i].number;
}

uint16_t place_number(uintptr_t pc) { return number_of(pc, pc, nullptr); }
uint16_t place_number(const Site& s) {
  return number_of(reinterpret_cast<uintptr_t>(s.file) * 8191 + unsigned(s.line) + (uint64_t(1) << 63), 0, &s);
}

// ---- cells

template <class T>
T* map_zeros(size_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(p);
}

uintptr_t first_word(const Region& r) { return reinterpret_cast<uintptr_t>(r.start) / 4; }
size_t cells_of(const Region& r) { return r.bytes / 4 + 2; }

inline Cell* cell_of(Region& r, uintptr_t word) {
  if (!r.cells) r.cells = map_zeros<Cell>(cells_of(r));
  return &r.cells[word - first_word(r)];
}

Cell* split_cells(Region& r, uintptr_t word) {
  if (!r.split_cells) r.split_cells = map_zeros<Cell>(4 * cells_of(r));
  Cell *whole = cell_of(r, word), *parts = &r.split_cells[4 * (word - first_word(r))];
  if (!whole->write.is(Note::SPLIT)) {
    std::fill(parts, parts + 4, *whole);
    whole->write.who |= Note::SPLIT;
  }
  return parts;
}

template <class F>
inline void each_cell(Region& r, const char* p, size_t bytes, F f) {
  uintptr_t at = reinterpret_cast<uintptr_t>(p), end = at + bytes;
  while (at < end) {
    uintptr_t word = at / 4, stop = std::min(end, 4 * word + 4);
    Cell* whole = cell_of(r, word);
    if (stop - at == 4 && !whole->write.is(Note::SPLIT)) {
      f(*whole);
      at = stop;
    } else {
      for (Cell* parts = split_cells(r, word); at < stop; at++) f(parts[at % 4]);
    }
  }
}

// ---- reports

struct Event {
  const char* p;
  size_t bytes;
  Access kind;
  uint16_t place;
  bool writes() const { return kind == Access::write || kind == Access::atomic; }
  bool atomic() const { return kind == Access::atomic || kind == Access::unordered_read; }
};

std::string memory(const Region& r, const char* p) {
  std::string kind = &r == &c.dynamic ? "dynamic shared memory" : (r.shared ? "shared memory " : "") + r.name;
  return kind + " + " + std::to_string(p - r.start);
}

std::string verb(const Event& e) {
  const char* word = e.kind == Access::atomic ? "atomic" : e.writes() ? "write" : "read";
  return std::to_string(e.bytes) + "-byte " + word;
}

std::string here(uint16_t place_number, const char* mark, uintptr_t& pc) {
  const Where& w = wheres[place_number];
  pc = w.pc;
  return w.pc ? mark : place(w.site);
}

std::string what_and_who(const Event& e, const std::string& memory) {
  return verb(e) + (e.kind == Access::read || e.kind == Access::unordered_read ? " of " : " to ") + memory + " at " +
         here(e.place, "{pc}", m.failure.pc) + " by " + thread_name(m.current->number, m.block);
}

uint64_t block_at(uint32_t time) {
  auto later = std::upper_bound(c.blocks.begin(), c.blocks.end(), std::make_pair(time, ~uint64_t(0)));
  return (later - 1)->second;
}

std::string other(const Note& n) {
  uint64_t block = block_at(n.time);
  return thread_name(n.thread(), block) + (block == m.block ? "" : ", another block,");
}

[[noreturn]] void report(const char* kind, const std::string& details) {
  m.owner = nullptr;
  fail(std::string(kind) + " in " + m.kernel + ": " + details);
}

[[noreturn]] __attribute__((cold, noinline)) void race(const Event& e, const Region& r, const Note& n, bool n_wrote) {
  m.owner = nullptr;
  const char* kind = "race (read after write)";
  if (e.writes()) kind = n_wrote ? "race (write after write)" : "race (write after read)";
  std::string missing = block_at(n.time) == m.block ? "no barrier in between" : "nothing that orders the two blocks";
  report(kind, what_and_who(e, memory(r, e.p)) + "; " + other(n) + (n_wrote ? " wrote it at " : " read it at ") +
                   here(n.place, "{other}", m.failure.other_pc) + ", with " + missing);
}

[[noreturn]] __attribute__((cold, noinline)) void not_landed(const Event& e, const Region& r, const Note& n) {
  m.owner = nullptr;
  report("copy not waited for", what_and_who(e, memory(r, e.p)) + "; the cp.async at " +
                                    here(n.place, "{other}", m.failure.other_pc) + " by " + other(n) +
                                    " is still under way");
}

[[noreturn]] __attribute__((cold, noinline)) void unwritten(const Event& e, const Region& r) {
  m.owner = nullptr;
  report("read of unwritten memory", what_and_who(e, memory(r, e.p)) + ", which nobody has written");
}

// "12 bytes past the end of x (400 bytes)", or before its start, of the buffer that is nearest
std::string nearest(const char* p) {
  const Region* below = nullptr;
  auto look = [&](const Region& r) {
    if (r.bytes && p >= r.start && (!below || r.start > below->start)) below = &r;
  };
  bool in_dynamic = p >= m.dynamic_map && p < m.dynamic_map + DYNAMIC_BYTES + PAGE;
  if (in_dynamic) look(c.dynamic);
  for (const Region& r : c.statics) look(r);
  auto after = m.regions.upper_bound(const_cast<char*>(p));
  if (after != m.regions.begin()) look(std::prev(after)->second);
  constexpr long far = 1 << 20;
  long past = below ? p - below->start - long(below->bytes) : far + 1;
  long before = after != m.regions.end() ? after->first - p : far + 1;
  if (past > far && before > far)
    return in_dynamic ? "dynamic shared memory that was not asked for" : "memory that nobody registered";
  if (before < past) return std::to_string(before) + " bytes before the start of " + after->second.name;
  std::string name = below == &c.dynamic ? "dynamic shared memory" : below->name;
  return std::to_string(past) + " bytes past the end of " + name + " (" + std::to_string(below->bytes) + " bytes)";
}

// ---- what is over

bool ordered_by_atomics(const Note& a) {
  for (const Acquire& q : c.acquires) {
    if (q.thread != m.current->number && q.time >= c.barrier) continue;
    const auto& releases = c.releases[q.address];
    for (size_t i = 0; i < q.releases; i++) {
      const Release& r = releases[i];
      if (a.time < r.block_start || a.time > r.time) continue;
      bool before = r.thread == a.thread() || a.time < r.barrier;
      if (before && (r.fences[r.thread] > a.time || r.fences[a.thread()] > a.time)) return true;
    }
  }
  return false;
}

bool synced_in_warp(const Note& a) {
  const Thread& me = *m.current;
  return a.thread() / 32 == me.warp && c.clocks[me.warp][me.lane][a.thread() % 32] > a.time;
}

inline bool over(const Note& a) {
  if (a.time < c.launch_start || (a.time >= c.block_start && a.time < c.barrier)) return true;
  if (a.time >= c.block_start && (a.thread() == m.current->number || synced_in_warp(a))) return true;
  return !c.acquires.empty() && ordered_by_atomics(a);
}

inline void note_read(Cell& cell, const Note& now) {
  auto replaceable = [&](const Note& n) { return n.thread() == now.thread() || over(n); };
  if (replaceable(cell.read)) {
    cell.read = now;
  } else if (replaceable(cell.other_read) || cell.other_read.thread() / 32 == cell.read.thread() / 32) {
    cell.other_read = now;  // if possible of another warp: then any later write conflicts with one of the two
  }
}

inline void check_cell(Cell& cell, const Event& e, Region& r) {
  const Thread& me = *m.current;
  Note& w = cell.write;
  if (r.shared && w.time < c.block_start) {  // another block's shared memory
    uint16_t split = w.who & Note::SPLIT;
    cell = {};
    w.who = split;
  }
  if (w.is(Note::IN_FLIGHT) && w.time >= c.launch_start) not_landed(e, r, w);
  if (w.time && !(e.atomic() && w.is(Note::ATOMIC)) && !over(w)) race(e, r, w, true);
  Note now{c.now, e.place, uint16_t(me.number | (e.atomic() ? Note::ATOMIC : 0))};
  if (e.writes()) {
    for (const Note& n : {cell.read, cell.other_read})
      if (n.time && !(e.atomic() && n.is(Note::ATOMIC)) && !over(n)) race(e, r, n, false);
    now.who |= w.who & Note::SPLIT;
    w = now;
  } else {
    if (!w.time && (r.shared || r.undefined)) unwritten(e, r);
    note_read(cell, now);
  }
}

Region* search_region(const char* p) {
  auto has = [p](const Region& r) { return p >= r.start && p < r.start + r.bytes; };
  if (has(c.dynamic)) return c.last = &c.dynamic;
  auto starts_later = [](const char* q, const Region& r) { return q < r.start; };
  auto after = std::upper_bound(c.statics.begin(), c.statics.end(), p, starts_later);
  if (after != c.statics.begin() && has(*std::prev(after))) return c.last = &*std::prev(after);
  auto next = m.regions.upper_bound(const_cast<char*>(p));
  while (next != m.regions.begin())  // a view may lie within another buffer
    if (has((--next)->second)) return c.last = &next->second;
  return nullptr;
}

inline Region* find_region(const char* p) {
  return c.last && size_t(p - c.last->start) < c.last->bytes ? c.last : search_region(p);
}

inline bool is_argument(const char* p) {
  auto arguments = static_cast<const char*>(m.launch->arguments);
  return p >= arguments && p < arguments + m.launch->argument_bytes;
}

void check_access(const Event& e) {
  Quiet quiet;
  Region* r = find_region(e.p);
  if (!r) {
    if (std::find(m.guards.begin(), m.guards.end(), size_t(e.p - m.statics)) != m.guards.end()) return;
    bool in_shared = e.p >= m.dynamic_map && e.p < m.dynamic_map + DYNAMIC_BYTES + PAGE;
    for (const Region& s : c.statics) in_shared |= e.p >= s.start && e.p < s.start + s.bytes + 64;
    if (m.regions.empty() && !in_shared) return;  // nobody told us of any buffer
    report("out of bounds", what_and_who(e, nearest(e.p)));
  }
  if (e.p + e.bytes > r->start + r->bytes) report("out of bounds", what_and_who(e, memory(*r, e.p)) + ", of " +
                                                                        std::to_string(r->bytes) + " bytes");
  if (e.writes() && !r->writable) report("write to read-only memory", what_and_who(e, memory(*r, e.p)));
  each_cell(*r, e.p, e.bytes, [&](Cell& cell) { check_cell(cell, e, *r); });
  if (profiling()) profile_access(e.p, e.bytes, *r, e.writes(), e.place);
}

// What is a thread's own, or constant, needs no look.
inline bool uninteresting(const char* p) {
  size_t in_stacks = size_t(p - m.stacks);
  if (in_stacks < STACK_BYTES * MAX_THREADS) return int(in_stacks / STACK_BYTES) == m.current->stack;
  return (p >= m.image_start && p < m.image_end) || is_argument(p);
}

[[noreturn]] __attribute__((cold, noinline)) void misaligned(const Event& e) {
  m.owner = nullptr;
  Region* r = find_region(e.p);
  report("misaligned", what_and_who(e, r ? memory(*r, e.p) : "memory") + ", no multiple of " + std::to_string(e.bytes));
}

[[noreturn]] __attribute__((cold, noinline)) void others_stack(const Event& e) {
  m.owner = nullptr;
  report("out of bounds", what_and_who(e, "another thread's local memory"));
}

__attribute__((always_inline)) inline void access(const void* p, size_t bytes, Access kind, uintptr_t pc, bool aligned) {
  if (m.owner != __builtin_thread_pointer()) return;
  m.last_access = pc - 1;
  auto at = static_cast<const char*>(p);
  if (uninteresting(at)) return;
  Event e{at, bytes, kind, place_number(pc - 1)};
  if (size_t(at - m.stacks) < STACK_BYTES * MAX_THREADS) others_stack(e);
  if (aligned && reinterpret_cast<uintptr_t>(at) % bytes) misaligned(e);
  check_access(e);
}

void unmap(Region& r) {
  if (r.cells) munmap(r.cells, cells_of(r) * sizeof(Cell));
  if (r.split_cells) munmap(r.split_cells, 4 * cells_of(r) * sizeof(Cell));
  r.cells = r.split_cells = nullptr;
}

// Before the clock overflows: forget everything.
void start_again() {
  for (auto& [start, r] : m.regions) unmap(r), r.undefined = false;
  for (Region& r : c.statics) unmap(r);
  c.dynamic.bytes = DYNAMIC_BYTES;
  unmap(c.dynamic);
  memset(c.clocks, 0, sizeof c.clocks);
  memset(c.fences, 0, sizeof c.fences);
  c.now = 2;
}

}  // namespace

const Where& where(uint16_t number) { return wheres[number]; }

void drop_notes(Region& r) {
  if (c.last == &r) c.last = nullptr;
  unmap(r);
}

void touched(const void* p, size_t bytes, Access kind, const Site& site) {
  if (m.owner != __builtin_thread_pointer()) return;
  auto at = static_cast<const char*>(p);
  if (uninteresting(at)) return;
  Event e{at, bytes, kind, place_number(site)};
  if ((bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(at) % bytes) misaligned(e);
  check_access(e);
}

// ---- what the runtime tells

void check_launch_start() {
  if (c.now > 0xf0000000) start_again();
  c.launch_start = ++c.now;
  c.blocks.clear();
  c.releases.clear();
  c.last = nullptr;
  if (!c.dynamic.cells) {  // room for the largest
    c.dynamic.bytes = DYNAMIC_BYTES;
    cell_of(c.dynamic, first_word(c.dynamic));
    split_cells(c.dynamic, first_word(c.dynamic));
  }
  c.dynamic.start = m.dynamic;
  c.dynamic.bytes = m.dynamic_bytes;
  c.statics.resize(m.variables.size(), shared_region());
  for (size_t i = 0; i < m.variables.size(); i++) {
    c.statics[i].start = m.statics + m.variables[i].offset;
    c.statics[i].bytes = m.variables[i].bytes;
    c.statics[i].name = m.variables[i].name;
  }
}

void check_block_start() {
  c.block_start = c.barrier = ++c.now;
  c.blocks.push_back({c.now, m.block});
  c.acquires.clear();
  c.fenced = false;
}

void check_block_end() {
  if (profiling()) profile_block_end();
  for (unsigned i = 0; i < m.n; i++) {
    const Thread& t = m.threads[i];
    if (t.first_copy < 0) continue;
    m.failure.happened = true;
    m.failure.text = "copy never waited for in " + m.kernel + ": the cp.async at " + place(m.copies[t.first_copy].site) +
                     " by " + thread_name(i, m.block) + " is still under way when the block ends";
    return;
  }
}

void check_barrier() { c.barrier = ++c.now; }

void check_sync_warp(unsigned warp, unsigned mask) {
  uint32_t joined[32] = {}, now = ++c.now;
  auto& clocks = c.clocks[warp];
  for (unsigned k = mask; k; k &= k - 1) {
    int lane = __builtin_ctz(k);
    for (int l = 0; l < 32; l++) joined[l] = std::max(joined[l], clocks[lane][l]);
  }
  for (unsigned k = mask; k; k &= k - 1) joined[__builtin_ctz(k)] = now;
  for (unsigned k = mask; k; k &= k - 1) memcpy(clocks[__builtin_ctz(k)], joined, sizeof joined);
}

void check_fence() {
  c.fences[m.current->number] = ++c.now;
  c.fenced = true;
}

void check_atomic(void* p, size_t bytes, const Site& site) {
  touched(p, bytes, Access::atomic, site);
  Quiet quiet;
  auto found = c.releases.find(p);
  if (found != c.releases.end()) c.acquires.push_back({p, found->second.size(), m.current->number, c.now});
  if (!c.fenced) return;
  Release r{c.now, c.barrier, c.block_start, m.current->number, {c.fences, c.fences + m.n}};
  c.releases[p].push_back(std::move(r));
  c.now++;
}

void check_copy_start(void* to, size_t bytes, const void* from, size_t source_bytes, const Site& site) {
  if (source_bytes) touched(from, source_bytes, Access::read, site);
  touched(to, bytes, Access::write, site);
  Region* r = find_region(static_cast<char*>(to));
  each_cell(*r, static_cast<char*>(to), bytes, [](Cell& cell) { cell.write.who |= Note::IN_FLIGHT; });
}

void check_copy_end(void* to, size_t bytes, const Site&) {
  Region* r = find_region(static_cast<char*>(to));
  each_cell(*r, static_cast<char*>(to), bytes, [](Cell& cell) {
    cell.write.who &= uint16_t(~Note::IN_FLIGHT);
    cell.write.time = c.now;
  });
}

void check_set_by_host(void* p, size_t bytes) {
  for (auto& [start, r] : m.regions) {
    char *from = std::max(start, static_cast<char*>(p)), *to = std::min(start + r.bytes, static_cast<char*>(p) + bytes);
    if (!r.undefined || from >= to) continue;
    each_cell(r, from, size_t(to - from), [](Cell& cell) {
      if (!cell.write.time) cell.write.time = 1;
    });
  }
}

}  // namespace minidiff::emulator

// ---- what the compiler calls

namespace emulator = minidiff::emulator;
using emulator::Access;

#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define HOOK __attribute__((visibility("hidden"))) void
#define HOOKS(n)                                                                                                     \
  HOOK __tsan_read##n(void* p) { emulator::access(p, n, Access::read, CALLER, true); }                               \
  HOOK __tsan_write##n(void* p) { emulator::access(p, n, Access::write, CALLER, true); }                             \
  HOOK __tsan_unaligned_read##n(void* p) { emulator::access(p, n, Access::read, CALLER, false); }                    \
  HOOK __tsan_unaligned_write##n(void* p) { emulator::access(p, n, Access::write, CALLER, false); }                  \
  HOOK __tsan_volatile_read##n(void* p) { emulator::access(p, n, Access::unordered_read, CALLER, true); }            \
  HOOK __tsan_volatile_write##n(void* p) { emulator::access(p, n, Access::atomic, CALLER, true); }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK __tsan_read_range(void* p, size_t n) { emulator::access(p, n, Access::read, CALLER, false); }
HOOK __tsan_write_range(void* p, size_t n) { emulator::access(p, n, Access::write, CALLER, false); }
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_init() {}
HOOK __tsan_vptr_update(void*, void*) {}
HOOK __tsan_vptr_read(void*) {}

// The C++ atomics of host code in a kernel's file are what they are without the checked build.
#define HIDDEN(T) __attribute__((visibility("hidden"))) T
#define ATOMICS(bits, T)                                                                                              \
  HIDDEN(T) __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, 5); }                    \
  HIDDEN(void) __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, 5); }                    \
  HIDDEN(T) __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, 5); }          \
  HIDDEN(T) __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, 5); }          \
  HIDDEN(T) __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, 5); }          \
  HIDDEN(int) __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* old, T v, int, int) {                   \
    return __atomic_compare_exchange_n(p, old, v, false, 5, 5);                                                       \
  }                                                                                                                   \
  HIDDEN(int) __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* old, T v, int, int) {                     \
    return __atomic_compare_exchange_n(p, old, v, true, 5, 5);                                                        \
  }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
HIDDEN(void) __tsan_atomic_thread_fence(int) { __atomic_thread_fence(5); }
}
