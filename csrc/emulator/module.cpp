// What minidiff._emulated and minidiff._checked offer beside the ops: the emulator's settings, counts, profile and checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cuda/device.h"
#include "../view.h"
#include "api.h"

namespace py = pybind11;

namespace minidiff {
namespace cuda {
namespace {

thread_local std::vector<const void*> arrays_of_call;

void watch(const View& v, const char* name, Use use) {
  if (!v.size()) return;
  using emulator::Content;
  auto [low, high] = v.reach();
  const char* start = static_cast<const char*>(v.data) + low;
  emulator::add_buffer(start, size_t(high - low), name, use != Use::input,
                       use == Use::output ? Content::undefined : Content::defined);
  arrays_of_call.push_back(start);
}

emulator::Order order_of(const std::string& name) {
  if (name == "forward") return emulator::Order::forward;
  if (name == "reverse") return emulator::Order::reverse;
  if (name == "random") return emulator::Order::random;
  throw std::invalid_argument("order must be forward, reverse or random, got " + name);
}

void set_options(const std::string& order, uint64_t seed, bool poison, double stall_seconds, int compute_capability,
                 int multiprocessors, int l2_bytes, size_t shared_bytes, size_t memory_bytes) {
  emulator::Options options = emulator::options();
  options.order = order_of(order), options.seed = seed, options.poison = poison, options.stall_seconds = stall_seconds;
  options.device.major = compute_capability / 10, options.device.minor = compute_capability % 10;
  options.device.multiProcessorCount = multiprocessors, options.device.l2CacheSize = l2_bytes;
  options.device.sharedMemPerBlockOptin = shared_bytes, options.device.totalGlobalMem = memory_bytes;
  emulator::set_options(options);
}

py::dict counts() {
  py::dict all;
  for (const emulator::Count& c : emulator::counts()) {
    py::dict one;
    one["launches"] = c.launches, one["blocks"] = c.blocks, one["threads"] = c.threads;
    one["barriers"] = c.barriers, one["collectives"] = c.collectives, one["switches"] = c.switches;
    all[py::str(c.kernel)] = one;
  }
  return all;
}

py::list profile() {
  py::list all;
  for (const emulator::ProfileRow& r : emulator::profile()) {
    py::dict row;
    row["kernel"] = r.kernel, row["file"] = r.file, row["line"] = r.line, row["shared"] = r.shared, row["store"] = r.store;
    row["bytes"] = r.bytes, row["requests"] = r.requests, row["transactions"] = r.transactions, row["ideal"] = r.ideal;
    all.append(row);
  }
  return all;
}

}  // namespace

Call::Call() { on_array = watch; }
Call::~Call() {
  for (const void* p : arrays_of_call) emulator::remove_buffer(p);
  arrays_of_call.clear();
}

void bind_device(py::module_& m) {
  m.def("set_options", &set_options, py::kw_only(), py::arg("order") = "forward", py::arg("seed") = 1,
        py::arg("poison") = true, py::arg("stall_seconds") = 20.0, py::arg("compute_capability") = 90,
        py::arg("multiprocessors") = 16, py::arg("l2_bytes") = 50 << 20, py::arg("shared_bytes") = 227 << 10,
        py::arg("memory_bytes") = size_t(16) << 30);
  m.def("device_bytes", &emulator::device_bytes);
  m.def("counts", &counts);
  m.def("reset_counts", &emulator::reset_counts);
  m.def("sync_points", [] {
    py::list all;
    for (const emulator::SyncPoint& p : emulator::sync_points()) all.append(py::make_tuple(p.what, p.file, p.line, p.times));
    return all;
  });
  m.def("skip_sync", &emulator::skip_sync, py::arg("file") = "", py::arg("line") = 0);
  m.def("start_profile", &emulator::start_profile, py::arg("records") = 0, py::arg("block") = 0);
  m.def("stop_profile", &emulator::stop_profile);
  m.def("profile", &profile);
  m.def("access_records", [](const std::string& file, int line, bool shared, bool store) {
    py::list all;
    for (const emulator::AccessRecord& r : emulator::access_records(file, line, shared, store))
      all.append(py::make_tuple(r.request, r.thread, r.offset));
    return all;
  });
}

}  // namespace cuda
}  // namespace minidiff
