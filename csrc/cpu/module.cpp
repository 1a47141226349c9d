// minidiff._cpu: the ops of ops.h, the threads, the instruction sets, the memory.
#include "module.h"

#include "../bindings.h"
#include "pool.h"

namespace py = pybind11;
using namespace minidiff;

namespace {

const Kernels* in_use = nullptr;

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

std::vector<Isa> isas() {
  std::vector<Isa> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  found.push_back({"avx512", kernels_avx512, avx512});
  found.push_back({"avx2", kernels_avx2, avx2});
#endif
  found.push_back({"portable", kernels_portable, true});
  return found;
}

void use_isa(const std::string& name) {
  for (const Isa& isa : isas())
    if (name == isa.name) {
      if (!isa.supported) throw std::invalid_argument("this processor has no " + name);
      in_use = isa.kernels;
      return;
    }
  throw std::invalid_argument("there are no kernels for the instruction set " + name);
}

}  // namespace

const Kernels* minidiff::kernels_in_use() { return in_use; }
int minidiff::ordinal_in_use() { return 0; }

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Kernels in C++ for the CPU; minidiff/compiled.py calls them. csrc/ops.h says what each does.";
  use_isa([] {
    for (const Isa& isa : isas())
      if (isa.supported) return std::string(isa.name);
    return std::string();
  }());
  bind_ops<py::gil_scoped_release, ThreadsOfCall>(m, *kernels_in_use());
  m.def("num_threads", &wanted_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Isa& isa : isas())
      if (isa.supported) names.push_back(isa.name);
    return names;
  });
  m.def("instruction_set", [] { return std::string(kernels_in_use()->name); });
  m.def("use_instruction_set", &use_isa);
  m.def("install_allocator", [] {
    if (!install_allocator()) throw py::error_already_set();
  });
  m.def("memory", [] {
    Memory now = memory();
    py::dict d;
    d["in_use"] = now.in_use, d["peak"] = now.peak, d["cached"] = now.cached, d["system_calls"] = now.system_calls;
    d["scratch"] = scratch_bytes();
    return d;
  });
  m.def("reset_peak", &reset_peak);
  m.def("release_memory", &release_memory);
  m.def("peak", [](long repeats) { return kernels_in_use()->peak(repeats); }, py::call_guard<py::gil_scoped_release, ThreadsOfCall>());
}
