"""Every rung of every ladder on a GPU, on small ragged arrays: what the sanitizers watch, and the first to fail.

And what its kernels refuse.
"""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import no_gpu
from rungs import SAME, every_rung, results, standing_on, wrong

from minidiff.backend import device_module

if no_gpu():
    pytest.skip(no_gpu(), allow_module_level=True)

_cuda = importlib.import_module("minidiff._cuda")


@pytest.fixture(params=every_rung(_cuda), ids=lambda p: f"{p[0]}-{p[1]}")
def rung(request):
    """A case standing on one of its rungs, and how coarse that is."""
    case, number = request.param
    yield case, standing_on(_cuda, case, number)
    standing_on(_cuda, case, 0)


def test_a_rung_is_right(rung):
    case, coarse = rung
    assert wrong(case, "cuda", coarse) <= 1


def test_a_rung_gives_the_same_bits_again(rung):
    case, _ = rung
    for first, second in zip(results(case, "cuda"), results(case, "cuda"), strict=True):
        assert np.array_equal(first, second)


def arguments(op):
    """Good ones by name, on the GPU."""
    shapes = {
        "conv2d_forward": {"y": (2, 4, 4, 5), "x": (2, 4, 4, 3), "w": (3, 3, 3, 5)},
        "attention_forward": {"y": (2, 4, 6), "lse": (2, 2, 4), "q": (2, 4, 6), "k": (2, 5, 6), "v": (2, 5, 6)},
        "adamw_update": {name: (2, 3) for name in ("p", "g", "m", "v", "ema")} | {"numbers": (8,)},
    }[op]
    given = {name: device_module("cuda").zeros(shape, np.float32) for name, shape in shapes.items()}
    if op == "conv2d_forward":
        order = ("y", "x", "x2", "w", "b", "shift", "residual")
        more = dict(stride=1, sides=SAME, upsample=1, silu=False, prepared=None, algorithm=-1)
        return {**{name: given.get(name) for name in order}, **more}
    if op == "attention_forward":
        return {**given, "bias": None, "heads": 2, "scale": 1.0, "causal": False}
    numbers = given.pop("numbers")
    return {**{name: [a] for name, a in given.items()}, "decay": [0.0], "numbers": numbers}


@pytest.mark.parametrize(
    "words, spoil",
    [
        ("must be on the GPU", lambda a: a.get()),
        ("must be float32, got <f8", lambda a: a.astype(np.float64)),
        ("must be float32, got <i4", lambda a: a.astype(np.int32)),
        ("must be contiguous", lambda a: a.repeat(2, axis=-1)[..., ::2]),
        ("must have shape", lambda a: a[..., :1].copy()),
        ("is missing", lambda a: None),
        ("is on GPU 1, but GPU 0 is in use", lambda a: SimpleNamespace(
            __cuda_array_interface__=a.__cuda_array_interface__, device=SimpleNamespace(id=1))),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("op, name", [("conv2d_forward", "y"), ("attention_forward", "k"), ("adamw_update", "m")])
def test_a_bad_argument_is_refused_by_name(op, name, words, spoil):
    given = arguments(op)
    kernel, good = getattr(_cuda, op), given[name]
    if "GPU 1" in words and not hasattr(device_module("cuda"), "RawKernel"):
        pytest.skip("the stand-in has one GPU")
    given[name] = [spoil(good[0])] if isinstance(good, list) else spoil(good)
    with pytest.raises(ValueError, match=f"{op}: {name} {words}"):
        kernel(*given.values())
    kernel(*{**given, name: good}.values())
