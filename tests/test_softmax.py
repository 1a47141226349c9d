"""Softmax over the last axis."""

import numpy as np
import pytest
from helpers import assert_close, check_op, forward_backward

from minidiff import Tensor, ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


def formula(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("shape", [(1,), (7,), (0, 3), (5, 1), (3, 5, 17), (3, 257)])
def test_softmax(shape, rng):
    check_op(ops.softmax, formula, 2 * rng.standard_normal(shape))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_an_offset_changes_nothing(offset):
    """The steps are powers of two, so that x + offset is exact in float32 too."""
    x = np.arange(-6, 7).reshape(1, -1) / 8
    y, (dx,) = forward_backward(ops.softmax, [(x + offset).astype(np.float32)])
    wanted, (dx_wanted,) = forward_backward(ops.softmax, [x.astype(np.float32)])
    assert_close(y, wanted)
    assert_close(dx, dx_wanted)


def test_minus_infinity_gets_no_weight():
    p = ops.softmax(Tensor(np.array([[0, -np.inf, 0], [-np.inf, -np.inf, 3.0]]))).data
    assert np.array_equal(p, [[0.5, 0, 0.5], [0, 0, 1]])
