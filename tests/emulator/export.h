// What every kernel file here offers to Python: functions with C names that return null, or what went wrong.
#pragma once

#include <exception>
#include <string>

#include "portable.h"
#include "ptx.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

template <class F>
const char* caught(F f) {
  static std::string error;
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

// FUNCTION(name, (int n, float* p), LAUNCH(...)) becomes const char* name(int n, float* p).
#define FUNCTION(name, parameters, ...) \
  EXPORT const char* name parameters { return caught([&] { __VA_ARGS__; }); }
