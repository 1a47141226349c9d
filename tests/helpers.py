"""What the tests share: the tolerances, the comparison, and everything that must hold for an op."""

import contextlib
import importlib
import json

import numpy as np
import pytest

from minidiff import Tensor, kernels
from minidiff.backend import device_module, missing, to_numpy
from minidiff.gradcheck import gradcheck

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3}
"""The largest error by the precision of the computation, relative to the reference's largest magnitude."""

COARSER = {"fp32": 1, "tf32": 100, "bf16": 1000}
"""How much coarser a result in float32 may be whose products had factors rounded to this."""

_computing = ("reference", "fp32")
skipping_allowed = True  # --require-torch makes it False, in conftest.py


def no_gpu():
    """Why there is no GPU to test on; None where there is one."""
    if "cuda" in missing:
        return f"the kernels for a GPU are not here: {missing['cuda']}"
    try:
        device_module("cuda")
    except ValueError as e:
        return str(e)
    return None


@contextlib.contextmanager
def computing(kind, operands):
    """Inside this block tests compute with this kind of kernels, whose products have such factors."""
    global _computing
    before, _computing = _computing, (kind, operands)
    try:
        yield
    finally:
        _computing = before


def placed(array):
    """The array where the kernels in use take it."""
    return device_module("cuda").asarray(array) if _computing[0] == "cuda" else array


def assert_close(actual, reference, dtype=None, condition=1.0, scale=0.0, name="result"):
    """`actual` is finite, has the shape of `reference` and differs from it no more than by rounding.

    dtype: the precision of the computation; that of `actual` unless given.
    condition: by how much the computation magnifies the rounding of its inputs; the tolerance grows with it.
    scale: the size of the terms, where they cancel in the reference: it keeps their rounding.
    """
    actual, reference = to_numpy(actual), to_numpy(reference)
    precision = str(np.dtype(dtype or actual.dtype))
    tolerance = condition * TOLERANCES[precision] * (COARSER[_computing[1]] if precision == "float32" else 1)
    assert actual.shape == reference.shape, f"{name}: shape {actual.shape}, wanted {reference.shape}"
    assert np.isfinite(reference).all(), f"{name}: the reference is not finite"
    assert np.isfinite(actual).all(), f"{name}: {(~np.isfinite(actual)).sum()} elements are not finite"
    if not actual.size:
        return
    wide = reference.astype(np.float64)
    difference, scale = np.abs(actual - wide).max(), max(scale, np.abs(wide).max())
    if not difference <= tolerance * scale:
        allowed = f"allowed {tolerance * scale:.2e} where values reach {scale:.2e}"
        raise AssertionError(f"{name}: off by {difference:.2e}, {allowed}")


def forward_backward(fn, arrays, dy=None, needed=None):
    """The result of `fn` on Tensors of the arrays, and their gradients (None where `needed` is false)."""
    needed = needed or [True] * len(arrays)
    leaves = [Tensor(placed(a), requires_grad=n) for a, n in zip(arrays, needed, strict=True)]
    y = fn(*leaves)
    y.backward(placed(cotangent(y.shape, y.dtype) if dy is None else dy))
    return to_numpy(y.data), [None if leaf.grad is None else to_numpy(leaf.grad) for leaf in leaves]


def check_op(fn, formula, *arrays, condition=1.0, dtypes=("float32", "float16")):
    """Everything that must hold for an op on these float64 inputs.

    formula: plain NumPy, independent of the op; it gives the forward values.
    In float64 the values must be the formula's, and the gradients pass gradcheck. In each of `dtypes` the
    values must be close to the formula's, the gradients to the reference's in float64, for the same inputs,
    also where memory is strided and where one input alone needs a gradient. No input is written into.
    """
    if _computing[0] == "cuda":  # its kernels are for float32; the reference is tested where it costs less
        return _check_precision(fn, formula, [a.astype(np.float32) for a in arrays], condition)
    assert_close(fn(*map(Tensor, arrays)).data, formula(*arrays), condition=condition)
    gradcheck(fn, *arrays)
    for dtype in dtypes:
        _check_precision(fn, formula, [a.astype(dtype) for a in arrays], condition)


def _check_precision(fn, formula, arrays, condition):
    dtype = arrays[0].dtype
    exact = [a.astype(np.float64) for a in arrays]
    values = formula(*exact)
    dy = cotangent(np.shape(values), dtype)
    with kernels("reference"):
        _, wanted = forward_backward(fn, exact, dy.astype(np.float64))

    before = [a.copy() for a in (*arrays, dy)]
    y, grads = forward_backward(fn, arrays, dy)
    for a, copy in zip((*arrays, dy), before, strict=True):
        assert np.array_equal(a, copy), f"an input of shape {a.shape} was written into"
    assert [y.dtype, *(g.dtype for g in grads)] == [dtype] * (1 + len(grads)), "the dtype was not kept"

    y_strided, grads_strided = forward_backward(fn, [strided(a) for a in arrays], strided(dy))
    y_plain = fn(*(Tensor(placed(a)) for a in arrays)).data  # where nothing needs a gradient an op may do more at once
    for result in (y, y_strided, y_plain):
        assert_close(result, values, condition=condition)
    scale = max(np.abs(g).max(initial=0) for g in wanted)
    for i, reference in enumerate(wanted):
        only = [i == j for j in range(len(arrays))]
        _, alone = forward_backward(fn, arrays, dy, needed=only)
        assert [g is not None for g in alone] == only, "a gradient for an input that needs none"
        for gradient in (grads[i], grads_strided[i], alone[i]):
            assert_close(gradient, reference, None, condition, scale, f"gradient of input {i} in {dtype}")


def cotangent(shape, dtype):
    """Random, and from a generator of its own: a dy equal to x is blind to a normalisation's gradient."""
    return np.asarray(np.random.default_rng([0, 2]).standard_normal(shape), dtype)


def strided(array):
    """The same values, with gaps between them in memory."""
    return np.repeat(array, 2, axis=-1)[..., ::2] if np.ndim(array) else array


def stand_on(module, name, rungs, rung):
    """Choose a rung of a ladder (0: the device's choice); skips where the device is too old for it."""
    needed, has = rungs[rung - 1][2] if rung else 0, module.compute_capability()
    if needed > has:
        pytest.skip(f"rung {rung} of {name} needs compute capability {needed / 10}, this GPU has {has / 10}")
    module.choose(name, rung)


def import_or_skip(name):
    """The module, for comparisons with it; without it the file is skipped (--require-torch: fails)."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not skipping_allowed:
            raise
        pytest.skip(f"compares with {name}, which is not installed here ({error})", allow_module_level=True)


def in_our_layout(tensors):
    """PyTorch's tensors by name -> contiguous NumPy arrays by the same names, in our layout."""
    from minidiff.pretrained.weights import our_axes  # which needs safetensors; the tests on a GPU do without

    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    axes = {name: our_axes(name, a.ndim) or range(a.ndim) for name, a in arrays.items()}
    return {name: np.ascontiguousarray(a.transpose(axes[name])) for name, a in arrays.items()}


def plain(config):
    """A model's config as its JSON file has it."""
    return json.loads(json.dumps(dict(config)))
