"""The compiled kernels for an NVIDIA GPU, on CuPy's arrays and its current stream; and functions as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

import cupy

import minidiff._cuda as _cuda
from minidiff.backend import Array
from minidiff.compiled import Compiled, offered


def _begin() -> None:
    _cuda.set_stream(cupy.cuda.get_current_stream().ptr)


class _Kernels:
    """The module's. One that finds no memory runs again when CuPy has given back what it keeps for later arrays.

    It may have begun: what it had written to its outputs it overwrites. Those that update arrays need no memory.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernel = getattr(_cuda, name)

        @wraps(kernel)
        def call(*args: Any) -> Any:
            try:
                return kernel(*args)
            except MemoryError:
                cupy.get_default_memory_pool().free_all_blocks()
                return kernel(*args)

        setattr(self, name, call)
        return call


@cache
def kinds() -> dict[str, SimpleNamespace]:
    """The kind "cuda"; ImportError without CuPy or the module."""
    return {"cuda": offered(Compiled(_Kernels(), cupy, _begin), module=_cuda)}


class Captured:
    """A function of arrays whose launches are recorded in its first call, as one CUDA graph, and then repeated.

    So Python and the driver are asked once a call, and not once a kernel. The function must do the same work whatever
    the arrays hold, read nothing on the host and take nothing from it; the shapes must stay those of the first call.
    What it returns is the same arrays in every call, with new contents.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.memory = cupy.cuda.MemoryPool()  # the graph's own: what it has freed nobody else may take
        self.inputs: list[Array | None] = []
        self.results: Any = None
        self.graph: Any = None
        self.stream: Any = None  # of the recording, on whose workspace the graph works: no other may take its place

    def __call__(self, *inputs: Array | None) -> Any:
        """The function's results."""
        if self.graph is None:
            self.capture(*inputs)
        for kept, new in zip(self.inputs, inputs, strict=True):
            if kept is not None and new is not None:
                if kept.shape != new.shape or kept.dtype != new.dtype:
                    raise ValueError(f"captured with {kept.shape} {kept.dtype}, called with {new.shape} {new.dtype}")
                kept[...] = new
        self.graph.launch(cupy.cuda.get_current_stream())
        return self.results

    def capture(self, *inputs: Array | None) -> None:
        """Run the function once, a rehearsal, and record it; for functions whose first run needs inputs of its own."""
        self.inputs = [None if a is None else a.copy() for a in inputs]
        cupy.cuda.runtime.deviceSynchronize()  # these copies were made on another stream
        self.stream = stream = cupy.cuda.Stream(non_blocking=True)
        with stream, cupy.cuda.using_allocator(self.memory.malloc):
            self.function(*self.inputs)  # compiles, loads and allocates what a capture could not
            stream.begin_capture()
            try:
                results = self.function(*self.inputs)
            finally:
                graph = stream.end_capture()
            stream.synchronize()
        self.results, self.graph = results, graph
