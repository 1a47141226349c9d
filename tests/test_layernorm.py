"""LayerNorm over the last axis."""

import numpy as np
import pytest
from helpers import check_op, forward_backward

from minidiff import ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


def formula(x, gamma, beta, eps=1e-5):
    y = np.empty_like(x)
    for i in np.ndindex(x.shape[:-1]):
        y[i] = gamma * (x[i] - x[i].mean()) / np.sqrt(x[i].var() + eps) + beta
    return y


@pytest.mark.parametrize("shape", [(7,), (5, 2), (0, 3), (3, 5, 17), (2, 1, 3, 9), (3, 257)])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_layer_norm(shape, eps, rng):
    x, (gamma, beta) = rng.standard_normal(shape) + 0.5, rng.standard_normal((2, shape[-1]))
    check_op(lambda *a: ops.layer_norm(*a, eps), lambda *a: formula(*a, eps), x, gamma, beta)


def test_one_channel_is_all_mean(rng):
    """With a single channel x - mean is zero: y is beta, and x has no influence."""
    x, one = rng.standard_normal((4, 1)), np.ones(1)
    y, (dx, dgamma, _) = forward_backward(ops.layer_norm, [x, one, one])
    assert np.array_equal(y, np.ones((4, 1)))
    assert not dx.any() and not dgamma.any()


def test_a_large_offset(rng):
    """mean(x^2) - mean(x)^2 would be noise here; two passes lose only the rounding of the mean."""
    x, (gamma, beta) = rng.integers(-8, 9, (5, 17)) / 4 + 1e4, rng.standard_normal((2, 17))
    check_op(ops.layer_norm, formula, x, gamma, beta, condition=100, dtypes=("float32",))
