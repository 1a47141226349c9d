"""csrc/ops.h: a bad argument of a compiled module is refused by name, whichever kernels are behind it."""

import importlib
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import no_gpu

from minidiff import diffusion, optim  # noqa: F401 - they enter their ops in the table
from minidiff.backend import fallbacks, missing

CSRC = Path(__file__).parents[1] / "csrc"
SAME = ((1, 1), (1, 1))
MODULES = [name for name in ("_cpu", "_emulated", "_checked") if importlib.util.find_spec(f"minidiff.{name}")]
if not MODULES:
    pytest.skip("no compiled kernels are built here; see: minidiff doctor", allow_module_level=True)


@pytest.fixture(params=MODULES)
def module(request):
    return importlib.import_module(f"minidiff.{request.param}")


def arguments():
    """Good arguments of a few kernels by name; each test spoils one."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, 4, 3), (3, 3, 3, 5), (5,), (2, 4, 4, 5), (4, 3), (3, 5), (4, 5)
    x, w, b, y, a, m, out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return {
        "conv2d_forward": {"y": y, "x": x, "x2": None, "w": w, "b": b, "shift": None, "residual": None, "stride": 1,
                           "sides": SAME, "upsample": 1, "silu": False, "prepared": None, "algorithm": -1},
        "linear_forward": {"y": out, "z": None, "x": a, "w": m, "b": None, "residual": None, "activation": ""},
    }  # fmt: skip


def big_endian(a):
    return a.astype(">f4")


def gapped(a):
    return np.repeat(a, 2, axis=-1)[..., ::2]


def between_floats(a):
    """At an address that is no float's."""
    raw = np.empty(a.nbytes + 8, np.uint8)
    start = -raw.ctypes.data % 4 + 1
    odd = raw[start : start + a.nbytes].view(np.float32).reshape(a.shape)
    odd[...] = a
    return odd


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


SPOILED = [
    ("x", lambda a: a.astype(np.float64), "x must be float32, got float64"),
    ("x", lambda a: a.astype(np.int32), "x must be float32, got int32"),
    ("w", big_endian, "w must be float32, got >f4"),
    ("x", gapped, "x must be contiguous"),
    ("w", lambda a: np.asfortranarray(a), "w must be contiguous"),
    ("x", lambda a: a[0], "x must have shape"),
    ("w", lambda a: a[..., :2, :].copy(), "w must have shape"),
    ("y", lambda a: a[..., :4].copy(), "y must have shape"),
    ("x", between_floats, "x must have every element at a multiple of 4 bytes; copy it"),
    ("y", between_floats, "y must have every element at a multiple of 4 bytes; copy it"),
    ("y", read_only, "y is read-only"),
    ("y", lambda a: None, "y is missing"),
]


@pytest.mark.parametrize("op", ["conv2d_forward", "linear_forward"])
@pytest.mark.parametrize("name, spoil, words", SPOILED, ids=[w for *_, w in SPOILED])
def test_a_bad_argument_is_named(module, op, name, spoil, words):
    given = arguments()[op]
    getattr(module, op)(*given.values())
    given[name] = spoil(given[name])
    with pytest.raises(ValueError, match=f"{op}: {words}"):
        getattr(module, op)(*given.values())


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("stride", 0, "stride must be at least 1"),
        ("upsample", 0, "upsample must be at least 1"),
        ("sides", ((0, 1),), "sides must be"),
        ("sides", ((-1, 0), (0, 0)), "sides must not be negative"),
        ("b", np.zeros(4, np.float32), r"b must have shape \(5,\), got \(4,\)"),
        ("shift", np.zeros((2, 4), np.float32), "shift must have shape"),
        ("residual", np.zeros((2, 4, 4, 4), np.float32), "residual must have shape"),
        ("x2", np.zeros((2, 4, 3, 1), np.float32), "x2 must have shape"),
        ("w", np.zeros((9, 9, 3, 5), np.float32), "x is smaller than the kernel"),
        ("prepared", np.zeros(7, np.float32), "prepared must have shape|prepared is not for these kernels"),
        ("algorithm", 7, "algorithm must be -1 or 0, or for 3x3 kernels with stride 1 2 or 4, got 7"),
    ],
)
def test_a_bad_setting_of_a_convolution_is_named(module, name, value, words):
    given = {**arguments()["conv2d_forward"], name: value}
    with pytest.raises(ValueError, match=words):
        module.conv2d_forward(*given.values())


def attention(module, bias):
    """y of two tokens that attend to two, with a bias (1, 1, 2, 2) as it lies in memory."""
    q = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    y = np.empty_like(q)
    module.attention_forward(y, None, q, q, q, bias, 1, 0.3, False)
    return y


def test_a_bias_may_have_any_strides_of_whole_floats(module):
    values = np.array([[0.5, -1], [2, 0.1]], np.float32)
    apart, backwards = np.zeros((4, 6), np.float32), values[::-1, ::-1].copy()
    apart[::2, ::3] = values
    wanted = attention(module, values[None, None])
    for bias in (apart[::2, ::3], backwards[::-1, ::-1], np.asfortranarray(values)):
        np.testing.assert_array_equal(attention(module, bias[None, None]), wanted)
    np.testing.assert_array_equal(
        attention(module, np.broadcast_to(values[:1], (1, 1, 2, 2))),
        attention(module, values[[0, 0]][None, None]),
    )


def test_a_bias_between_floats_is_named(module):
    records = np.zeros(4, np.dtype([("bias", "f4"), ("other", "u1")]))
    for bias in (records["bias"].reshape(1, 1, 2, 2), between_floats(np.zeros((1, 1, 2, 2), np.float32))):
        with pytest.raises(
            ValueError, match="attention_forward: bias must have every element at a multiple of 4 bytes"
        ):
            attention(module, bias)


class OnTheGpu:
    """What CuPy's arrays have."""

    __cuda_array_interface__ = None


@pytest.mark.parametrize(
    "thing, words",
    [
        ([[1.0]], "x must be float32, got something that is no array: list"),
        (3.0, "x must be float32, got something that is no array: float"),
        (OnTheGpu(), "x must be in the computer's memory"),
    ],
)
def test_something_that_is_no_array_is_named(module, thing, words):
    given = {**arguments()["linear_forward"], "x": thing}
    with pytest.raises(ValueError, match=f"linear_forward: {words}"):
        module.linear_forward(*given.values())


def test_lists_of_an_optimizer_that_do_not_fit(module):
    p, numbers = [np.ones((2, 3), np.float32) for _ in range(5)], np.ones(8, np.float32)
    good = [[a] for a in p]
    module.adamw_update(*good, [0.0], numbers)
    for i, name in enumerate(("p", "g", "m", "v", "ema")):
        wrong = [*good[:i], [np.ones((3, 2), np.float32)], *good[i + 1 :]]
        with pytest.raises(ValueError, match=f"adamw_update: {'g' if name == 'p' else name}|m must have shape"):
            module.adamw_update(*wrong, [0.0], numbers)
        with pytest.raises(ValueError, match="the other lists must be of one length"):
            module.adamw_update(*good[:i], [], *good[i + 1 :], [0.0], numbers)
    with pytest.raises(ValueError, match=r"numbers must have shape \(8,\), got \(7,\)"):
        module.adamw_update(*good, [0.0], numbers[:7])


UNFUSED = {"embedding_forward", "embedding_backward", "softmax_forward", "softmax_backward"}
UNFUSED |= {"upsample_nearest_forward", "upsample_nearest_backward"}  # nothing that takes time
FALLBACKS = {
    "cpu": UNFUSED | {"q_sample_drawn", "reverse_step_drawn"},  # noise is drawn beside training, and the step is fused
    **dict.fromkeys(("emulated", "checked", "cuda"), UNFUSED | {"orthogonalised"}),
}
"""The ops that each kind leaves to the reference; doctor lists the same."""


@pytest.mark.parametrize("kind", FALLBACKS)
def test_what_is_left_to_the_reference(kind):
    reason = no_gpu() if kind == "cuda" else missing.get(kind)
    if reason:
        pytest.skip(reason)
    assert set(fallbacks(kind)) == FALLBACKS[kind]


ANOTHER_GPU = """
#include <cstdio>
#include "view.h"
int minidiff::ordinal_in_use() { return 0; }
int main() {
  minidiff::View v;
  v.given = true, v.device = minidiff::Device::cuda, v.dtype = minidiff::DType::f32, v.ordinal = 1;
  try {
    minidiff::Check{"add"}.in(v, "a", {});
  } catch (const std::invalid_argument& e) {
    puts(e.what());
  }
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ here")
def test_an_array_on_another_gpu_is_named(tmp_path):
    """By the checks of a module for GPUs, of which one is enough."""
    source, program = tmp_path / "another.cpp", tmp_path / "another"
    source.write_text(ANOTHER_GPU)
    command = ["g++", "-std=c++17", "-DMINIDIFF_DEVICE=cuda", f"-I{CSRC}", source, "-o", program]
    subprocess.run(command, check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert said == "add: a is on GPU 1, but GPU 0 is in use\n"


def on_another_gpu(a):
    """CuPy's array, as one of a second GPU says of itself."""
    return SimpleNamespace(__cuda_array_interface__=a.__cuda_array_interface__, device=SimpleNamespace(id=1))


@pytest.mark.skipif(no_gpu() is not None, reason=str(no_gpu()))
def test_cuda_refuses_what_lies_elsewhere():
    if importlib.import_module("cupy").__spec__ is None:
        pytest.skip("the arrays of CuPy's stand-in are in the computer's memory")
    cupy, cuda = importlib.import_module("cupy"), importlib.import_module("minidiff._cuda")
    given = {
        name: cupy.asarray(a) if isinstance(a, np.ndarray) else a for name, a in arguments()["linear_forward"].items()
    }
    cuda.linear_forward(*given.values())
    for name, spoil, words in [
        ("x", lambda a: a.get(), "x must be on the GPU"),
        ("x", lambda a: a.astype(np.float64), "x must be float32, got <f8"),
        ("x", lambda a: cupy.repeat(a, 2, axis=-1)[..., ::2], "x must be contiguous"),
        ("x", on_another_gpu, "x is on GPU 1, but GPU 0 is in use"),
        ("w", lambda a: a[0], "w must have shape"),
        ("y", lambda a: None, "y is missing"),
    ]:
        with pytest.raises(ValueError, match=f"linear_forward: {words}"):
            cuda.linear_forward(*{**given, name: spoil(given[name])}.values())
