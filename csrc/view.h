// An array as a kernel's caller hands it over, and the checks that name what is wrong with it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace minidiff {

enum class DType : uint8_t { f32, other };
enum class Device : uint8_t { cpu, cuda };
#ifndef MINIDIFF_DEVICE
#define MINIDIFF_DEVICE cpu
#endif

struct View {
  void* data = nullptr;
  std::vector<int64_t> shape, strides;  // strides in bytes
  DType dtype = DType::other;
  std::string dtype_name;
  Device device = Device::cpu;
  int ordinal = 0;  // which GPU
  bool writable = false;
  bool given = false;  // false: None

  explicit operator bool() const { return given; }
  int64_t size() const {
    int64_t n = 1;
    for (int64_t s : shape) n *= s;
    return n;
  }
  // The lowest byte and the one behind the highest, counted from `data`, which negative strides leave backwards.
  std::pair<int64_t, int64_t> reach() const {
    int64_t low = 0, high = 0;
    if (!size()) return {0, 0};
    for (size_t i = 0; i < shape.size(); i++) (strides[i] < 0 ? low : high) += (shape[i] - 1) * strides[i];
    return {low, high + 4};
  }
  bool between_floats() const {  // is any element at an address that is no float's?
    bool any = reinterpret_cast<uintptr_t>(data) % 4;
    for (size_t i = 0; i < shape.size(); i++) any |= shape[i] > 1 && strides[i] % 4;
    return any && size();
  }
  bool contiguous() const {
    if (size() == 0) return true;
    int64_t step = 4;
    for (size_t i = shape.size(); i-- > 0; step *= shape[i])
      if (shape[i] != 1 && strides[i] != step) return false;
    return true;
  }
};

constexpr int64_t ANY = -1;

int ordinal_in_use();  // the GPU that kernels are launched on; 0 on a CPU

enum class Use : uint8_t { input, output, update };  // update: read and written

// Hears of every array that a check has passed: the emulator watches what kernels do to it.
inline void (*on_array)(const View&, const char* name, Use) = nullptr;

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); i++)
    s += (i ? ", " : "") + (shape[i] == ANY ? std::string("any") : std::to_string(shape[i]));
  return s + (shape.size() == 1 ? ",)" : ")");
}

inline thread_local const char* op_in_use = "";  // of this thread: the last whose arguments were checked

// Throws std::invalid_argument, which says which argument of which op wanted what.
struct Check {
  const char* op;
  Device device = Device::MINIDIFF_DEVICE;

  explicit Check(const char* op) : op(op) { op_in_use = op; }
  [[noreturn]] void fail(const char* name, const std::string& what) const {
    throw std::invalid_argument(std::string(op) + ": " + name + " " + what);
  }
  void array(const View& v, const char* name, std::vector<int64_t> shape, bool contiguous = true,
             Use use = Use::input) const {
    if (!v) fail(name, "is missing");
    if (v.device != device) fail(name, device == Device::cpu ? "must be in the computer's memory" : "must be on the GPU");
    if (v.ordinal != ordinal_in_use())
      fail(name, "is on GPU " + std::to_string(v.ordinal) + ", but GPU " + std::to_string(ordinal_in_use()) + " is in use");
    if (v.dtype != DType::f32) fail(name, "must be float32, got " + v.dtype_name);
    bool fits = v.shape.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); i++) fits = shape[i] == ANY || shape[i] == v.shape[i];
    if (!fits) fail(name, "must have shape " + shape_text(shape) + ", got " + shape_text(v.shape));
    if (contiguous && !v.contiguous()) fail(name, "must be contiguous, in C order");
    if (v.between_floats()) fail(name, "must have every element at a multiple of 4 bytes; copy it");
    if (on_array) on_array(v, name, use);
  }
  const float* in(const View& v, const char* name, std::vector<int64_t> shape) const {
    array(v, name, shape);
    return static_cast<const float*>(v.data);
  }
  const float* maybe(const View& v, const char* name, std::vector<int64_t> shape) const {
    return v ? in(v, name, shape) : nullptr;
  }
  float* out(const View& v, const char* name, std::vector<int64_t> shape, Use use = Use::output) const {
    array(v, name, shape, true, use);
    if (!v.writable) fail(name, "is read-only");
    return static_cast<float*>(v.data);
  }
  float* update(const View& v, const char* name, std::vector<int64_t> shape) const {
    return out(v, name, shape, Use::update);
  }
  void that(bool holds, const char* name, const std::string& what) const {
    if (!holds) fail(name, what);
  }
};

}  // namespace minidiff
