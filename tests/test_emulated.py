"""CUDA kernels on the emulator: whole training steps, every barrier, the order of threads, bad input."""

import importlib
import itertools

import numpy as np
import pytest
from helpers import stand_on
from rungs import draw, every_rung, standing_on, wrong
from test_train import config

from minidiff import kernels
from minidiff.backend import MODULES, REFERENCE
from minidiff.train import data_of, new_state, train

if "emulated" not in MODULES:
    pytest.skip("the emulated kernels are not built here; see: minidiff doctor", allow_module_level=True)

_emulated = importlib.import_module("minidiff._emulated")
RUNGS = every_rung(_emulated)
IN_TRAINING = (
    "conv2d_forward", "conv2d_backward", "linear_forward", "linear_backward",
    "group_norm_forward", "group_norm_backward",
    "layer_norm_forward", "layer_norm_backward", "attention_forward", "attention_backward",
    "mse_forward", "mse_backward", "gradient_norm", "adamw_update", "normal",
)  # fmt: skip


def test_five_training_steps_are_those_of_the_cpu(monkeypatch):
    """Every op of the list runs emulated, none of them in its reference, and the losses agree."""
    calls = dict.fromkeys(IN_TRAINING, 0)

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    def refused(name):
        def call(*args):
            raise AssertionError(f"{name} went to the reference: {[getattr(a, 'dtype', a) for a in args]}")

        return call

    def losses(kind):
        with kernels(kind):
            state = new_state(config(train__steps=5, train__optimizer="adamw"))
            return [log.loss for log in train(state, data_of(state.config))]

    wanted = losses("cpu" if "cpu" in MODULES else "reference")
    for name in IN_TRAINING:
        monkeypatch.setattr(MODULES["emulated"], name, counted(name, getattr(MODULES["emulated"], name)))
        monkeypatch.setitem(REFERENCE, name, refused(name))
    np.testing.assert_allclose(losses("emulated"), wanted, rtol=1e-4)
    assert min(calls.values()) >= 5, calls


@pytest.fixture
def emulator(request):
    """One of the emulated modules, its settings put back afterwards."""
    kind = request.param
    if kind not in MODULES:
        pytest.skip(f"minidiff._{kind} is not built here; see: minidiff doctor")
    module = importlib.import_module(f"minidiff._{kind}")
    yield kind, module
    module.set_options()
    module.skip_sync()
    for name in module.ladders():
        module.choose(name, 0)


@pytest.mark.parametrize("order, seed", [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)])
@pytest.mark.parametrize("case, rung", RUNGS)
@pytest.mark.parametrize("emulator", ["checked"], indirect=True)
def test_no_order_of_threads_makes_a_difference(emulator, case, rung, order, seed):
    """The checked build also finds no race, no unwritten or foreign memory and no copy that nobody waits for."""
    kind, module = emulator
    coarse = standing_on(module, case, rung)
    module.set_options(order=order, seed=seed)
    assert wrong(case, kind, coarse) <= 1


@pytest.mark.parametrize("case, rung", RUNGS)
@pytest.mark.parametrize("emulator", ["checked"], indirect=True)
def test_a_missing_barrier_is_noticed(emulator, case, rung):
    """Each place where this rung's kernels synchronise, left out in turn: an error, or a wrong result."""
    kind, module = emulator
    coarse = standing_on(module, case, rung)
    before = {point[1:3]: point[3] for point in module.sync_points()}
    assert wrong(case, kind, coarse) <= 1
    used = [p for p in module.sync_points() if p[3] > before.get(p[1:3], 0) and p[0] != "cp.async.commit_group"]
    unnoticed = []
    for what, file, line, _ in used:
        module.skip_sync(file, line)
        noticed = False
        for order, seed in (("forward", 1), ("random", 1), ("random", 2)):
            module.set_options(order=order, seed=seed)
            try:
                noticed = noticed or wrong(case, kind, coarse) > 1
            except RuntimeError:
                noticed = True
        module.skip_sync()
        if not noticed:
            unnoticed.append(f"{what} in {file}:{line}")
    assert not unnoticed, unnoticed


@pytest.mark.parametrize("emulator", ["emulated", "checked"], indirect=True)
def test_ladders(emulator):
    _, module = emulator
    for name, rungs in module.ladders().items():
        assert len(rungs) >= 3 and all(change for _, change, _, _ in rungs), name
        exact = [i for i, (_, _, _, operands) in enumerate(rungs, 1) if operands == "fp32"]
        assert module.rung(name) == exact[-1]
        module.allow("bf16")
        assert module.rung(name) == len(rungs)
        module.allow("fp32")
        module.set_options(compute_capability=75)
        assert rungs[module.rung(name) - 1][2] == 75
        if rungs[-1][2] > 75:  # on such a GPU the tests skip it
            with pytest.raises(ValueError, match=r"needs compute capability 8\.0"):
                module.choose(name, len(rungs))
            with pytest.raises(pytest.skip.Exception, match=r"needs compute capability 8\.0, this GPU has 7\.5"):
                stand_on(module, name, rungs, len(rungs))
        module.set_options()
        with pytest.raises(ValueError, match=f"{name} has the rungs 1 to {len(rungs)}, not 99"):
            module.choose(name, 99)


@pytest.mark.parametrize("sizes", list(itertools.product([0, 1], repeat=3)), ids=str)
@pytest.mark.parametrize("emulator", ["checked"], indirect=True)
def test_sizes_of_0_and_1(emulator, sizes):
    kind, _ = emulator
    M, K, N = sizes
    x, w, dy = draw((M, K), (K, N), (M, N))
    y, _ = MODULES[kind].linear_forward(x, w, None)
    np.testing.assert_allclose(y, x @ w, rtol=1e-5)
    _, dw, db = MODULES[kind].linear_backward(dy, x, w, True)
    np.testing.assert_allclose(dw, x.T @ dy, rtol=1e-5)
    np.testing.assert_allclose(db, dy.sum(0), rtol=1e-5)
