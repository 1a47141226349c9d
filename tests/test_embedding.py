"""Embedding: rows of a table, looked up by index."""

import numpy as np
import pytest
from helpers import check_op, forward_backward

from minidiff import Tensor, ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 5)])
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 3), (11, 17)])
@pytest.mark.parametrize("kind", ["int64", "int32", "uint16"])
def test_embedding(shape, rows, width, kind, rng):
    ids = np.asarray(rng.integers(0, rows, shape), kind)

    def formula(table):
        return np.array([table[i] for i in ids.flat]).reshape(*shape, width)

    check_op(lambda table: ops.embedding(ids, table), formula, rng.standard_normal((rows, width)))


def test_a_row_looked_up_twice_gets_both_gradients():
    dy = np.array([[1.0, 2], [4, 8], [16, 32]])
    _, (dtable,) = forward_backward(lambda t: ops.embedding(np.array([3, 1, 3]), t), [np.zeros((4, 2))], dy)
    assert np.array_equal(dtable, [[0, 0], [4, 8], [0, 0], [17, 34]])


@pytest.mark.parametrize("ids", [[-1], [0, 4]])
def test_ids_outside_the_table(ids):
    with pytest.raises(IndexError, match=r"embedding.*4 rows"):
        ops.embedding(np.array(ids), Tensor(np.zeros((4, 2))))


def test_ids_that_are_not_integers():
    with pytest.raises(TypeError, match=r"embedding.*integers.*float64"):
        ops.embedding(np.zeros(3), Tensor(np.zeros((4, 2))))
