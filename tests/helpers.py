"""What the tests share: the tolerances, the comparison, and everything that must hold for an op."""

import importlib

import numpy as np
import pytest

from minidiff import Tensor, kernels
from minidiff.gradcheck import gradcheck

TOLERANCES = {"float64": 1e-11, "float32": 1e-5, "float16": 5e-3}
"""The largest error by the precision of the computation, relative to the reference's largest magnitude."""

skipping_allowed = True  # --require-torch makes it False, in conftest.py


def assert_close(actual, reference, dtype=None, condition=1.0, name="result"):
    """`actual` is finite, has the shape of `reference`, and differs from it by no more than its precision explains.

    dtype: the precision of the computation; that of `actual` unless given.
    condition: by how much the computation magnifies the rounding of its inputs; the tolerance grows with it.
    """
    actual, reference = np.asarray(actual), np.asarray(reference)
    tolerance = condition * TOLERANCES[str(np.dtype(dtype or actual.dtype))]
    assert actual.shape == reference.shape, f"{name}: shape {actual.shape}, wanted {reference.shape}"
    assert np.isfinite(reference).all(), f"{name}: the reference is not finite"
    assert np.isfinite(actual).all(), f"{name}: {np.size(actual) - np.isfinite(actual).sum()} elements are not finite"
    if not actual.size:
        return
    wide = reference.astype(np.float64)
    difference, scale = np.abs(actual - wide).max(), np.abs(wide).max()
    if not difference <= tolerance * scale:
        raise AssertionError(f"{name}: off by {difference:.2e} where values reach {scale:.2e} (allowed {tolerance:.0e})")


def forward_backward(fn, arrays, dy=None, needed=None):
    """The result of `fn` on Tensors of the arrays, and the gradient of each (None where `needed` is False)."""
    needed = needed or [True] * len(arrays)
    leaves = [Tensor(a, requires_grad=n) for a, n in zip(arrays, needed, strict=True)]
    y = fn(*leaves)
    y.backward(np.random.default_rng(1).standard_normal(y.shape).astype(y.dtype) if dy is None else dy)
    return y.data, [leaf.grad for leaf in leaves]


def check_op(fn, formula, *arrays, condition=1.0, dtypes=("float32", "float16"), differentiable=True):
    """Everything that must hold for an op on these float64 inputs.

    formula: plain NumPy, independent of the op; it gives the forward values.
    In float64 the values must be the formula's and the gradients pass gradcheck. In each of `dtypes` the values must
    be close to the formula's and the gradients to the reference's in float64, for the same rounded inputs, also where
    memory is strided and where only one input needs a gradient; nothing may write into its inputs.
    """
    assert_close(fn(*map(Tensor, arrays)).data, formula(*arrays), condition=condition)
    if differentiable:
        gradcheck(fn, *arrays)
    for dtype in dtypes:
        rounded = [a.astype(dtype) for a in arrays]
        _check_precision(fn, formula, rounded, condition)


def _check_precision(fn, formula, arrays, condition):
    dtype = arrays[0].dtype
    exact = [a.astype(np.float64) for a in arrays]
    dy = np.random.default_rng(1).standard_normal(np.shape(formula(*exact))).astype(dtype)
    with kernels("reference"):
        _, wanted = forward_backward(fn, exact, dy.astype(np.float64))

    before = [a.copy() for a in (*arrays, dy)]
    y, grads = forward_backward(fn, arrays, dy)
    for a, copy in zip((*arrays, dy), before, strict=True):
        assert np.array_equal(a, copy), f"an input of shape {a.shape} was written into"
    assert [y.dtype, *(g.dtype for g in grads)] == [dtype] * (1 + len(grads)), "the dtype was not kept"

    y_strided, grads_strided = forward_backward(fn, [strided(a) for a in arrays], strided(dy))
    for values in (y, y_strided):
        assert_close(values, formula(*exact), condition=condition)
    for i, reference in enumerate(wanted):
        only = [i == j for j in range(len(arrays))]
        _, alone = forward_backward(fn, arrays, dy, needed=only)
        assert [g is not None for g in alone] == only, "a gradient for an input that needs none"
        for gradient in (grads[i], grads_strided[i], alone[i]):
            assert_close(gradient, reference, condition=condition, name=f"gradient of input {i} in {dtype}")


def strided(array):
    """The same values, with gaps between them in memory."""
    return np.repeat(array, 2, axis=-1)[..., ::2] if np.ndim(array) else array


def import_or_skip(name):
    """The module, for comparisons with it; the test file is skipped without it (with --require-torch: an error)."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not skipping_allowed:
            raise
        pytest.skip(f"compares with {name}, which is not installed here ({error})", allow_module_level=True)
