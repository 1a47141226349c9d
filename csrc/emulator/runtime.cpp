// The scheduler. A block's threads are fibers; `ready` holds a bit for each that can run. A thread runs until it waits:
//
//   barrier       counts; the last of the block's living threads sets all ready again
//   collective    of a warp's lanes; the last of the mask computes for all, through the records on their stacks
//   yield         in a loop that waits for another thread: the next ready thread runs, in turn
//
// Stacks are lazy. A thread that ends hands its stack to one that has not started, so a kernel without barriers runs on
// one stack and never switches. Whatever goes wrong in a fiber ends in leave_fibers: all fibers are abandoned (kernels own
// nothing that would have to be freed), and launch() throws on the stack of its caller.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>
#include <stdexcept>

#include "fiber.h"
#include "state.h"

namespace minidiff::emulator {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
Machine machine;

namespace {

Machine& m = machine;

// ---- turns

unsigned random_below(unsigned n) {
  m.random ^= m.random << 13;
  m.random ^= m.random >> 7;
  m.random ^= m.random << 17;
  return unsigned((m.random >> 32) * n >> 32);
}

unsigned pick_bit(unsigned bits) {
  if (m.options.order == Order::forward) return unsigned(__builtin_ctz(bits));
  if (m.options.order == Order::reverse) return 31 - unsigned(__builtin_clz(bits));
  for (unsigned skip = random_below(unsigned(__builtin_popcount(bits))); skip; skip--) bits &= bits - 1;
  return unsigned(__builtin_ctz(bits));
}

void set_ready(unsigned warp, unsigned lanes) {
  m.warps[warp].ready |= lanes;
  m.ready_warps |= 1u << warp;
}

Thread* take(unsigned warp, unsigned lane) {
  Warp& w = m.warps[warp];
  w.ready &= ~(1u << lane);
  if (!w.ready) m.ready_warps &= ~(1u << warp);
  return &m.threads[warp * 32 + lane];
}

// Preferably of the same warp, whose stacks are in the cache; the random order now and then goes elsewhere.
Thread* pick(unsigned warp) {
  bool stay = m.warps[warp].ready && !(m.options.order == Order::random && random_below(8) == 0);
  if (!stay) {
    if (!m.ready_warps) return nullptr;
    warp = pick_bit(m.ready_warps);
  }
  return take(warp, pick_bit(m.warps[warp].ready));
}

// The next in turn after this one, so that among waiting threads everybody gets to run.
Thread* pick_after(const Thread& t) {
  auto above = [](unsigned bits, unsigned i) { return i == 31 ? 0 : bits & ~((2u << i) - 1); };
  if (unsigned later = above(m.warps[t.warp].ready, t.lane)) return take(t.warp, unsigned(__builtin_ctz(later)));
  unsigned later = above(m.ready_warps, t.warp), any = later ? later : m.ready_warps;
  unsigned warp = unsigned(__builtin_ctz(any));
  return take(warp, unsigned(__builtin_ctz(m.warps[warp].ready)));
}

void run_thread();

char* stack_start(int stack) { return m.stacks + size_t(stack) * STACK_BYTES; }

void start(Thread& t) {
  t.stack = m.free_stacks[--m.n_free];
  // staggered, else all stacks' ends fall into the same sets of the cache
  t.top = new_fiber(stack_start(t.stack) + STACK_BYTES - size_t(t.stack % 29) * 192, run_thread);
}

[[noreturn]] void stalled(const char* why) {
  m.owner = nullptr;
  fail(std::string("no progress in ") + m.kernel + ": " + why + where_threads_are());
}

void resume(Thread* next) {
  Thread* me = m.current;
  if (next->stack < 0) start(*next);
  m.current = next;
  threadIdx = next->index;
  m.count->switches++;
  if (__builtin_expect(m.expired, 0)) stalled("nothing has happened for too long");
  switch_fiber(&me->top, &next->top);
}

[[noreturn]] void deadlock() {
  m.owner = nullptr;
  fail("deadlock in " + m.kernel + ": no thread can go on" + where_threads_are());
}

void wait_for_others() {
  Thread* next = pick(m.current->warp);
  if (!next) deadlock();
  if (next != m.current) resume(next);
  m.current->state = Thread::ready;
}

// ---- barriers

[[noreturn]] void barrier_divergence(const std::string& why) {
  fail("barrier divergence in " + m.kernel + ": " + why + where_threads_are());
}

void release_barrier() {
  Quiet quiet;  // std::string's functions may be those that were compiled with the kernels
  if (m.divergent) barrier_divergence("threads of one block wait at different barriers");
  if (m.returned && !m.options.early_return)
    barrier_divergence(std::to_string(m.returned) + " threads returned before a barrier that the others wait at");
  for (unsigned w = 0; w < m.n_warps; w++) {
    if (m.warps[w].at_barrier) set_ready(w, m.warps[w].at_barrier);
    m.warps[w].at_barrier = 0;
  }
  m.last_votes = m.votes;
  m.waiting = 0;
  m.progress = m.progress + 1;
  m.count->barriers++;
  note_sync(m.barrier_site);
  if (m.checked) check_barrier();
}

// ---- threads

void run_body() {
  std::string thrown;
  try {
    return m.launch->body(m.launch->arguments);
  } catch (const std::exception& e) {
    m.owner = nullptr;
    thrown = e.what();
  }
  fail("exception in " + m.kernel + ", " + thread_name(m.current->number, m.block) + ": " + thrown);
}

void finish_thread() {
  Thread& t = *m.current;
  t.state = Thread::done;
  m.warps[t.warp].done |= 1u << t.lane;
  m.live--;
  m.returned++;
  m.progress = m.progress + 1;
  if (m.live && m.waiting == m.live) release_barrier();
  void* nobody;
  if (!m.live) switch_fiber(&nobody, &m.main);
}

// What a fiber does. Where the next thread has not started, it goes on with that one on the same stack.
void run_thread() {
  for (;;) {
    run_body();
    finish_thread();
    Thread& t = *m.current;
    Thread* next = pick(t.warp);
    if (!next) deadlock();
    if (next->stack >= 0) {
      m.free_stacks[m.n_free++] = t.stack;
      resume(next);
    }
    next->stack = t.stack;
    m.current = next;
    threadIdx = next->index;
  }
}

// ---- launches

void map_memory() {
  auto map = [](size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("the emulator finds no memory for its threads' stacks");
    return static_cast<char*>(p);
  };
  if (!m.stacks) {
    m.stacks = map(STACK_BYTES * MAX_THREADS);
    for (int i = 0; i < MAX_THREADS; i++) mprotect(stack_start(i), PAGE, PROT_NONE);
  }
  if (!m.dynamic_map) {
    m.dynamic_map = map(DYNAMIC_BYTES + PAGE);
    mprotect(m.dynamic_map + DYNAMIC_BYTES, PAGE, PROT_NONE);
  }
}

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string configuration(const Launch& l) {
  return "launched with grid " + text(l.grid) + ", block " + text(l.block) + ", " + std::to_string(l.shared_bytes) +
         " bytes of dynamic shared memory";
}

std::string bare_name(const char* name) {
  std::string s = name;
  return s.size() > 1 && s.front() == '(' && s.back() == ')' ? s.substr(1, s.size() - 2) : s;
}

[[noreturn]] void refuse(const Launch& l, const std::string& why) {
  throw std::runtime_error("invalid launch configuration of " + m.kernel + ": " + why + "; " + configuration(l));
}

// Static and dynamic shared memory together may be more than what every kernel has only where somebody asked.
void check_shared_memory(const Launch& l, size_t static_bytes) {
  const cudaDeviceProp& device = m.options.device;
  auto asked = m.allowed_dynamic.find(l.function);
  bool allowed = asked != m.allowed_dynamic.end() && l.shared_bytes <= asked->second;
  size_t most = allowed ? device.sharedMemPerBlockOptin : device.sharedMemPerBlock;
  if (static_bytes + l.shared_bytes <= most) return;
  refuse(l, std::string(allowed ? "the device has" : "without cudaFuncSetAttribute a kernel has") + " at most " +
                std::to_string(most) + " bytes of shared memory for a block, and the kernel's static variables " +
                "take " + std::to_string(static_bytes));
}

// The static shared variables that a block has written to.
size_t written_statics() {
  size_t bytes = 0;
  for (const SharedVariable& v : m.variables) {
    const char* p = m.statics + v.offset;
    bool poison = !v.bytes || (*p == char(0xff) && !memcmp(p, p + 1, v.bytes - 1));
    if (!poison) bytes += v.bytes;
  }
  return bytes;
}

void check_configuration(const Launch& l) {
  const cudaDeviceProp& device = m.options.device;
  uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  std::string why;
  if (!threads || threads > uint64_t(device.maxThreadsPerBlock) || threads > MAX_THREADS || l.block.z > 64)
    why = "a block has between 1 and " + std::to_string(device.maxThreadsPerBlock) + " threads, at most 64 in z";
  else if (!l.grid.x || !l.grid.y || !l.grid.z || l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535)
    why = "a grid has between 1 and 2147483647 blocks in x, and between 1 and 65535 in y and in z";
  if (!why.empty()) refuse(l, why);
  check_shared_memory(l, 0);
}

void count_launch(const Launch& l) {
  auto [found, added] = m.count_of.try_emplace(m.kernel, m.counts.size());
  if (added) m.counts.emplace_back().kernel = m.kernel;
  m.count = &m.counts[found->second];
  m.count->launches++;
  m.count->blocks += uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  m.count->threads += uint64_t(l.grid.x) * l.grid.y * l.grid.z * m.n;
}

void prepare_threads(dim3 block) {
  m.n_warps = (m.n + 31) / 32;
  m.ready_warps = 0;
  m.live = m.n;
  m.waiting = m.returned = 0;
  m.divergent = false;
  std::fill(m.warps, m.warps + m.n_warps, Warp{});
  uint3 index = {};
  for (unsigned i = 0; i < m.n; i++) {
    Thread& t = m.threads[i] = Thread{};
    t.index = index;
    t.number = uint16_t(i);
    t.warp = uint16_t(i / 32);
    t.lane = uint16_t(i % 32);
    m.warps[t.warp].exists |= 1u << t.lane;
    if (++index.x < block.x) continue;
    index.x = 0;
    if (++index.y < block.y) continue;
    index.y = 0;
    index.z++;
  }
  for (unsigned w = 0; w < m.n_warps; w++) set_ready(w, m.warps[w].exists);
  for (m.n_free = 0; m.n_free < MAX_THREADS; m.n_free++) m.free_stacks[m.n_free] = MAX_THREADS - 1 - m.n_free;
  m.copies.clear();
  m.free_copy = -1;
}

void poison_shared_memory() {  // all bits set: NaN as float, half and bfloat16
  if (!m.options.poison) return;
  if (m.dynamic_bytes) memset(m.dynamic, 0xff, m.dynamic_bytes);
  for (const SharedVariable& v : m.variables) memset(m.statics + v.offset, 0xff, v.bytes);
}

void run_block(const Launch& l, uint64_t block) {
  m.block = block;
  blockIdx = {unsigned(block % l.grid.x), unsigned(block / l.grid.x % l.grid.y), unsigned(block / l.grid.x / l.grid.y)};
  prepare_threads(l.block);
  poison_shared_memory();
  if (m.checked) check_block_start();
  Thread* first = pick(m.options.order == Order::reverse ? m.n_warps - 1 : 0);
  start(*first);
  m.current = first;
  threadIdx = first->index;
  m.owner = __builtin_thread_pointer();
  switch_fiber(&m.main, &first->top);
  m.owner = nullptr;
  if (m.checked && !m.failure.happened) check_block_end();
  m.current = nullptr;
}

// The k-th block to run: in the random order k * step + first, where step and the number have no common divisor.
uint64_t block_in_order(uint64_t k, uint64_t blocks, uint64_t step, uint64_t first) {
  if (m.options.order == Order::forward) return k;
  if (m.options.order == Order::reverse) return blocks - 1 - k;
  return uint64_t(((unsigned __int128)k * step + first) % blocks);
}

void run_grid(const Launch& l) {
  uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  m.random = m.options.seed * 2654435761u + 88172645463325252u;
  uint64_t step = random_below(1u << 20) | 1, first = random_below(1u << 20);
  while (std::gcd(step, blocks) != 1) step += 2;
  for (uint64_t k = 0; k < blocks && !m.failure.happened; k++) {
    run_block(l, block_in_order(k, blocks, step, first));
    if (!k && m.options.poison && !m.failure.happened) check_shared_memory(l, written_statics());
  }
}

void replace(std::string& s, const std::string& mark, uintptr_t pc) {
  size_t at = s.find(mark);
  if (at != std::string::npos) s.replace(at, mark.size(), places_of({pc})[0].text);
}

[[noreturn]] void report_failure(const Launch& l) {
  Failure f = m.failure;
  replace(f.text, "{pc}", f.pc);
  replace(f.text, "{other}", f.other_pc);
  throw std::runtime_error(f.text + "\n  " + configuration(l));
}

}  // namespace

void launch(const Launch& l) {
  std::lock_guard<std::mutex> guard(m.lock);
  m.kernel = bare_name(l.kernel);
  check_configuration(l);
  map_memory();
  find_statics();
  m.launch = &l;
  m.failure = {};
  m.expired = false;
  m.turns_in_vain = 0;
  m.last_access = 0;
  m.checked = l.checked;
  m.ever_checked |= l.checked;
  m.n = l.block.x * l.block.y * l.block.z;
  m.dynamic_bytes = l.shared_bytes;
  m.dynamic = m.dynamic_map + DYNAMIC_BYTES - (l.shared_bytes + 127) / 128 * 128;  // flush against the guard page
  gridDim = l.grid;
  blockDim = l.block;
  count_launch(l);
  {
    FaultGuard faults;
    if (m.checked) check_launch_start();
    run_grid(l);
  }
  m.current = nullptr;
  if (m.failure.happened) report_failure(l);
}

void leave_fibers() {
  m.owner = nullptr;
  m.failure.happened = true;
  void* nobody;
  switch_fiber(&nobody, &m.main);
  __builtin_unreachable();
}

void fail(const std::string& text) {
  m.owner = nullptr;
  m.failure.text = text;
  leave_fibers();
}

// ---- names

std::string base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string place(const Site& s) { return base_name(s.file) + ":" + std::to_string(s.line); }

std::string thread_name(unsigned number, uint64_t block) {
  dim3 b = blockDim, g = gridDim;
  dim3 t(number % b.x, number / b.x % b.y, number / b.x / b.y);
  dim3 k(unsigned(block % g.x), unsigned(block / g.x % g.y), unsigned(block / g.x / g.y));
  return "thread " + text(t) + " of block " + text(k);
}

// One line for each run of neighbours that wait for the same.
std::string where_threads_are() {
  std::string out = ", in block " + text(dim3(blockIdx));
  auto alike = [](const Thread& a, const Thread& b) {
    return a.state == b.state && a.site.line == b.site.line && a.site.what == b.site.what && a.mask == b.mask &&
           (a.stack < 0) == (b.stack < 0) && (&a == m.current) == (&b == m.current);
  };
  for (unsigned i = 0, j; i < m.n; i = j) {
    const Thread& a = m.threads[i];
    for (j = i + 1; j < m.n && alike(m.threads[j], a); j++) {
    }
    out += j == i + 1 ? "\n  thread " + std::to_string(i) : "\n  threads " + std::to_string(i) + "-" + std::to_string(j - 1);
    char mask[32];
    snprintf(mask, sizeof mask, ", mask %08x", a.mask);
    std::string site = a.site.what ? std::string(a.site.what) + " at " + place(a.site) : "";
    if (a.state == Thread::done) out += ": returned";
    else if (a.state == Thread::at_barrier) out += ": in " + site;
    else if (a.state == Thread::at_warp) out += ": in " + site + mask;
    else if (a.stack < 0) out += ": not started";
    else if (&a == m.current) out += ": running" + (site.empty() ? "" : ", last in " + site);
    else out += ": can run" + (site.empty() ? "" : ", last in " + site);
  }
  return out;
}

// ---- what kernels call

void* dynamic_shared() { return m.dynamic; }

bool is_shared(const void* p) {
  const char* c = static_cast<const char*>(p);
  if (c >= m.dynamic && c < m.dynamic + m.dynamic_bytes) return true;
  for (const SharedVariable& v : m.variables)
    if (c >= m.statics + v.offset && c < m.statics + v.offset + v.bytes) return true;
  return false;
}

unsigned lane() { return m.current->lane; }

unsigned live_lanes() {
  const Warp& w = m.warps[m.current->warp];
  return w.exists & ~w.done;
}

long long clock() {
#if defined(__x86_64__)
  return (long long)__builtin_ia32_rdtsc();
#else
  return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

void fence() {
  if (m.checked) check_fence();
}

void fail_here(const Site& s, const char* what) {
  if (!m.current || (m.owner && m.owner != __builtin_thread_pointer())) {
    fprintf(stderr, "%s at %s: %s\n", s.what, place(s).c_str(), what);
    abort();
  }
  m.owner = nullptr;
  fail(std::string(s.what) + " at " + place(s) + " in " + m.kernel + ", " + thread_name(m.current->number, m.block) +
       ": " + what);
}

void yield(const Site& site) {
  static uint64_t seen;
  Thread& me = *m.current;
  me.site = site;
  if (seen != m.progress) {
    seen = m.progress;
    m.turns_in_vain = 0;
  }
  if (++m.turns_in_vain > m.options.stall_turns && m.options.stall_turns)
    stalled("waiting threads had all these turns in vain (options: stall_turns)");
  if (m.expired) stalled("nothing has happened for too long");
  if (!m.ready_warps) return;
  Thread* next = pick_after(me);
  set_ready(me.warp, 1u << me.lane);
  resume(next);
}

void before_atomic(void* p, size_t bytes, bool checked, const Site& site) {
  if (checked) check_atomic(p, bytes, site);
  if (++m.atomics_in_a_row < 1000) return;  // perhaps it waits for somebody
  m.atomics_in_a_row = 0;
  yield(site);
}

Votes barrier(const Site& site, bool predicate) {
  if (__builtin_expect(!m.skipped.empty(), 0) && is_skipped(site)) return {};
  Thread& t = *m.current;
  t.site = site;
  t.mask = 0;
  t.state = Thread::at_barrier;
  m.warps[t.warp].at_barrier |= 1u << t.lane;
  if (!m.waiting++) {
    m.barrier_site = site;
    m.divergent = false;
    m.votes = {1, 0, 0};
  } else if (site.line != m.barrier_site.line || site.file != m.barrier_site.file) {
    m.divergent = true;
  }
  m.votes.all &= predicate;
  m.votes.any |= predicate;
  m.votes.count += predicate;
  if (m.waiting == m.live) release_barrier();
  wait_for_others();
  return m.last_votes;
}

namespace {

bool same_instruction(const Site& a, const Site& b) { return a.what == b.what || !strcmp(a.what, b.what); }

[[noreturn]] __attribute__((cold)) void bad_mask(const Site& s, unsigned mask, const char* why) {
  m.owner = nullptr;
  m.current->site = s;
  m.current->mask = mask;
  fail("warp divergence in " + m.kernel + ": " + thread_name(m.current->number, m.block) + " calls " + s.what + " at " +
       place(s) + ", " + why + where_threads_are());
}

}  // namespace

void outside_mask(const Site& s, unsigned mask, int lane) {
  m.owner = nullptr;
  std::string why = "which reads lane " + std::to_string(lane) + ", not in the mask";
  bad_mask(s, mask, why.c_str());
}

namespace {

// The lanes' records, in `records`; they must all be in this instruction, with this mask.
inline void gather(void** records, const Site& site, unsigned mask, bool same_line) {
  const Thread* lanes = m.current - m.current->lane;
  for (unsigned k = mask; k; k &= k - 1) {
    const Thread& other = lanes[__builtin_ctz(k)];
    if (__builtin_expect(other.mask != mask || !same_instruction(other.site, site), 0))
      bad_mask(site, mask, "but other lanes of the mask are in another instruction");
    if (__builtin_expect(same_line && other.site.line != site.line, 0))
      bad_mask(site, mask, "but other lanes are in another line: it wants all in the same");
    records[__builtin_ctz(k)] = other.record;
  }
}

inline void meet(const Site& site, unsigned mask, void* record, Compute compute, bool same_line) {
  Thread& t = *m.current;
  Warp& w = m.warps[t.warp];
  unsigned self = 1u << t.lane;
  mask &= w.exists;  // of a short last warp
  if (__builtin_expect(!(mask & self), 0)) bad_mask(site, mask, "but is not in the mask itself");
  if (__builtin_expect(mask & w.done, 0)) bad_mask(site, mask, "whose mask names lanes that have returned");
  t.site = site;
  t.mask = mask;
  t.record = record;
  w.at_warp |= self;
  if ((w.at_warp & mask) != mask) {
    t.state = Thread::at_warp;
    return wait_for_others();
  }
  void* records[32];
  gather(records, site, mask, same_line);
  if (compute) {
    Quiet quiet;  // it may be compiled with the kernel, and reads other threads' stacks
    compute(records, mask, site);
  }
  m.progress = m.progress + 1;
  m.count->collectives++;
  w.at_warp &= ~mask;
  if (mask &= ~self) set_ready(t.warp, mask);
}

}  // namespace

void collective(const Site& site, unsigned mask, void* record, Compute compute) {
  meet(site, mask, record, compute, false);
}

void whole_warp(const Site& site, void* record, Compute compute) {
  if (m.warps[m.current->warp].exists != ~0u) bad_mask(site, ~0u, "which wants all 32 lanes, but this warp has fewer");
  meet(site, ~0u, record, compute, true);
}

void sync_warp(const Site& site, unsigned mask) {
  if (__builtin_expect(!m.skipped.empty(), 0) && is_skipped(site)) return;
  collective(site, mask, nullptr, [](void* const*, unsigned members, const Site& s) {
    note_sync(s);
    if (m.checked) check_sync_warp(m.current->warp, members);
  });
}

// ---- for tests

bool is_skipped(const Site& s) {
  Quiet quiet;
  for (const auto& [file, line] : m.skipped)
    if (line == s.line && file == base_name(s.file)) return true;
  return false;
}

void note_sync(const Site& s) {
  Quiet quiet;
  auto& point = m.sync_points[{s.file, s.line}];
  point.first = s;
  point.second++;
}

std::vector<SyncPoint> sync_points() {
  std::lock_guard<std::mutex> guard(m.lock);
  std::vector<SyncPoint> points;
  for (const auto& [key, point] : m.sync_points) {
    const Site& s = point.first;
    points.push_back({s.what, base_name(s.file), s.line, point.second});
  }
  return points;
}

void skip_sync(const std::string& file, int line) {
  std::lock_guard<std::mutex> guard(m.lock);
  if (file.empty()) return m.skipped.clear();
  bool known = std::any_of(m.sync_points.begin(), m.sync_points.end(), [&](const auto& point) {
    return point.first.second == line && base_name(point.first.first) == file;
  });
  if (!known)
    throw std::invalid_argument("no kernel that ran has synchronised at " + file + ":" + std::to_string(line) +
                                "; sync_points() lists where");
  m.skipped.push_back({file, line});
}

Options options() {
  std::lock_guard<std::mutex> guard(m.lock);
  return m.options;
}

void set_options(const Options& o) {
  if (o.device.sharedMemPerBlockOptin > DYNAMIC_BYTES)
    throw std::invalid_argument("the pretended device has at most " + std::to_string(DYNAMIC_BYTES) +
                                " bytes of shared memory for a block");
  std::lock_guard<std::mutex> guard(m.lock);
  m.options = o;
}

bool checked() { return m.ever_checked; }

std::vector<Count> counts() {
  std::lock_guard<std::mutex> guard(m.lock);
  return m.counts;
}

void reset_counts() {
  std::lock_guard<std::mutex> guard(m.lock);
  m.counts.clear();
  m.count_of.clear();
  m.sync_points.clear();
}

}  // namespace minidiff::emulator
