// What the module knows of the device: its abilities, the stream of the present call, memory to work in.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <mutex>

namespace minidiff::cuda {

// What every call from Python holds while it runs, after it has released Python's lock: launches of two ops that share a
// stream's workspace do not mix, whichever threads they come from.
class Call {
  static inline std::mutex one_at_a_time;
  std::lock_guard<std::mutex> guard{one_at_a_time};

 public:
  Call();
  ~Call();
};

// The stream of this thread's calls from now on.
void set_stream(uintptr_t);

// What one of the modules offers besides; the emulator's settings and reports, where it is one.
void bind_device(pybind11::module_& m);

}  // namespace minidiff::cuda
