"""The project-wide set-up: the options, and one run of each op test for every kind of kernels and every rung."""

import importlib
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import strict_cupy

from minidiff.backend import MODULES, kernels, missing

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))  # the exercises' checkers and solutions


LADDERS = {  # which of csrc/cuda's ladders the tests of a file climb
    "test_attention": ("attention",),
    "test_conv2d": ("conv2d",),
    "test_diffusion": ("reverse_step", "q_sample_drawn"),
    "test_elementwise": ("add",),
    "test_geglu": ("geglu",),
    "test_gelu": ("pointwise",),
    "test_groupnorm": ("group_norm",),
    "test_layernorm": ("layer_norm",),
    "test_linear": ("linear",),
    "test_mse": ("mse",),
    "test_optim": ("adamw_update", "muon_momentum", "descend", "gradient_norm"),
    "test_random": ("normal",),
    "test_silu": ("pointwise",),
}


def pytest_addoption(parser):
    parser.addoption(
        "--require-torch",
        action="store_true",
        help="fail, instead of skip, where PyTorch, diffusers or transformers is missing",
    )
    parser.addoption(
        "--require-gpu", action="store_true", help="fail, instead of skip, where there is no GPU to test on"
    )
    parser.addoption(
        "--stand-in", action="store_true", help="take the emulator and a stand-in of CuPy for a GPU: do its tests run?"
    )
    parser.addoption("--checked", action="store_true", help="run the op tests in the emulator's checked build too")


def pytest_configure(config):
    helpers.skipping_allowed = not config.getoption("--require-torch")
    if config.getoption("--stand-in"):
        strict_cupy.install(sys.modules)


def pytest_generate_tests(metafunc):
    """A test that uses `kernels_kind` runs once for each kind of kernels, and for each rung of its op's ladders.

    One that uses `cuda_kind` runs once for each kind of CUDA C++ kernels.
    """
    if "cuda_kind" in metafunc.fixturenames:
        kinds = ["emulated", "checked", "cuda"] if metafunc.config.getoption("--checked") else ["emulated", "cuda"]
        metafunc.parametrize("cuda_kind", kinds, indirect=True)
    if "kernels_kind" not in metafunc.fixturenames:
        return
    kinds = [kind for kind in MODULES if kind != "checked" or metafunc.config.getoption("--checked")]
    variants = {}
    for kind in dict.fromkeys([*kinds, "cuda"]):
        rungs = max(map(len, ladders(kind, metafunc.module.__name__).values()), default=0)
        variants |= {f"{kind}-{rung}": (kind, rung) for rung in range(1, rungs + 1)} or {kind: (kind, None)}
    metafunc.parametrize("kernels_kind", list(variants.values()), ids=list(variants), indirect=True)


def ladders(kind, file):
    """The ladders {name: rungs} of this kind's module that the tests of a file climb."""
    module, names = cuda_module(kind), LADDERS.get(file)
    return {n: rungs for n, rungs in module.ladders().items() if n.startswith(names)} if module and names else {}


def cuda_module(kind):
    """The module of kernels in CUDA C++ behind this kind, if it is one."""
    names = {"cuda": "_cuda", "emulated": "_emulated", "checked": "_checked"}
    return importlib.import_module(f"minidiff.{names[kind]}") if kind in names and kind in MODULES else None


@pytest.fixture
def kernels_kind(request):
    """The kind of kernels that is active during the test; of each ladder that the file climbs, one rung."""
    kind, rung = request.param
    if kind == "cuda":
        reason = helpers.no_gpu()
        if reason:
            (pytest.fail if request.config.getoption("--require-gpu") else pytest.skip)(reason)
    climbed = ladders(kind, request.module.__name__)
    operands = [rungs[min(rung, len(rungs)) - 1][3] for rungs in climbed.values()]
    for name, rungs in climbed.items():
        helpers.stand_on(cuda_module(kind), name, rungs, min(rung, len(rungs)))
    try:
        with kernels(kind), helpers.computing(kind, max(operands, key=helpers.COARSER.get, default="fp32")):
            yield kind
    finally:
        for name in climbed:
            cuda_module(kind).choose(name, 0)


@pytest.fixture
def cuda_kind(request):
    """A kind of kernels in CUDA C++, and its module, whose ladders are put back."""
    kind = request.param
    reason = helpers.no_gpu() if kind == "cuda" else missing.get(kind)
    if reason:
        (pytest.fail if kind == "cuda" and request.config.getoption("--require-gpu") else pytest.skip)(reason)
    module = MODULES[kind].module
    yield kind, module
    for name in module.ladders():
        module.choose(name, 0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
