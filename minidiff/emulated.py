"""The kernels of csrc/cuda on the CPU: "emulated", and "checked", which watches every access to memory.

The same sources that nvcc compiles for a GPU, compiled by an ordinary C++ compiler, each CUDA thread a fiber
(csrc/emulator). They take NumPy's arrays. Slow, and meant for looking: docs/debugging-kernels.md.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np

from minidiff.compiled import Compiled, offered


def kinds(name: str) -> dict[str, SimpleNamespace]:
    """The kind of this name, "emulated" or "checked"; ImportError where it is not built."""
    module = importlib.import_module(f"minidiff._{name}")
    return {name: offered(Compiled(module, np), module=module)}
