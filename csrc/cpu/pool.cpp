// The pool: workers that wait a little while awake, then sleep.
//
//   caller:  write the job, publish (number, next task = 0), take tasks like the others, wait until all are done
//   worker:  see a new number, take tasks one by one, go back to waiting
//
// Workers are kept off the caller's core: left to itself Linux likes to wake a worker beside the caller, on the same core,
// and to leave it there, where two threads are no faster than one.
//
// A task is taken by moving `ticket`, (job number << 32 | next task), one on with compare-and-swap, so that a worker
// which wakes late finds either a task of the job whose fields it has just read, or nothing.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() {}
#endif

namespace minidiff {
namespace {

using Call = void (*)(void*, int, int);

thread_local int lanes = 1;  // of the call that this thread is in

struct Pool {
  std::mutex busy;  // held by the caller whose job runs
  std::atomic<int> wanted{0};  // threads, the caller among them
  int started = 0;             // workers

  std::atomic<uint64_t> ticket{0};
  std::atomic<Call> call{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<int> tasks{0};
  std::atomic<int> limit{0};  // workers that may help with this job
  std::atomic<int> done{0};

  static constexpr int WATCHED = 64;
  std::vector<pthread_t> workers;
  std::atomic<int> core_of[WATCHED] = {};  // of each worker when it last took a job, + 1
  int avoided = -1;                        // the core that the workers keep away from

  static int this_core() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
  }

  // Whether a worker took its last job on this core.
  bool crowded(int core) const {
    for (int lane = 1; lane <= started && lane < WATCHED; lane++)
      if (core_of[lane].load(std::memory_order_relaxed) == core + 1) return true;
    return false;
  }

  // From now on the workers may run on every core of this process but this one.
  void avoid(int core) {
#if defined(__linux__)
    cpu_set_t cores;
    avoided = core;
    if (sched_getaffinity(0, sizeof(cores), &cores)) return;
    CPU_CLR(core, &cores);
    if (CPU_COUNT(&cores) == 0) return;
    for (pthread_t worker : workers) pthread_setaffinity_np(worker, sizeof(cores), &cores);
    for (auto& place : core_of) place.store(0, std::memory_order_relaxed);
#endif
  }

  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<int> sleeping{0};

  void take_tasks(uint64_t seen, int lane) {
    for (;;) {
      Call f = call.load(std::memory_order_acquire);  // whoever sees a later job's fields also sees that this one is closed
      void* c = context.load(std::memory_order_acquire);
      int n = tasks.load(std::memory_order_acquire);
      if ((int)(seen & 0xffffffff) >= n || lane > limit.load(std::memory_order_acquire)) return;
      uint64_t now = seen;
      if (ticket.compare_exchange_weak(now, seen + 1, std::memory_order_acq_rel)) {
        f(c, (int)(seen & 0xffffffff), lane);
        done.fetch_add(1, std::memory_order_release);
        now = ticket.load(std::memory_order_acquire);
      }
      if (now >> 32 != seen >> 32) return;
      seen = now;
    }
  }

  void work(int lane) {
    uint64_t job = 0;
    for (;;) {
      uint64_t seen = wait_for_job(job);
      job = seen >> 32;
      int core = this_core() + 1;
      if (lane < WATCHED && core_of[lane].load(std::memory_order_relaxed) != core)
        core_of[lane].store(core, std::memory_order_relaxed);
      take_tasks(seen, lane);
    }
  }

  uint64_t wait_for_job(uint64_t last) {
    auto since = std::chrono::steady_clock::now();
    for (int i = 1;; i++) {
      uint64_t seen = ticket.load(std::memory_order_acquire);
      if (seen >> 32 != last) return seen;
      relax();
      if (i % 64 == 0) std::this_thread::yield();  // whoever else wants the core may have it
      if (i % 256 == 0 && std::chrono::steady_clock::now() - since > std::chrono::microseconds(200)) break;
    }
    std::unique_lock<std::mutex> lock(sleep);
    sleeping.fetch_add(1);
    wake.wait(lock, [&] { return ticket.load() >> 32 != last; });
    sleeping.fetch_sub(1);
    return ticket.load(std::memory_order_acquire);
  }

  void run(int n, Call f, void* c) {
    int helpers = lanes - 1;
    if (n < 2 || helpers < 1 || !busy.try_lock()) {
      for (int i = 0; i < n; i++) f(c, i, 0);
      return;
    }
    while (started < helpers) {
      int lane = ++started;
      std::thread worker([this, lane] { work(lane); });
      workers.push_back(worker.native_handle());
      worker.detach();
      avoided = -1;
    }
    int core = this_core();
    if (core >= 0 && (avoided < 0 || crowded(core) || (core != avoided && sleeping.load() > 0))) avoid(core);
    uint64_t job = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
    ticket.store(job << 32 | 0x7fffffff, std::memory_order_seq_cst);  // nobody takes a task while the fields change
    call.store(f, std::memory_order_release);
    context.store(c, std::memory_order_release);
    tasks.store(n, std::memory_order_release);
    limit.store(helpers, std::memory_order_release);
    done.store(0, std::memory_order_relaxed);
    job++;
    ticket.store(job << 32, std::memory_order_seq_cst);
    if (sleeping.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep);
      wake.notify_all();
    }
    take_tasks(job << 32, 0);
    for (int i = 1; done.load(std::memory_order_acquire) < n; i++) {
      relax();
      if (i % 64 == 0) std::this_thread::yield();
    }
    busy.unlock();
  }
};

Pool* pool = new Pool;  // never destroyed: its threads may outlive main

// A child process has none of its parent's threads.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  int wanted = pool->wanted;
  pool = new Pool;
  pool->wanted = wanted;
});

struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  ~Scratch();
};
std::atomic<size_t> scratch_total{0};
thread_local Scratch mine;
constexpr size_t HUGE_PAGE = 2u << 20;

Scratch::~Scratch() {
#if defined(__SANITIZE_ADDRESS__)
  free(data);
#else
  if (data) munmap(data, size);
#endif
  scratch_total -= size;
}

}  // namespace

int wanted_threads() { return std::max(1, pool->wanted.load()); }
ThreadsOfCall::ThreadsOfCall() { lanes = wanted_threads(); }
int num_threads() { return lanes; }
void set_num_threads(int n) { pool->wanted = n < 1 ? 1 : n; }
void run_tasks(int tasks, Call call, void* context) { pool->run(tasks, call, context); }

#if defined(__SANITIZE_ADDRESS__)  // a block of exactly the size asked for, so that a step past its end is seen
float* scratch(size_t floats) {
  free(mine.data);
  mine.data = (char*)aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
  return (float*)mine.data;
}
#else
float* scratch(size_t floats) {
  size_t bytes = (floats * sizeof(float) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  if (bytes > mine.size) {
    if (mine.data) munmap(mine.data, mine.size);
    scratch_total -= mine.size;
    mine.data = nullptr, mine.size = 0;
    char* p = (char*)mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    char* start = (char*)(((uintptr_t)p + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
    if (start > p) munmap(p, start - p);
    if (start + bytes < p + bytes + HUGE_PAGE) munmap(start + bytes, p + HUGE_PAGE - start);
#ifdef MADV_HUGEPAGE
    madvise(start, bytes, MADV_HUGEPAGE);
#endif
    mine.data = start, mine.size = bytes;
    scratch_total += bytes;
  }
  return (float*)mine.data;
}
#endif
size_t scratch_bytes() { return scratch_total; }

}  // namespace minidiff
