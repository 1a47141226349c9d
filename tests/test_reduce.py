"""Sums, means and maxima over axes."""

import numpy as np
import pytest
from helpers import assert_close, check_op, forward_backward

from minidiff import Tensor, ops

pytestmark = pytest.mark.usefixtures("kernels_kind")

CASES = [
    ((), None),
    ((1,), 0),
    ((7,), None),
    ((3, 5), 0),
    ((3, 5), -1),
    ((3, 5), ()),
    ((2, 3, 5), (0, 2)),
    ((2, 3, 5), (-1, 1)),
    ((2, 1, 5), 1),
    ((0, 3), 1),
]


@pytest.mark.parametrize("shape, axis", CASES)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("op, formula", [(ops.sum, np.sum), (ops.mean, np.mean), (ops.max, np.max)])
def test_reductions(op, formula, shape, axis, keepdims, rng):
    check_op(
        lambda x: op(x, axis, keepdims),
        lambda x: np.asarray(formula(x, axis=axis, keepdims=keepdims)),
        np.asarray(rng.standard_normal(shape)),
    )


def test_they_are_methods_too(rng):
    x = rng.standard_normal((3, 5))
    assert_close(Tensor(x).sum(axis=0).data, x.sum(axis=0))
    assert_close(Tensor(x).mean((0, 1), keepdims=True).data, x.mean(keepdims=True))
    assert_close(Tensor(x).max().data, x.max())


def test_equal_maxima_share_the_gradient():
    x = np.array([[1.0, 3, 3], [2, 2, 2], [5, 0, 1]])
    _, (dx,) = forward_backward(lambda x: ops.max(x, axis=1), [x], np.array([1.0, 3, 7]))
    assert np.array_equal(dx, [[0, 0.5, 0.5], [1, 1, 1], [7, 0, 0]])
