"""minidiff doctor on a GPU's machine where something is missing: what it says, and the command that mends it."""

import ctypes.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from minidiff import doctor

TOO_OLD = "CUDA driver version is insufficient for CUDA runtime version"


def module(name, **contents):
    """A module as it is found when it is imported."""
    new = ModuleType(name)
    new.__spec__ = ModuleSpec(name, None)
    vars(new).update(contents)
    return new


def failing(error):
    def call():
        raise error

    return call


@pytest.fixture
def lines(monkeypatch):
    """What doctor says of the GPU, by the line's first words, with a driver and these in place of the real modules."""
    monkeypatch.delattr("minidiff._cuda", raising=False)

    def say(count=None, capability=None, driver="libcuda.so.1"):
        cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=count))
        monkeypatch.setitem(sys.modules, "cupy", module("cupy", __version__="15", cuda=cuda))
        monkeypatch.setitem(sys.modules, "minidiff._cuda", module("minidiff._cuda", compute_capability=capability))
        monkeypatch.setattr(ctypes.util, "find_library", lambda name: driver)
        return dict(line.split(": ", 1) for line in doctor._gpu())

    return say


def test_all_is_there(lines):
    assert lines(lambda: 2, lambda: 89) == {
        "CuPy": "15, 2 GPU(s)", "CUDA kernels": "built, on a GPU of compute capability 8.9"
    }  # fmt: skip


def test_no_driver(lines):
    error = RuntimeError("no driver")
    said = lines(failing(error), failing(error), driver=None)
    assert "sudo ubuntu-drivers install" in said["NVIDIA driver"]


def test_a_driver_too_old(lines):
    """Kernels that were compiled by a newer toolkit are there, and each call of one would fail."""
    said = lines(failing(RuntimeError(f"cudaErrorInsufficientDriver: {TOO_OLD}")), failing(RuntimeError(TOO_OLD)))
    assert TOO_OLD in said["CuPy"] and "sudo ubuntu-drivers install" in said["CuPy"]
    assert "pip uninstall cupy-cuda13x; pip install 'minidiff[cuda12]'" in said["CuPy"]
    assert said["CUDA kernels"].startswith(f"built, but find no usable GPU ({TOO_OLD})")
    assert "sudo ubuntu-drivers install" in said["CUDA kernels"] and "CUDA_HOME=" in said["CUDA kernels"]


@pytest.mark.parametrize("name, of", [("cupy", "CuPy"), ("minidiff._cuda", "CUDA kernels")])
def test_a_module_that_cannot_be_loaded(lines, monkeypatch, name, of):
    lines(lambda: 1, lambda: 90)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    said = dict(line.split(": ", 1) for line in doctor._gpu())
    assert "not usable (" in said[of] and "pip install" in said[of]
