"""Linear layer: y = x W + b."""

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
