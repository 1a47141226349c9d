"""Which array module holds the numbers, and which kernels compute with them.

An op is written once, as a plain function on arrays. Decorated with `@kernel` it becomes two things: the
reference, which runs on NumPy and CuPy alike, and a name in the table of kernels. A compiled module that has a
function of the same name takes its place while that kind of kernels is active; an op that it lacks falls back
to the reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import numpy as np

from minidiff.errors import UserError

Array = Any  # a numpy.ndarray or a cupy.ndarray
P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Protocol[P, R]):
    """An op's function, run by the active kind of kernels; `.reference` runs the plain one whatever is active."""

    reference: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result."""


REFERENCE: dict[str, Callable[..., Any]] = {}
"""Every kernel by name, in its reference form."""

MODULES: dict[str, Any] = {"reference": None}
"""The kinds of kernels that can be made active here. `None`: no compiled module, every op is the reference."""

_active = "reference"

missing: dict[str, str] = {}
"""Why a compiled module is not here, by kind."""


def array_module(*arrays: Array) -> ModuleType:
    """numpy or cupy, whichever made the arrays. Importing minidiff never imports CuPy: an array from it did."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and any(isinstance(a, cupy.ndarray) for a in arrays):
        return cupy
    return np


def to_numpy(array: Array) -> np.ndarray:
    """The array in the computer's own memory; the same object if it is there already."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def device_module(device: str) -> ModuleType:
    """The array module of a device: numpy for "cpu", cupy for "cuda"; ValueError without CuPy or a GPU."""
    if device == "cpu":
        return np
    try:
        import cupy
    except ImportError as e:
        raise ValueError(f"'cuda' needs CuPy, which is not installed here ({e}); see: minidiff doctor") from e
    try:
        cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as e:
        raise ValueError(f"'cuda' needs an NVIDIA GPU, and CuPy finds none ({e}); see: minidiff doctor") from e
    return cupy


def kernel(reference: Callable[P, R]) -> Kernel[P, R]:
    """Enter a reference function in the table of kernels, and dispatch calls to the active kind.

    The undecorated function stays reachable as `.reference`.
    """
    name = reference.__name__
    REFERENCE[name] = reference

    @functools.wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        found = getattr(MODULES[_active], name, None)
        if found is None:
            found = (_active != "reference" and gpu_kernel(name, args)) or reference
        return found(*args, **kwargs)

    call.reference = reference  # type: ignore[attr-defined]
    return cast(Kernel[P, R], call)


def gpu_kernel(name: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The GPU's kernel of this name, if it has one and the arguments' arrays are CuPy's."""
    arrays = (a[0] if type(a) is list and a else a for a in args)
    return None if array_module(*arrays) is np else getattr(MODULES.get("cuda"), name, None)


@contextlib.contextmanager
def kernels(kind: str) -> Iterator[None]:
    """Run the block's ops with this kind of kernels: `with kernels("reference"): ...`.

    Raises ValueError for a kind that is not built here; `minidiff doctor` lists what is.
    """
    if kind not in MODULES:
        raise ValueError(f"there are no {kind!r} kernels here; built: {', '.join(MODULES)} (see: minidiff doctor)")
    before = _active
    _switch(kind)
    try:
        yield
    finally:
        _switch(before)


def _switch(kind: str) -> None:
    global _active
    _active = kind
    if isinstance(MODULES[kind], SimpleNamespace):
        getattr(MODULES[kind], "activate", lambda: None)()


class _WhenNeeded:
    """The kernels for a GPU before their first use: importing minidiff imports no CuPy and touches no GPU."""

    def __getattr__(self, name: str) -> Any:
        try:
            from minidiff import cuda
        except ImportError as e:  # there, but not usable, for want of a driver
            missing["cuda"] = str(e)
            raise AttributeError(name) from e
        MODULES["cuda"] = cuda.kinds()["cuda"]
        return getattr(MODULES["cuda"], name)


def load_compiled() -> None:
    """Enter the compiled modules that are here in the table, and make the best for the CPU the active one.

    The environment variable MINIDIFF_KERNELS names another kind to begin with, such as "reference". CuPy's arrays go to
    the kernels for a GPU under any kind but "reference".
    """
    try:
        from minidiff import cpu
    except ImportError as e:
        missing["cpu"] = str(e)
    else:
        MODULES.update(cpu.kinds())
    for kind in ("emulated", "checked"):
        try:
            from minidiff import emulated

            MODULES.update(emulated.kinds(kind))
        except ImportError as e:
            missing[kind] = str(e)
    absent = [name for name in ("minidiff._cuda", "cupy") if importlib.util.find_spec(name) is None]
    if absent:
        missing["cuda"] = f"there is no {' and no '.join(absent)}"
    else:
        MODULES["cuda"] = _WhenNeeded()
    default = next(kind for kind in ("cpu", "cuda", "reference") if kind in MODULES)
    wanted = os.environ.get("MINIDIFF_KERNELS", default)
    if wanted not in MODULES:
        raise UserError(f"MINIDIFF_KERNELS: there are no {wanted!r} kernels here; built: {', '.join(MODULES)}")
    _switch(wanted)


def active_kernels() -> str:
    """The kind of kernels in use."""
    return _active


def fallbacks(kind: str) -> list[str]:
    """The ops that this kind of kernels leaves to the reference."""
    return [name for name in sorted(REFERENCE) if not hasattr(MODULES[kind], name)]
