"""CUDA kernels on the emulator: whole training steps, every barrier, the order of threads, bad input."""

import importlib
import itertools

import numpy as np
import pytest
from helpers import COARSER
from test_train import config

from minidiff import kernels
from minidiff.backend import MODULES, REFERENCE
from minidiff.train import data_of, new_state, train

if "emulated" not in MODULES:
    pytest.skip("the emulated kernels are not built here; see: minidiff doctor", allow_module_level=True)

_emulated = importlib.import_module("minidiff._emulated")
SAME = ((1, 1), (1, 1))
IN_TRAINING = (
    "conv2d_forward", "conv2d_backward", "linear_forward", "linear_backward",
    "group_norm_forward", "group_norm_backward",
    "layer_norm_forward", "layer_norm_backward", "attention_forward", "attention_backward",
    "mse_forward", "mse_backward", "gradient_norm", "adamw_update", "normal",
)  # fmt: skip


def draw(*shapes):
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


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


# ---- each ladder's ops on small ragged arrays, through one kind of kernels


def conv2d(of):
    for stride, upsample, side in ((1, 1, 9), (2, 1, 8), (1, 2, 5)):
        x, x2, w, b, shift = draw((2, side, side + 1, 5), (2, side, side + 1, 4), (3, 3, 9, 11), (11,), (2, 11))
        y = of.conv2d_forward(x, w, b, stride, SAME, x2, shift, None, upsample, True)
        yield y
        yield from of.conv2d_backward(draw(y.shape)[0], x, w, stride, SAME, x2, upsample)
    x, w = draw((1, 12, 12, 40), (3, 3, 40, 36))
    yield of.conv2d_forward(x, w, None, 1, SAME)
    yield from (a for a in of.conv2d_backward(draw((1, 12, 12, 36))[0], x, w, 1, SAME) if a is not None)


def linear(of):
    for M, K, N, activation in ((70, 37, 66, None), (130, 96, 72, "silu"), (33, 8, 20, "geglu")):
        x, w, b = draw((M, K), (K, N), (N,))
        y, z = of.linear_forward(x, w, b, None, activation, True)
        yield y
        yield from of.linear_backward(draw(y.shape)[0], x, w, True, activation, z)


def group_norm(of):
    for B, N, C, groups in ((2, 37, 12, 3), (1, 300, 64, 8)):
        x, gain, offset, dy = draw((B, N, C), (B, C), (B, C), (B, N, C))
        y, mean, rstd = of.group_norm_forward(x, gain, offset, groups, 1e-5, True)
        yield y
        yield from (a for a in of.group_norm_backward(dy, x, gain, offset, mean, rstd, groups, True) if a is not None)


def layer_norm(of):
    for rows, D in ((5, 33), (40, 128)):
        x, gamma, beta, dy = draw((rows, D), (D,), (D,), (rows, D))
        y, mean, rstd = of.layer_norm_forward(x, gamma, beta, 1e-5)
        yield y
        yield from of.layer_norm_backward(dy, x, gamma, mean, rstd)


def attention(of):
    for Lq, Lk, d, causal in ((33, 77, 32, False), (40, 40, 40, True)):
        q, k, v, dy = draw((2, Lq, 2 * d), (2, Lk, 2 * d), (2, Lk, 2 * d), (2, Lq, 2 * d))
        y, lse = of.attention_forward(q, k, v, 2, d**-0.5, None, causal)
        yield y
        yield from of.attention_backward(dy, y, lse, q, k, v, 2, d**-0.5, None, causal)[:3]


def numbers(of):
    a, b, c = draw((1, 1003), (1, 1003), (1, 4096))
    yield of.mse_forward(a, b)
    yield of.mse_backward(np.float32(0.7), a, b)
    yield np.float32(of.gradient_norm([a, b, c]))
    yield of.normal(3, [5, 6], 2, 1, (35, 3))


CASES = {
    "attention": attention, "conv2d": conv2d, "group_norm": group_norm, "layer_norm": layer_norm, "linear": linear,
    "gradient_norm": numbers, "mse": numbers, "normal": numbers,
}  # fmt: skip
RUNGS = [
    (case, rung)
    for case in CASES
    for rung in range(1, max(len(r) for name, r in _emulated.ladders().items() if name.startswith(case)) + 1)
]


def standing_on(module, case, rung):
    """Choose a rung of the case's ladders (0: the device's choice); how coarse its products' factors are."""
    coarse = 1
    for name, rungs in module.ladders().items():
        if name.startswith(case):
            module.choose(name, min(rung, len(rungs)))
            coarse = max(coarse, COARSER[rungs[min(rung, len(rungs)) - 1][3]]) if rung else coarse
    return coarse


def wrong(case, kind, coarse):
    """The largest error of a case's results against the reference, in shares of what is allowed."""
    worst = 0.0
    for got, wanted in zip(CASES[case](MODULES[kind]), CASES[case](reference()), strict=True):
        error = np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30)
        worst = max(worst, error / (2e-5 * coarse) if np.isfinite(error) else np.inf)
    return worst


class reference:
    """The reference functions as attributes."""

    def __getattr__(self, name):
        return REFERENCE[name]


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
