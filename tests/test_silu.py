"""SiLU: y = x * sigmoid(x)."""

import numpy as np
import pytest
from helpers import check_op, forward_backward

from minidiff import ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (257,), (3, 5, 7)])
def test_silu(shape, rng):
    check_op(ops.silu, lambda x: x / (1 + np.exp(-x)), np.asarray(3 * rng.standard_normal(shape)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_far_from_zero_it_is_zero_or_x(dtype):
    x = np.array([-1e4, -1e3, 1e3, 1e4], dtype)
    y, (dx,) = forward_backward(ops.silu, [x], np.ones_like(x))
    assert np.array_equal(y, [0, 0, *x[2:]])
    assert np.array_equal(dx, [0, 0, 1, 1])
