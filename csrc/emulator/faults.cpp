// A kernel that touches memory nobody has, divides by zero, runs out of stack or never ends must not take Python with it.
// While a kernel runs, the signals of such faults are ours: the handler, on a stack of its own, notes what happened and
// goes straight to the launching thread's stack. The watchdog is a timer of that thread; its signal, SIGVTALRM, passes
// through gdb unnoticed.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>

#include "state.h"

namespace minidiff::emulator {
namespace {

Machine& m = machine;

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
constexpr size_t HANDLER_STACK = 64 << 10;
constexpr double TICK = 0.25;  // seconds

uint64_t progress_seen;
int quiet_ticks;

uintptr_t program_counter(void* context) {
  const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return uintptr_t(registers.gregs[REG_RIP]);
#else
  return uintptr_t(registers.pc);
#endif
}

bool in_this_library(uintptr_t pc) {
  auto p = reinterpret_cast<const char*>(pc);
  return p >= m.image_start && p < m.image_end;
}

bool ours() { return m.current && m.owner == __builtin_thread_pointer(); }

std::string what_lies_at(const char* p) {
  if (p >= m.dynamic_map && p < m.dynamic_map + DYNAMIC_BYTES + PAGE)
    return "out of bounds: past the end of dynamic shared memory";
  if (p >= m.stacks - (16 << 20) && p < m.stacks + STACK_BYTES * MAX_THREADS) return "the thread's stack has overflowed";
  if (p < reinterpret_cast<const char*>(PAGE)) return "null pointer";
  for (const auto& [start, region] : m.regions)
    if (p >= start && p < start + region.bytes + PAGE)
      return "out of bounds: " + std::to_string(p - start - long(region.bytes)) + " bytes past the end of " + region.name;
  return "out of bounds: memory that nobody allocated";
}

std::string what_happened(int number, const siginfo_t& info) {
  if (number == SIGFPE) return "arithmetic fault: division by zero";
  if (number == SIGILL) return "out of bounds: index beyond an array";  // -fsanitize=bounds traps with ud2
  if (info.si_code == SI_KERNEL || number == SIGBUS) return "misaligned or impossible address";
  return what_lies_at(static_cast<const char*>(info.si_addr));
}

void on_fault(int number, siginfo_t* info, void* context) {
  if (!ours()) {  // not the kernel's: as if we were not here
    signal(number, SIG_DFL);
    return;
  }
  m.owner = nullptr;
  m.failure.pc = program_counter(context);
  bool in_kernel = in_this_library(m.failure.pc) || !m.current->site.what;
  m.failure.text = what_happened(number, *info) + ", in " + m.kernel + " at " +
                   (in_kernel ? "{pc}" : place(m.current->site)) + ", " + thread_name(m.current->number, m.block);
  leave_fibers();
}

// In a debugger, where breakpoints and people take their time. (Only calls that a signal handler may make.)
bool traced() {
  char text[4096] = {};
  int file = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
  ssize_t bytes = file < 0 ? 0 : read(file, text, sizeof text - 1);
  if (file >= 0) close(file);
  const char* line = bytes > 0 ? strstr(text, "TracerPid:\t") : nullptr;
  return line && line[11] != '0';
}

void on_tick(int, siginfo_t*, void* context) {
  if (!m.current || m.options.stall_seconds <= 0) return;
  if (progress_seen != m.progress) {
    progress_seen = m.progress;
    quiet_ticks = 0;
    return;
  }
  if (++quiet_ticks * TICK < m.options.stall_seconds || traced()) return;
  m.expired = true;  // the next turn sees it; a loop that never gives up its turn is left here, if it is in the kernel
  uintptr_t pc = program_counter(context);
  if (!ours() || !in_this_library(pc)) return;
  m.owner = nullptr;
  m.failure.text = "no progress in " + m.kernel + ": nothing has happened for " + std::to_string(m.options.stall_seconds) +
                   " seconds; " + thread_name(m.current->number, m.block) + " runs at {pc}" + where_threads_are();
  m.failure.pc = m.checked ? m.last_access : pc;
  leave_fibers();
}

}  // namespace

struct FaultGuard::Saved {
  struct sigaction actions[5];
  stack_t stack;
  timer_t timer;
  bool timed;
};

FaultGuard::FaultGuard() : saved(new Saved) {
  static char handler_stack[HANDLER_STACK];
  stack_t stack = {};
  stack.ss_sp = handler_stack;
  stack.ss_size = HANDLER_STACK;
  sigaltstack(&stack, &saved->stack);
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;  // NODEFER: the handler does not return
  for (int i = 0; i < 5; i++) {
    action.sa_sigaction = SIGNALS[i] == SIGVTALRM ? on_tick : on_fault;
    sigaction(SIGNALS[i], &action, &saved->actions[i]);
  }
  progress_seen = m.progress;
  quiet_ticks = 0;
  struct sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGVTALRM;
  event._sigev_un._tid = int(syscall(SYS_gettid));
  saved->timed = m.options.stall_seconds > 0 && !timer_create(CLOCK_MONOTONIC, &event, &saved->timer);
  struct itimerspec times = {};
  times.it_interval.tv_nsec = times.it_value.tv_nsec = long(TICK * 1e9);
  if (saved->timed) timer_settime(saved->timer, 0, &times, nullptr);
}

FaultGuard::~FaultGuard() {
  if (saved->timed) timer_delete(saved->timer);
  for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &saved->actions[i], nullptr);
  sigaltstack(&saved->stack, nullptr);
  delete saved;
}

}  // namespace minidiff::emulator
