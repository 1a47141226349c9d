"""A stand-in for CuPy and for minidiff._cuda, on NumPy and the emulator, that refuses what the real ones refuse.

Its arrays do not mix with NumPy's and do not turn into them, except by `get`. Kernels must be told of the current
stream. While a stream is captured nothing may be read by the host or come from it, all work must be that stream's, and
what was recorded can be launched again. So the way of a whole training step through CuPy's arrays is tested where there
is no GPU.
"""

import contextlib
import functools
import importlib
import itertools
import re
import types
from pathlib import Path

import numpy as np

from minidiff import backend

OPS_H = (Path(__file__).parent.parent / "csrc" / "ops.h").read_text()

_recording = None  # while a stream is captured: the calls that its graph will make
_captured = None  # that stream


def _host(what):
    """Something passes between the host and the device."""
    if _recording is not None:
        raise RuntimeError(f"cudaErrorStreamCaptureUnsupported: {what}")


def _unwrapped(value):
    """NumPy's arrays behind ours; a NumPy array itself is refused."""
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)} of shape {value.shape}")
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map(_unwrapped, value))
    return value


def _wrapped(value):
    if isinstance(value, np.ndarray | np.generic):
        return ndarray(np.asarray(value))
    return type(value)(map(_wrapped, value)) if isinstance(value, list | tuple) else value


def _run(function, *args, **kwargs):
    """function(*args) on the device: now, and whenever the graph that is being recorded is launched."""
    args, kwargs = _unwrapped(args), {name: _unwrapped(value) for name, value in kwargs.items()}
    if _recording is not None and current_stream() is not _captured:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: work on another stream than the captured one")
    result = function(*args, **kwargs)
    if _recording is not None:
        result = np.asarray(result) if isinstance(result, np.generic) else result
        _recording.append((function, args, kwargs, result))
    return _wrapped(result)


class ndarray:
    """An array on the device."""

    def __init__(self, host):
        self.host = host

    shape, dtype, ndim, size, flags, strides, nbytes = (
        property(lambda self, name=name: getattr(self.host, name))
        for name in ("shape", "dtype", "ndim", "size", "flags", "strides", "nbytes")
    )

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return _run(ufunc if method == "__call__" else getattr(ufunc, method), *inputs, **kwargs)

    def __array_function__(self, function, kinds, args, kwargs):
        return _run(function, *args, **kwargs)

    def get(self):
        _host("an array is read")
        return self.host.copy()

    def item(self):
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def __bool__(self):
        return bool(self.get())

    def __float__(self):
        return float(self.get())

    def __int__(self):
        return int(self.get())

    __index__ = __int__

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __setitem__(self, key, value):
        _run(lambda a, k, v: a.__setitem__(k, v), self, key, value)

    @property
    def T(self):
        return self.transpose()


def _method(name):
    def call(self, *args, **kwargs):
        return _run(lambda a, *more, **named: getattr(a, name)(*more, **named), self, *args, **kwargs)

    return call


for _name in (
    "getitem add radd sub rsub mul rmul truediv rtruediv floordiv mod pow rpow matmul neg invert and or xor eq ne lt "
    "le gt ge iadd isub imul itruediv"
).split():
    setattr(ndarray, f"__{_name}__", _method(f"__{_name}__"))
for _name in (
    "all any argmax astype clip copy cumsum dot fill max mean min ravel repeat reshape squeeze std sum swapaxes trace "
    "transpose view"
).split():
    setattr(ndarray, _name, _method(_name))


class Graph:
    """What was recorded."""

    def __init__(self, calls):
        self.calls = calls

    def launch(self, stream=None):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for kept, new in zip(*((r if isinstance(r, list | tuple) else [r]) for r in (result, again)), strict=True):
                if isinstance(kept, np.ndarray) and kept.flags.writeable:  # a broadcast view follows what it shows
                    kept[...] = new


class Stream:
    """A stream, whose work is done at once."""

    count = itertools.count()

    def __init__(self, *args, **kwargs):
        self.ptr = next(Stream.count)

    def __enter__(self):
        _streams.append(self)
        return self

    def __exit__(self, *exc):
        assert _streams.pop() is self

    def synchronize(self):
        _host("a stream is waited for")

    def begin_capture(self, mode=None):
        global _recording, _captured
        _recording, _captured = [], self

    def end_capture(self):
        global _recording, _captured
        calls, _recording, _captured = _recording, None, None
        return Graph(calls)


_streams = [Stream()]  # the default one, and those that were entered


def current_stream():
    return _streams[-1]


class MemoryPool:
    """Where arrays come from."""

    def malloc(self, size):
        raise NotImplementedError


def asarray(a, dtype=None, **kwargs):
    """From the host too."""
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    _host("an array comes from the host")
    return ndarray(np.array(a, dtype=dtype))


class _Ufunc:
    def __init__(self, ufunc):
        self.ufunc = ufunc

    def __call__(self, *args, **kwargs):
        return _run(self.ufunc, *args, **kwargs)

    def at(self, *args):
        _run(self.ufunc.at, *args)


def module():
    """The module `cupy`."""
    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.asarray, cupy.array = ndarray, asarray, asarray
    cupy.lib = types.SimpleNamespace(
        stride_tricks=types.SimpleNamespace(as_strided=_of(np.lib.stride_tricks.as_strided))
    )
    cupy.cuda = types.SimpleNamespace(
        Stream=Stream,
        MemoryPool=MemoryPool,
        using_allocator=lambda allocate: contextlib.nullcontext(),
        get_current_stream=current_stream,
        runtime=types.SimpleNamespace(
            getDeviceCount=lambda: 1, deviceSynchronize=lambda: _host("the device is waited for")
        ),
    )

    def other(name):
        value = getattr(np, name)
        if isinstance(value, np.ufunc):
            return _Ufunc(value)
        return _of(value) if isinstance(value, types.FunctionType | types.BuiltinFunctionType) else value

    cupy.__getattr__ = other
    for name in ("concatenate", "where", "empty", "zeros", "arange"):  # dispatched by C code, which is no function
        setattr(cupy, name, _of(getattr(np, name)))
    return cupy


def _of(function):
    return functools.partial(_run, function)


def install(modules):
    """Put both stand-ins in place, and make them the kind "cuda"; modules: sys.modules."""
    emulated = importlib.import_module("minidiff._emulated")
    modules["cupy"], modules["minidiff._cuda"] = module(), kernels_of(emulated)
    modules.pop("minidiff.cuda", None)
    backend.MODULES["cuda"] = importlib.import_module("minidiff.cuda").kinds()["cuda"]
    backend.missing.pop("cuda", None)
    return modules["cupy"]


def kernels_of(emulated):
    """The module `minidiff._cuda`: the emulated one on the device's arrays, and the current stream."""
    proxy, told = types.ModuleType("minidiff._cuda"), [0]
    proxy.set_stream = lambda pointer: told.append(pointer)

    def named(name):
        function, names = getattr(emulated, name), arguments_of(name)
        if names is None:
            return function

        def call(*args):
            for argument, value in zip(names, args, strict=True):
                if any(isinstance(a, np.ndarray) for a in (value if isinstance(value, list) else [value])):
                    raise ValueError(f"{name}: {argument} must be on the GPU")
            if told[-1] != current_stream().ptr:
                raise RuntimeError(f"{name} was launched on stream {told[-1]}, and {current_stream().ptr} is current")
            try:
                return _run(function, *args)
            except ValueError as e:  # CuPy tells of types as the CUDA Array Interface does
                text = re.sub(r"float32, got (\w+\d)$", lambda m: f"float32, got {np.dtype(m[1]).str}", str(e))
                raise ValueError(text) from e

        return call

    proxy.__getattr__ = named
    return proxy


@functools.cache
def arguments_of(op):
    """Their names; None for what is no op of csrc/ops.h, or nothing of which arrays are asked."""
    declared = re.search(rf"\bvoid {op}\((.*?)\);", OPS_H, re.S)
    return declared and [argument.split()[-1] for argument in declared[1].split(",")]
