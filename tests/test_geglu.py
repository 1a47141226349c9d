"""GEGLU: half of the channels, gated by the GELU of the other half."""

import numpy as np
import pytest
from helpers import check_op
from test_gelu import FORMULAS

from minidiff import ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


@pytest.mark.parametrize("shape", [(2,), (0, 6), (5, 14), (2, 3, 10), (1, 1, 2)])
def test_geglu(shape, rng):
    def formula(x):
        a, g = np.split(x, 2, axis=-1)
        return a * FORMULAS["exact"](g)

    check_op(ops.geglu, formula, rng.standard_normal(shape))
