"""The sinusoidal embedding of a number."""

import math

import numpy as np
import pytest
from helpers import assert_close

from minidiff import ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


@pytest.mark.parametrize("t", [[0.0], [0, 1, 999], [-0.5, 0.25, 17.75], []], ids=str)
@pytest.mark.parametrize("dim", [2, 6, 7, 64])
@pytest.mark.parametrize("sin_first", [False, True])
@pytest.mark.parametrize("shift, period", [(0.0, 10000.0), (0.5, 100.0)])
def test_timestep_embedding(t, dim, sin_first, shift, period):
    wanted = np.zeros((len(t), dim))
    half = dim // 2
    for row, time in zip(wanted, t, strict=True):
        for i in range(half):
            angle = time * period ** (-i / (half - shift))
            row[i], row[half + i] = math.cos(angle), math.sin(angle)
            if sin_first:
                row[i], row[half + i] = row[half + i], row[i]
    emb = ops.timestep_embedding(np.array(t), dim, sin_first, shift, period)
    assert emb.dtype == np.float32
    assert_close(emb, wanted)


def test_integers_and_floats_give_the_same():
    t = np.array([0, 3, 1000])
    assert np.array_equal(ops.timestep_embedding(t, 32), ops.timestep_embedding(t.astype(np.float32), 32))
