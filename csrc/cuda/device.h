// What the module knows of the device: its abilities, the stream of the present call, memory to work in.
#pragma once

#include <pybind11/pybind11.h>

namespace minidiff::cuda {

// What every call from Python holds while it runs.
struct Call {
  Call();
  ~Call();
};

// The stream, the device's abilities; and what the emulator reports, where it is one.
void bind_device(pybind11::module_& m);

}  // namespace minidiff::cuda
