"""What CUDA's streams and graphs change: nothing. On a GPU; with --stand-in on the emulator, which does all at once."""

import importlib

import numpy as np
import pytest
from helpers import assert_close, computing, no_gpu, placed

from minidiff import kernels, ops
from minidiff.backend import MODULES, REFERENCE, device_module, to_numpy
from minidiff.models import UNet, UNetConfig
from minidiff.optim import AdamW, clip_factor, gradient_norm

CONFIG = UNetConfig(
    channels=(8, 16), blocks=1, attention=("none", "cross"), heads=(2, 2), transformer_layers=(1, 1), text_width=8,
    norm_groups=4,
)  # fmt: skip
STEPS = 3


@pytest.fixture
def cupy(request):
    """CuPy, where there is a GPU."""
    if no_gpu():
        (pytest.fail if request.config.getoption("--require-gpu") else pytest.skip)(no_gpu())
    with kernels("cuda"), computing("cuda", "fp32"):
        yield device_module("cuda")


def inputs(step):
    """A batch of two: x_t, t, the target and the text."""
    rng = np.random.default_rng(step)
    x, target = rng.standard_normal((2, 2, 8, 8, 3), dtype=np.float32)
    return x, rng.integers(1, 1001, 2), target, rng.standard_normal((2, 5, 8), dtype=np.float32)


def trained(array, captured=None):
    """The losses of a few steps, the parameters and their average; array: what places inputs, captured: as a graph?"""
    model, rng = UNet(CONFIG, seed=0), np.random.default_rng(0)
    model.load(
        {n: array(a + 0.02 * rng.standard_normal(a.shape, dtype=np.float32)) for n, a in model.state().items()}
    )  # so that no parameter is zero and hides what lies behind it
    parameters = dict(model.named_parameters())
    optimizer = AdamW(parameters)

    def step(numbers, x, t, target, tokens):
        loss = ops.mse(model(x, t, (tokens, None)), target)
        loss.backward()
        grads = {name: p.grad for name, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        numbers[:, 0] *= clip_factor(gradient_norm(list(grads.values())), 1.0)
        optimizer.update(grads, numbers)
        return loss.data

    graph = captured(step) if captured else None
    losses = []
    for number in range(STEPS):
        given, numbers = [array(a) for a in inputs(number)], optimizer.next_numbers(1e-3)
        if graph and number == 0:
            graph.capture(numbers * np.nan, *given)  # its rehearsal changes nothing
        losses.append(float((graph or step)(numbers, *given)))
    results = {**{n: p.data for n, p in parameters.items()}, **{f"average of {n}": a for n, a in optimizer.ema.items()}}
    return losses, {name: to_numpy(a).copy() for name, a in results.items()}


@pytest.mark.parametrize("operands", ["fp32", "bf16"])
def test_a_captured_training_step_is_the_launched_one(cupy, operands):
    """The graph holds the same kernels in the same order: parameters may differ by rounding, in float32's tolerance."""
    module = MODULES["cuda"].module
    module.allow(operands)
    try:
        losses, wanted = trained(cupy.asarray)
        captured_losses, got = trained(cupy.asarray, importlib.import_module("minidiff.cuda").Captured)
    finally:
        module.allow("fp32")
    assert_close(np.array(captured_losses), np.array(losses), np.float32)
    for name in wanted:
        assert_close(got[name], wanted[name], np.float32, name=name)
    with kernels("reference"):
        start, (exact, _) = UNet(CONFIG, seed=0).state(), trained(np.asarray)
    assert all(not np.array_equal(wanted[name], start[name]) for name in start)
    np.testing.assert_allclose(losses, exact, rtol=1e-4 if operands == "fp32" else 2e-2)


def delay(cupy):
    """Some milliseconds of work for the current stream; none for the stand-in, which waits for nothing."""
    if hasattr(cupy, "RawKernel"):
        code = 'extern "C" __global__ void idle(long long n) { long long t = clock64(); while (clock64() - t < n) {} }'
        cupy.RawKernel(code, "idle")((1,), (1,), (np.int64(30_000_000),))


def product(K):
    """A product that is summed in parts, in the workspace, and what it is."""
    x, w = (np.random.default_rng(K).standard_normal(s, dtype=np.float32) for s in ((60, K), (K, 50)))
    return placed(x), placed(w), REFERENCE["linear_forward"](x, w, None)[0]


def test_an_op_runs_on_the_current_stream(cupy):
    """Its input comes late there, and is overwritten behind it."""
    x, w, wanted = product(2000)
    late = cupy.zeros(x.shape, np.float32)
    device_module("cuda").cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        delay(cupy)
        late[...] = x
        y = MODULES["cuda"].linear_forward(late, w, None)[0]
        late[...] = np.float32("nan")
        stream.synchronize()
    assert_close(y, wanted)


def test_ops_on_two_streams_do_not_meet_in_the_workspace(cupy):
    given = [product(K) for K in (2000, 1500)]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in given]
    device_module("cuda").cuda.runtime.deviceSynchronize()
    results = [[], []]
    for _ in range(20):
        for stream, (x, w, _), mine in zip(streams, given, results, strict=True):
            with stream:
                mine.append(MODULES["cuda"].linear_forward(x, w, None)[0])
    for stream, (*_, wanted), mine in zip(streams, given, results, strict=True):
        stream.synchronize()
        for y in mine:
            assert_close(y, wanted)


def test_a_captured_op_is_recorded_on_its_stream(cupy):
    """And launched on another."""
    x, w, wanted = product(2000)
    graph = importlib.import_module("minidiff.cuda").Captured(lambda x: MODULES["cuda"].linear_forward(x, w, None)[0])
    graph(x * 0)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        y = graph(x)
        stream.synchronize()
    assert_close(y, wanted)
