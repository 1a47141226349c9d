// How Python's arrays become Views, and the ops of ops.h functions, for every compiled module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "ops.h"
#include "view.h"

namespace pybind11::detail {

template <>
struct type_caster<minidiff::View> {
  PYBIND11_TYPE_CASTER(minidiff::View, const_name("array"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    value.given = true;
    if (!isinstance<array>(source)) {
      if (hasattr(source, "__cuda_array_interface__")) return load_from_gpu(source);
      value.dtype_name = "something that is no array: " + std::string(Py_TYPE(source.ptr())->tp_name);
      return true;  // the checks say which argument it is
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

 private:
  // The CUDA Array Interface, version 3; the arrays of CuPy and PyTorch say besides which GPU they are on.
  bool load_from_gpu(handle source) {
    value.device = minidiff::Device::cuda;
    if (value.device != minidiff::Device::MINIDIFF_DEVICE) return true;  // the checks refuse it
    auto about = source.attr("__cuda_array_interface__").cast<dict>();
    auto data = about["data"].cast<tuple>();
    value.data = reinterpret_cast<void*>(data[0].cast<uintptr_t>());
    value.writable = !data[1].cast<bool>();
    value.shape = about["shape"].cast<std::vector<int64_t>>();
    value.dtype_name = about["typestr"].cast<std::string>();
    if (value.dtype_name == "<f4") value.dtype = minidiff::DType::f32;
    if (about.contains("strides") && !about["strides"].is_none()) {
      value.strides = about["strides"].cast<std::vector<int64_t>>();
    } else {
      value.strides.assign(value.shape.size(), 4);
      for (size_t i = value.shape.size(); i-- > 1;) value.strides[i - 1] = value.strides[i] * value.shape[i];
    }
    if (hasattr(source, "device"))
      for (const char* number : {"id", "index"})  // CuPy's name, PyTorch's
        if (hasattr(source.attr("device"), number)) value.ordinal = source.attr("device").attr(number).cast<int>();
    return true;
  }
};

}  // namespace pybind11::detail

namespace minidiff {

// Offer the ops that these kernels have. Guards: what every call holds, as the release of Python's lock.
template <class... Guards>
void bind_ops(pybind11::module_& m, const Kernels& k) {
  pybind11::call_guard<Guards...> guard;
#define OP(name, entry) \
  if (k.entry) m.def(#name, &name, guard)
  OP(conv2d_forward, conv2d_forward);
  OP(conv2d_backward, conv2d_backward);
  OP(conv2d_prepared_size, conv2d_prepared_size);
  OP(conv2d_prepare, conv2d_prepare);
  OP(linear_forward, linear_forward);
  OP(linear_backward, linear_backward);
  OP(group_norm_forward, group_norm_forward);
  OP(group_norm_backward, group_norm_backward);
  OP(layer_norm_forward, layer_norm_forward);
  OP(layer_norm_backward, layer_norm_backward);
  OP(attention_forward, attention_forward);
  OP(attention_backward, attention_backward);
  OP(pointwise_forward, pointwise_forward);
  OP(pointwise_backward, pointwise_backward);
  OP(geglu_forward, geglu_forward);
  OP(geglu_backward, geglu_backward);
  OP(add, add);
  OP(mse_forward, mse_forward);
  OP(mse_backward, mse_backward);
  OP(gradient_norm, gradient_norm);
  OP(adamw_update, adamw);
  OP(muon_momentum, momentum);
  OP(descend, descend);
  OP(orthogonalise, orthogonalise);
  OP(reverse_step, reverse_step);
  OP(reverse_step_drawn, reverse_step_drawn);
  OP(q_sample_drawn, q_sample_drawn);
  OP(normal, normal);
#undef OP
}

}  // namespace minidiff
