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
DRIVER = (
    "sudo ubuntu-drivers install (Ubuntu), sudo apt install nvidia-driver (Debian), or https://www.nvidia.com/drivers"
)


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
    lines = [] if ctypes.util.find_library("cuda") else [f"NVIDIA driver: not here; for a GPU: {DRIVER}"]
    return [*lines, f"CuPy: {_cupy()}", f"CUDA kernels: {_cuda()}"]


def _cupy() -> str:
    if importlib.util.find_spec("cupy") is None:
        return "not installed; for a GPU: pip install 'minidiff[cuda13]', with an older driver 'minidiff[cuda12]'"
    try:
        import cupy

        return f"{cupy.__version__}, {cupy.cuda.runtime.getDeviceCount()} GPU(s)"
    except ImportError as e:
        return f"installed, but not usable ({e}): pip install --force-reinstall 'minidiff[cuda13]'"
    except RuntimeError as e:  # CUDARuntimeError is one
        older = "CuPy for an older one: pip uninstall cupy-cuda13x; pip install 'minidiff[cuda12]'"
        return f"installed, but finds no usable GPU ({e}); a newer driver: {DRIVER}; or {older}"


def _cuda() -> str:
    if importlib.util.find_spec("minidiff._cuda") is None:
        return (
            "not built; for a GPU, with nvcc (the CUDA toolkit, or pip install nvidia-cuda-nvcc): "
            f"{REINSTALL}; without them CuPy computes"
        )
    try:
        from minidiff import _cuda

        sm = _cuda.compute_capability()
    except ImportError as e:
        return f"built, but not usable ({e}): {REINSTALL}"
    except RuntimeError as e:
        older = "kernels for an older one, by its nvcc: CUDA_HOME=/usr/local/cuda-12 pip install -e . in a clone"
        return f"built, but find no usable GPU ({e}); a newer driver: {DRIVER}; or {older}"
    return f"built, on a GPU of compute capability {sm // 10}.{sm % 10}"
