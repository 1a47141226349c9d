"""Linear layer: y = x W + b, and what may stand behind it."""

import math

import numpy as np
import pytest
from helpers import check_op

from minidiff import ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


def formula(x, w, b=None):
    y = np.zeros((*x.shape[:-1], w.shape[1]))
    for row in np.ndindex(x.shape[:-1]):
        for j in range(w.shape[1]):
            y[row][j] = sum(x[row][i] * w[i, j] for i in range(len(w))) + (0 if b is None else b[j])
    return y


@pytest.mark.parametrize("leading", [(), (1,), (0,), (7,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("d_in, d_out", [(1, 1), (5, 7), (17, 1), (1, 3), (37, 65)])
def test_linear(leading, d_in, d_out, rng):
    x, w = rng.standard_normal((*leading, d_in)), rng.standard_normal((d_in, d_out))
    check_op(ops.linear, formula, x, w, rng.standard_normal(d_out))
    check_op(ops.linear, formula, x, w)


def test_a_residual_is_added(rng):
    x, w, b, residual = (rng.standard_normal(s) for s in ((2, 3, 5), (5, 4), (4,), (2, 3, 4)))
    check_op(ops.linear, lambda x, w, b, r: x @ w + b + r, x, w, b, residual)
    check_op(lambda x, w, r: ops.linear(x, w, None, r), lambda x, w, r: x @ w + r, x, w, residual)
    with pytest.raises(ValueError, match="residual"):
        ops.linear(x, w, b, residual[:1])


SIGMOID = {"silu": 1.0, "gelu_quick": 1.702}


def activated(y, name):
    if name in SIGMOID:
        return y / (1 + np.exp(-SIGMOID[name] * y))
    if name == "gelu_tanh":
        return y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    if name == "geglu":
        a, g = np.split(y, 2, axis=-1)
        return a * activated(g, "gelu_exact")
    return y / 2 * (1 + np.vectorize(math.erf, otypes=[float])(y / np.sqrt(2)))


@pytest.mark.parametrize("activation", ["silu", "gelu_exact", "gelu_tanh", "gelu_quick", "geglu"])
@pytest.mark.parametrize("rows, d_in, d_out", [(3, 5, 2), (7, 17, 34), (1, 1, 6), (0, 2, 4), (9, 20, 130)])
def test_an_activation_behind_it(activation, rows, d_in, d_out, rng):
    x, w, b = rng.standard_normal((rows, d_in)), rng.standard_normal((d_in, d_out)) / 4, rng.standard_normal(d_out)
    check_op(
        lambda *a: ops.linear(*a, activation=activation), lambda x, w, b: activated(x @ w + b, activation), x, w, b
    )


def test_an_activation_that_does_not_fit(rng):
    x, w, b, residual = (rng.standard_normal(s) for s in ((2, 3, 5), (5, 4), (4,), (2, 3, 4)))
    for activation, extra, words in (("relu", None, "not one of"), ("silu", residual, "not both")):
        with pytest.raises(ValueError, match=words):
            ops.linear(x, w, b, extra, activation=activation)
    with pytest.raises(ValueError, match="even number"):
        ops.linear(x, w[:, :3], activation="geglu")
