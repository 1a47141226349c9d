"""The compiled kernels for an NVIDIA GPU, on CuPy's arrays and its current stream."""

from __future__ import annotations

from types import SimpleNamespace

import cupy

import minidiff._cuda as _cuda
from minidiff.compiled import Compiled, offered


def _begin() -> None:
    _cuda.set_stream(cupy.cuda.get_current_stream().ptr)


def kinds() -> dict[str, SimpleNamespace]:
    """The kind "cuda"; ImportError without CuPy or the module."""
    return {"cuda": offered(Compiled(_cuda, cupy, _begin), module=_cuda)}
