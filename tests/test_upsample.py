"""Nearest-neighbour upsampling."""

import numpy as np
import pytest
from helpers import check_op

from minidiff import ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 1, 4, 3), (0, 2, 2, 3)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_upsample_nearest(shape, factor, rng):
    def formula(x):
        B, H, W, C = x.shape
        y = np.empty((B, factor * H, factor * W, C))
        for i in range(factor * H):
            for j in range(factor * W):
                y[:, i, j] = x[:, i // factor, j // factor]
        return y

    check_op(lambda x: ops.upsample_nearest(x, factor), formula, rng.standard_normal(shape))
