"""What this computer offers minidiff, what is missing, and the command that brings it."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import sys

import numpy as np

from minidiff import __version__
from minidiff.backend import MODULES, REFERENCE, active_kernels, fallbacks, missing
from minidiff.config import presets

REINSTALL = "pip install --force-reinstall minidiff, or pip install -e . in a clone"


def report() -> str:
    """The findings, one a line."""
    lines = [
        f"minidiff {__version__} in {os.path.dirname(os.path.abspath(__file__))}",
        f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}",
        f"NumPy {np.__version__}, matrix products by {_blas()}, {os.cpu_count()} CPU cores",
        f"kernels: {', '.join(MODULES)}; in use: {active_kernels()}",
        _cpu(),
        _emulator(),
        *_gpu(),
    ]
    for kind in MODULES:
        if kind not in ("reference", "checked"):
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
            f"with a C++ compiler (apt install g++, or xcode-select --install): {REINSTALL}"
        )
    from minidiff import _cpu

    sets, used = _cpu.instruction_sets(), MODULES["cpu"].instruction_set
    return f"compiled CPU kernels: {used} (of {', '.join(sets)}), {_cpu.num_threads()} threads"


def _emulator() -> str:
    if "emulated" in MODULES:
        return "CUDA kernels on the CPU: emulated" + (", checked" if "checked" in MODULES else "")
    return f"CUDA kernels on the CPU: not here ({missing['emulated']}); they need Linux on x86-64 and g++: {REINSTALL}"


def _gpu() -> list[str]:
    """What a GPU needs, in the order in which it is needed: a driver, CuPy, the compiled kernels."""
    lines = []
    driver = ctypes.util.find_library("cuda")
    if not driver:
        lines.append("NVIDIA driver: not here; for a GPU install it (https://www.nvidia.com/drivers)")
    if importlib.util.find_spec("cupy") is None:
        lines.append(
            "CuPy: not installed; for a GPU: pip install 'minidiff[cuda13]', with an older driver 'minidiff[cuda12]'"
        )
    else:
        lines.append(f"CuPy: {_cupy()}")
    if importlib.util.find_spec("minidiff._cuda") is None:
        lines.append(
            "CUDA kernels: not built; for a GPU, with nvcc (the CUDA toolkit, or pip install nvidia-cuda-nvcc): "
            f"{REINSTALL}; without them CuPy computes"
        )
    else:
        lines.append("CUDA kernels: built")
    return lines


def _cupy() -> str:
    try:
        import cupy

        return f"{cupy.__version__}, {cupy.cuda.runtime.getDeviceCount()} GPU(s)"
    except (ImportError, RuntimeError) as e:  # CUDARuntimeError is a RuntimeError
        return f"installed, but no usable GPU ({e}); is the driver there, and as new as CuPy wants it?"
