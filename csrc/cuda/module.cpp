// minidiff._cuda and minidiff._emulated: the same kernels and the same bindings, for a GPU by nvcc, or for the emulator by a
// C++ compiler.
#include "../bindings.h"
#include "device.h"
#include "ladder.h"

namespace py = pybind11;
using namespace minidiff;

namespace {

const char* name_of(cuda::Operands o) {
  return o == cuda::Operands::fp32 ? "fp32" : o == cuda::Operands::tf32 ? "tf32" : "bf16";
}

cuda::Operands operands(const std::string& name) {
  for (auto o : {cuda::Operands::fp32, cuda::Operands::tf32, cuda::Operands::bf16})
    if (name == name_of(o)) return o;
  throw std::invalid_argument("operands must be fp32, tf32 or bf16, got " + name);
}

cuda::Ladder& ladder(const std::string& op) {
  for (cuda::Ladder* l : cuda::ladders())
    if (op == l->op) return *l;
  throw std::invalid_argument("there is no ladder " + op);
}

}  // namespace

PYBIND11_MODULE(MINIDIFF_MODULE, m) {
  m.doc() = "Kernels in CUDA C++; minidiff/compiled.py calls them. csrc/ops.h says what each does.";
  bind_ops<py::gil_scoped_release, cuda::Call>(m, *kernels_in_use());
  m.def("ladders", [] {
    py::dict all;
    for (cuda::Ladder* l : cuda::ladders()) {
      py::list rungs;
      for (const cuda::Rung& r : l->rungs) rungs.append(py::make_tuple(r.name, r.change, r.sm, name_of(r.operands)));
      all[l->op] = rungs;
    }
    return all;
  });
  m.def("rung", [](const std::string& op) { return ladder(op).rung(); });
  m.def("choose", [](const std::string& op, int rung) { ladder(op).choose(rung); });
  m.def("allow", [](const std::string& o) { cuda::allow(operands(o)); });
  m.def("allowed", [] { return name_of(cuda::allowed()); });
  m.def("compute_capability", &cuda::compute_capability);
  m.def("multiprocessors", &cuda::multiprocessors);
  m.def("set_stream", &cuda::set_stream);
  cuda::bind_device(m);
}
