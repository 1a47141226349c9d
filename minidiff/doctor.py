"""What this computer offers minidiff, what is missing, and the command that brings it."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys

import numpy as np

from minidiff import __version__
from minidiff.backend import MODULES, REFERENCE, active_kernels, fallbacks, missing
from minidiff.config import presets


def report() -> str:
    """The findings, one a line."""
    lines = [
        f"minidiff {__version__} in {os.path.dirname(os.path.abspath(__file__))}",
        f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}",
        f"NumPy {np.__version__}, matrix products by {_blas()}, {os.cpu_count()} CPU cores",
        f"CuPy: {_cupy()}",
        f"kernels: {', '.join(MODULES)}; in use: {active_kernels()}",
        _cpu(),
    ]
    for kind in MODULES:
        if kind != "reference":
            lines.append(f"  {kind} leaves to the reference: {', '.join(fallbacks(kind)) or 'nothing'}")
    lines.append(f"ops with a reference in NumPy/CuPy: {len(REFERENCE)}")
    lines.append(f"presets: {', '.join(presets())}")
    return "\n".join(lines)


def _blas() -> str:
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'an unknown BLAS')} {blas.get('version', '')}".strip()


def _cpu() -> str:
    if "cpu" in missing:
        return (
            f"compiled CPU kernels: not here ({missing['cpu']}), so NumPy computes, several times slower; "
            "with a C++ compiler (apt install g++, or xcode-select --install): pip install --force-reinstall minidiff, "
            "or pip install -e . in a clone"
        )
    from minidiff import _cpu

    sets, used = _cpu.instruction_sets(), MODULES["cpu"].instruction_set
    return f"compiled CPU kernels: {used} (of {', '.join(sets)}), {_cpu.num_threads()} threads"


def _cupy() -> str:
    if importlib.util.find_spec("cupy") is None:
        return "not installed (only needed for an NVIDIA GPU: pip install cupy-cuda13x, or cupy-cuda12x)"
    try:
        import cupy

        return f"{cupy.__version__}, {cupy.cuda.runtime.getDeviceCount()} GPU(s)"
    except (ImportError, RuntimeError) as e:  # CUDARuntimeError is a RuntimeError
        return f"installed, but no usable GPU ({e})"
