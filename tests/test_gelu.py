"""GELU in its three kinds, and the error function that NumPy lacks."""

import math

import numpy as np
import pytest
from helpers import assert_close, check_op, forward_backward

from minidiff import ops
from minidiff.ops.gelu import erf

pytestmark = pytest.mark.usefixtures("kernels_kind")

erf_of_math = np.vectorize(math.erf, otypes=[float])
FORMULAS = {
    "exact": lambda x: x * (1 + erf_of_math(x / math.sqrt(2))) / 2,
    "tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick": lambda x: x / (1 + np.exp(-1.702 * x)),
}


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (257,), (3, 5, 7)])
@pytest.mark.parametrize("kind", FORMULAS)
def test_gelu(kind, shape, rng):
    check_op(lambda x: ops.gelu(x, kind), FORMULAS[kind], np.asarray(2 * rng.standard_normal(shape)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", FORMULAS)
def test_far_from_zero_it_is_zero_or_x(kind, dtype):
    x = np.array([-1e4, -50, 50, 1e4], dtype)
    y, (dx,) = forward_backward(lambda x: ops.gelu(x, kind), [x], np.ones_like(x))
    assert_close(y, [0, 0, *x[2:]])
    assert_close(dx, [0, 0, 1, 1], dtype)


@pytest.mark.parametrize("dtype, error", [("float64", 2e-15), ("float32", 6e-7), ("float16", 4e-3)])
def test_erf(dtype, error):
    """Within a few roundings of math.erf, on both sides of the place where the formula changes."""
    x = np.concatenate([np.linspace(-7, 7, 4001), [2, np.nextafter(2, 0), 1e-300, 0, -0.0, np.inf, -np.inf]])
    x = x.astype(dtype)
    y = erf(x)
    assert y.dtype == dtype
    assert np.abs(y - erf_of_math(x.astype(np.float64))).max() <= error
    assert np.isnan(erf(np.array([np.nan], dtype)))[0]
