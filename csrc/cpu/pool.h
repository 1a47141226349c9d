// The one pool of threads, and scratch memory that outlives a call.
#pragma once

#include <cstddef>

namespace minidiff {

// How many threads share the work of calls from now on. They start with the first work for them.
void set_num_threads(int n);
int wanted_threads();

// How many share that of the present call: what was wanted when it began, also if another thread changes it meanwhile, so
// that memory for so many lanes is enough. A call from Python begins with a ThreadsOfCall.
int num_threads();
struct ThreadsOfCall {
  ThreadsOfCall();
};

// call(context, task, lane) for every task in 0..tasks-1. Lane is which of the threads runs it, 0..num_threads()-1: it
// names private scratch memory and must not change a result. Tasks go to whichever thread is free. A second caller,
// while the pool is busy, runs its own tasks itself, all in lane 0.
void run_tasks(int tasks, void (*call)(void*, int, int), void* context);

template <class F>
void parallel(int tasks, const F& f) {
  run_tasks(tasks, [](void* c, int task, int lane) { (*(const F*)c)(task, lane); }, (void*)&f);
}

// Scratch memory of the calling thread, at least this many floats, aligned to 2 MiB; valid until its next call.
float* scratch(size_t floats);
size_t scratch_bytes();  // what all threads hold

}  // namespace minidiff
