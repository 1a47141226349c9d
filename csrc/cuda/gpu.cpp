// What minidiff._cuda offers beside the ops: the stream of the present call.
#include "device.h"

namespace minidiff::cuda {

void set_stream(uintptr_t);  // device.cu

Call::Call() = default;
Call::~Call() = default;

void bind_device(pybind11::module_& m) { m.def("set_stream", &set_stream); }

}  // namespace minidiff::cuda
