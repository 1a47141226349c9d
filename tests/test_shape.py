"""Rearrangements: reshape, transpose, concat, pad, index."""

import numpy as np
import pytest
from helpers import check_op, forward_backward

from minidiff import Tensor, ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


@pytest.mark.parametrize(
    "before, after", [((), (1, 1)), ((6,), (2, 3)), ((2, 3, 5), (3, -1)), ((1, 1), ()), ((0, 3), (3, 0))]
)
def test_reshape(before, after, rng):
    x = np.asarray(rng.standard_normal(before))
    check_op(lambda x: ops.reshape(x, after), lambda x: x.reshape(after), x)
    check_op(lambda x: x.reshape(*after), lambda x: x.reshape(after), x)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 2, 3, 0), (0, 2, 3, 1)])
def test_transpose(axes, rng):
    x = rng.standard_normal((2, 1, 5, 3))
    check_op(lambda x: ops.transpose(x, axes), lambda x: np.transpose(x, axes), x)
    check_op(lambda x: x.transpose(*axes), lambda x: np.transpose(x, axes), x)


@pytest.mark.parametrize(
    "shapes, axis",
    [
        ([(3,)], 0),
        ([(3,), (1,), (4,)], 0),
        ([(2, 3, 5), (2, 3, 1)], -1),
        ([(2, 3, 5), (2, 1, 5), (2, 0, 5)], 1),
        ([(0, 2), (0, 3)], 1),
    ],
)
def test_concat(shapes, axis, rng):
    check_op(
        lambda *xs: ops.concat(xs, axis),
        lambda *xs: np.concatenate(xs, axis),
        *(rng.standard_normal(s) for s in shapes),
    )


def test_concat_takes_arrays_as_constants(rng):
    x, array = Tensor(rng.standard_normal((2, 3)), requires_grad=True), rng.standard_normal((2, 1))
    y = ops.concat([array, x])
    assert np.array_equal(y.data, np.concatenate([array, x.data], -1))
    y.backward(np.arange(8.0).reshape(2, 4))
    assert np.array_equal(x.grad, [[1, 2, 3], [5, 6, 7]])


@pytest.mark.parametrize(
    "shape, widths", [((3,), [(0, 0)]), ((3, 5), [(1, 0), (0, 2)]), ((1, 2, 3), [(0, 1), (2, 3), (0, 0)])]
)
def test_pad(shape, widths, rng):
    check_op(lambda x: ops.pad(x, widths), lambda x: np.pad(x, widths), rng.standard_normal(shape))


@pytest.mark.parametrize(
    "key",
    [
        0,
        -1,
        slice(1, None, 2),
        slice(None, None, -1),
        ...,
        None,
        (slice(None), 1),
        (..., slice(2, 3), None),
        (1, 2, 3),
        np.int64(2),
        [0, 2, 0],
        np.array([[1, 1], [3, 0]]),
        (slice(None), np.array([0, 2, 2, 2])),
        (np.array([0, 0, 3]), np.array([1, 1, 2])),
        (np.array([0, 0]), slice(1, 3), np.array([4, 4])),
        np.arange(4) % 2 == 0,
        np.array([], int),
        slice(0, 0),
    ],
    ids=repr,
)
def test_index(key, rng):
    check_op(lambda x: x[key], lambda x: np.asarray(x[key]), rng.standard_normal((4, 3, 5)))


def test_an_element_read_twice_gets_both_gradients():
    _, (dx,) = forward_backward(lambda x: x[np.array([2, 0, 2, 2])], [np.zeros(3)], np.array([1.0, 2, 4, 8]))
    assert np.array_equal(dx, [2, 0, 13])
