// minidiff._cuda has nothing to do around a call, and offers nothing that is not in module.cpp.
#include "device.h"

namespace minidiff::cuda {

Call::Call() = default;
Call::~Call() = default;

void bind_device(pybind11::module_&) {}

}  // namespace minidiff::cuda
