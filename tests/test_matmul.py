"""The matrix product, with leading axes broadcast."""

import numpy as np
import pytest
from helpers import check_op

from minidiff import ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


@pytest.mark.parametrize(
    "a, b",
    [
        ((1, 1), (1, 1)),
        ((3, 5), (5, 7)),
        ((2, 3, 5), (5, 7)),
        ((3, 5), (2, 5, 1)),
        ((2, 1, 3, 5), (4, 5, 7)),
        ((1, 3, 5), (2, 5, 7)),
        ((0, 3, 5), (5, 7)),
    ],
)
def test_matmul(a, b, rng):
    def formula(a, b):
        return (a[..., :, :, None] * b[..., None, :, :]).sum(axis=-2)

    check_op(ops.matmul, formula, rng.standard_normal(a), rng.standard_normal(b))
    check_op(lambda a, b: a @ b, np.matmul, rng.standard_normal(a), rng.standard_normal(b))
