"""The way of training and drawing through CuPy's arrays, on a strict stand-in of CuPy and the emulated kernels."""

import importlib
import sys

import numpy as np
import pytest
import strict_cupy
from test_train import config

from minidiff import Tensor, kernels
from minidiff.backend import MODULES, missing
from minidiff.config import SampleConfig
from minidiff.errors import UserError
from minidiff.ops import silu
from minidiff.sample import draw
from minidiff.train import Diverged, data_of, load_state, new_state, save_state, train

if "emulated" not in MODULES:
    pytest.skip("the emulated kernels are not built here; see: minidiff doctor", allow_module_level=True)


@pytest.fixture
def cupy(monkeypatch):
    """CuPy and minidiff._cuda as stand-ins."""
    for table, names in (
        (sys.modules, ("cupy", "minidiff._cuda", "minidiff.cuda")),
        (MODULES, ("cuda",)),
        (missing, ("cuda",)),
    ):
        for name in names:
            monkeypatch.setitem(table, name, None)  # so that what is there now comes back
            del table[name]
    return strict_cupy.install(sys.modules)


def settings(**changes):
    return config(train__steps=4, **changes)


def losses(c):
    state = new_state(c)
    return [log.loss for log in train(state, data_of(state.config))], state


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        dict(train__optimizer="adamw"),
        dict(train__optimizer="muon", diffusion__prediction="x0", diffusion__weight_limit=5.0),
        dict(train__optimizer="adamw", train__accumulate=2, diffusion__prediction="v"),
    ],
    ids=["eps, AdamW", "x0, Muon", "v, accumulated"],
)
def test_training_on_a_gpu_is_training_on_a_cpu(cupy, changes, capture):
    wanted, _ = losses(settings(**changes))
    got, state = losses(settings(**changes, train__device="cuda", train__capture=capture))
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    assert all(isinstance(p.data, cupy.ndarray) for p in state.model.parameters())


@pytest.mark.usefixtures("cupy")
def test_without_capture_a_copy_to_the_gpu_would_be_a_fault():
    """The stand-in's capture refuses what CUDA's refuses."""
    cuda = importlib.import_module("minidiff.cuda")
    x = strict_cupy.asarray(np.ones(3, np.float32))
    for function in (lambda a: float(a[0]), lambda a: a * strict_cupy.asarray(2.0), lambda a: a.get()):
        function(x)
        with pytest.raises(RuntimeError, match="CaptureUnsupported"):
            cuda.Captured(function)(x)
    with pytest.raises(TypeError, match="Unsupported type"):
        x + np.ones(3, np.float32)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)


@pytest.mark.usefixtures("cupy")
def test_a_captured_function_is_recorded_once():
    calls = []

    def function(a, b):
        calls.append(1)
        return a * 2 if b is None else a * 2 + b

    captured = importlib.import_module("minidiff.cuda").Captured(function)
    one, two = (strict_cupy.asarray(np.full(3, value, np.float32)) for value in (1, 2))
    first = captured(one, two)
    assert first.get().tolist() == [4, 4, 4] and len(calls) == 2
    assert captured(two, one) is first and first.get().tolist() == [5, 5, 5] and len(calls) == 2
    with pytest.raises(ValueError, match=r"captured with \(3,\) float32, called with \(2,\) float32"):
        captured(one[:2], two)


def test_a_capture_needs_a_gpu():
    with pytest.raises(UserError, match=r"train.capture is for a GPU: --train.device cuda"):
        losses(settings(train__capture=True))


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize(
    "way",
    [
        dict(sampler="ddim", eta=0.0),
        dict(sampler="ddim", eta=0.6, guidance=1.0),
        dict(sampler="ddpm", clip=False),
    ],
    ids=str,
)
def test_pictures_of_a_gpu_are_those_of_a_cpu(way):
    wanted = new_state(settings())
    state = new_state(settings(train__device="cuda"))
    sample = SampleConfig(**{"steps": 4, "guidance": 2.0, **way})
    captions = ["a red circle", "a blue square"]
    pictures = draw(state.model, captions, sample)
    assert isinstance(pictures, np.ndarray)
    np.testing.assert_allclose(pictures, draw(wanted.model, captions, sample), atol=2e-4)


def test_a_run_moves_between_a_gpu_and_a_cpu(cupy, tmp_path):
    state = losses(settings(train__optimizer="muon", train__device="cuda"))[1]
    save_state(state, tmp_path / "checkpoint.safetensors")
    on = {device: load_state(tmp_path / "checkpoint.safetensors", {"train.device": device, "train.steps": 6})
          for device in ("cpu", "cuda")}  # fmt: skip
    for device, array in (("cpu", np.ndarray), ("cuda", cupy.ndarray)):
        assert all(
            isinstance(a, array) for a in [*on[device].model.state().values(), *on[device].optimizer.ema.values()]
        )
    cpu, cuda = ([log.loss for log in train(s, data_of(s.config))] for s in on.values())
    assert len(cpu) == 2
    np.testing.assert_allclose(cuda, cpu, rtol=1e-4)


@pytest.mark.usefixtures("cupy")
def test_a_gpus_arrays_meet_its_kernels_under_every_kind_but_the_reference(monkeypatch):
    x = strict_cupy.asarray(np.ones((2, 3), np.float32))
    asked = []
    monkeypatch.setattr(MODULES["cuda"], "silu_forward", lambda a: asked.append(a) or a)
    for kind in MODULES:
        with kernels(kind):
            silu(Tensor(x))
        assert len(asked) == (kind != "reference"), kind
        asked.clear()


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_captured_step_that_diverges_changes_nothing(optimizer):
    state = new_state(settings(train__optimizer=optimizer, train__device="cuda", train__capture=True))
    steps = train(state, data_of(state.config))
    next(steps)
    ruined = state.model.unet.conv_in.bias.data
    ruined[...] = np.float32("inf")
    before = {name: a.get() for name, a in [*state.model.state().items(), *state.optimizer.ema.items()]}
    with pytest.raises(Diverged, match=r"step 2: the loss is nan"):
        next(steps)
    after = {name: a.get() for name, a in [*state.model.state().items(), *state.optimizer.ema.items()]}
    assert state.step == 1 and all(np.array_equal(after[name], a) for name, a in before.items())
