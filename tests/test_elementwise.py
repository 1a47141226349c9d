"""Arithmetic element by element: values, gradients and broadcasting."""

import numpy as np
import pytest
from helpers import check_op

from minidiff import Tensor, ops

pytestmark = pytest.mark.usefixtures("kernels_kind")

BROADCAST = [
    ((), ()),
    ((3,), ()),
    ((), (2, 1)),
    ((5, 7), (7,)),
    ((5, 1), (1, 7)),
    ((1, 1), (3, 5, 7)),
    ((2, 1, 5, 1), (3, 1, 7)),
    ((1,), (1, 1, 1)),
    ((0, 3), (3,)),
]
BINARY = [(ops.add, np.add), (ops.sub, np.subtract), (ops.mul, np.multiply), (ops.div, np.divide)]
UNARY = [
    (ops.neg, np.negative),
    (ops.exp, np.exp),
    (ops.log, np.log),
    (ops.sqrt, np.sqrt),
    (ops.tanh, np.tanh),
]


def away_from_zero(rng, shape):
    return rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)


@pytest.mark.parametrize("a, b", BROADCAST)
@pytest.mark.parametrize("op, formula", BINARY)
def test_binary(op, formula, a, b, rng):
    check_op(op, formula, away_from_zero(rng, a), away_from_zero(rng, b))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (3, 1, 5)])
@pytest.mark.parametrize("op, formula", UNARY)
def test_unary(op, formula, shape, rng):
    check_op(op, formula, np.asarray(rng.uniform(0.5, 2, shape)))


@pytest.mark.parametrize("exponent", [-1.5, -1, 0.5, 1, 2, 3])
def test_power(exponent, rng):
    check_op(lambda a: ops.power(a, exponent), lambda a: a**exponent, rng.uniform(0.5, 2, (3, 5)))


@pytest.mark.parametrize(
    "operators, formula",
    [
        (lambda x: 2 + x * 3, lambda x: 2 + x * 3),
        (lambda x: 3 * x + 2, lambda x: 3 * x + 2),
        (lambda x: 1 - x, lambda x: 1 - x),
        (lambda x: x - 1, lambda x: x - 1),
        (lambda x: 1 / x, lambda x: 1 / x),
        (lambda x: -x / 3, lambda x: -x / 3),
        (lambda x: x**2, lambda x: x * x),
    ],
)
def test_operators_with_numbers(operators, formula, rng):
    """A Python number takes the Tensor's dtype, so float32 and float16 stay what they are."""
    check_op(operators, formula, rng.uniform(0.5, 2, (2, 3)))


def test_an_array_and_a_tensor_make_a_tensor(rng):
    array = rng.standard_normal((2, 2))
    x = Tensor(rng.standard_normal((2, 2)))
    for made, wanted in [
        (array + x, array + x.data),
        (array - x, array - x.data),
        (array * x, array * x.data),
        (array / x, array / x.data),
        (array @ x, array @ x.data),
        (x - array, x.data - array),
        (np.float64(2) - x, 2 - x.data),
    ]:
        assert isinstance(made, Tensor)
        assert np.array_equal(made.data, wanted)
