"""Mean squared error."""

import math

import numpy as np
import pytest
from helpers import assert_close, check_op

from minidiff import Tensor, ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


def formula(a, b):
    return np.asarray(math.fsum((p - q) ** 2 for p, q in zip(a.flat, b.flat, strict=True)) / a.size)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 1), (2, 3, 5, 3)])
def test_mse(shape, rng):
    check_op(ops.mse, formula, np.asarray(rng.standard_normal(shape)), np.asarray(rng.standard_normal(shape)))


def test_arrays_are_constants(rng):
    x, target = Tensor(rng.standard_normal((3, 5)), requires_grad=True), rng.standard_normal((3, 5))
    ops.mse(target, x).backward()
    assert_close(x.grad, 2 * (x.data - target) / 15)


def test_many_half_precision_numbers(rng):
    """The mean of 100,000 squares is taken in float32: their sum is beyond float16."""
    a = rng.standard_normal(100_000).astype(np.float16)
    assert_close(ops.mse(a, -a).data, (4 * a.astype(np.float64) ** 2).mean(), "float16")
