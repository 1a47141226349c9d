// How Python's arrays become Views, for every compiled module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "view.h"

namespace pybind11::detail {

template <>
struct type_caster<minidiff::View> {
  PYBIND11_TYPE_CASTER(minidiff::View, const_name("array"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    value.given = true;
    if (!isinstance<array>(source)) {  // the checks say which argument it is
      if (hasattr(source, "__cuda_array_interface__")) value.device = minidiff::Device::cuda;
      value.dtype_name = "something that is no NumPy array: " + std::string(Py_TYPE(source.ptr())->tp_name);
      return true;
    }
    auto a = reinterpret_borrow<array>(source);
    value.data = const_cast<void*>(a.data());
    value.shape.assign(a.shape(), a.shape() + a.ndim());
    value.strides.assign(a.strides(), a.strides() + a.ndim());
    bool native = a.dtype().kind() == 'f' && a.dtype().itemsize() == 4 && a.dtype().byteorder() != '>';
    value.dtype = native ? minidiff::DType::f32 : minidiff::DType::other;
    if (!native) value.dtype_name = str(a.dtype());
    value.writable = a.writeable();
    return true;
  }
};

}  // namespace pybind11::detail
