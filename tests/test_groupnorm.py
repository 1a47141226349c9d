"""GroupNorm in one group, some, or one for each channel; alone and followed by SiLU."""

import numpy as np
import pytest
from helpers import check_op

from minidiff import ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


def formula(x, gamma, beta, groups, eps=1e-5, silu=False):
    size = x.shape[-1] // groups
    z = np.empty_like(x)
    for b in range(x.shape[0]):
        for g in range(groups):
            here = (b, ..., slice(g * size, (g + 1) * size))
            z[here] = (x[here] - x[here].mean()) / np.sqrt(x[here].var() + eps)
    z = z * gamma + beta
    return z / (1 + np.exp(-z)) if silu else z


def draw(rng, shape):
    return rng.standard_normal(shape), rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])


def check(arrays, precision=None, **options):
    def op(*a):
        return ops.group_norm(*a, **options)

    check_op(op, lambda *a: formula(*a, **options), *arrays, **(precision or {}))


@pytest.mark.parametrize(
    "shape, groups",
    [
        ((3, 6), 1),
        ((3, 6), 3),
        ((2, 5, 6), 1),
        ((2, 5, 6), 2),
        ((2, 5, 6), 6),
        ((1, 3, 7, 5), 1),
        ((2, 3, 1, 9), 3),
        ((2, 3, 5, 10), 5),
        ((2, 1, 1, 4), 2),
        ((2, 2, 3, 2, 4), 2),
        ((2, 9, 11, 66), 33),
        ((0, 3, 3, 4), 2),
    ],
)
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm(shape, groups, silu, rng):
    check(draw(rng, shape), groups=groups, silu=silu)


def test_eps(rng):
    check(draw(rng, (2, 5, 6)), groups=2, eps=0.1)


@pytest.mark.parametrize("silu", [False, True])
def test_a_large_offset(silu, rng):
    """mean(x^2) - mean(x)^2 would be noise here; two passes lose only the rounding of the mean."""
    x, gamma, beta = draw(rng, (2, 5, 3, 6))
    arrays = np.round(4 * x) / 4 + 1e4, gamma, beta
    check(arrays, precision=dict(condition=100, dtypes=("float32",)), groups=2, silu=silu)


@pytest.mark.parametrize("silu", [False, True])
def test_scale_and_shift(silu, rng):
    """One scale and shift for each image, between the normalisation and the SiLU."""
    x, gamma, beta = draw(rng, (3, 4, 5, 6))
    scale, shift = rng.standard_normal((3, 6)), rng.standard_normal((3, 6))

    def scaled(x, gamma, beta, scale, shift):
        z = formula(x, gamma, beta, 2) * (1 + scale[:, None, None]) + shift[:, None, None]
        return z / (1 + np.exp(-z)) if silu else z

    check_op(
        lambda x, gamma, beta, scale, shift: ops.group_norm(x, gamma, beta, 2, silu=silu, scale=scale, shift=shift),
        scaled, x, gamma, beta, scale, shift,
    )  # fmt: skip
    with pytest.raises(ValueError, match="both scale and shift"):
        ops.group_norm(x, gamma, beta, 2, scale=scale)
    with pytest.raises(ValueError, match=r"must be \(3, 6\)"):
        ops.group_norm(x, gamma, beta, 2, scale=scale[:2], shift=shift[:2])
    check_op(
        lambda x, gamma, beta, scale, shift: ops.group_norm(x, gamma, beta, 2, silu=silu, scale=scale, shift=shift),
        scaled, x, gamma, beta, scale[:1], shift[:1],
    )  # fmt: skip


@pytest.mark.parametrize("C1, C2, groups", [(4, 2, 2), (3, 3, 3), (1, 5, 2), (40, 24, 4), (17, 16, 11)])
@pytest.mark.parametrize("silu", [False, True])
def test_a_second_input_beside_the_first(C1, C2, groups, silu, rng):
    """Groups may straddle the two: the result is that of the inputs joined."""
    x, x2 = rng.standard_normal((2, 3, 4, C1)) + 1, 2 * rng.standard_normal((2, 3, 4, C2))
    gamma, beta = rng.standard_normal((2, C1 + C2))
    check_op(
        lambda x, gamma, beta, x2: ops.group_norm(x, gamma, beta, groups, silu=silu, beside=x2),
        lambda x, gamma, beta, x2: formula(np.concatenate([x, x2], axis=-1), gamma, beta, groups, silu=silu),
        x, gamma, beta, x2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not lie beside"):
        ops.group_norm(x, gamma, beta, groups, beside=x2[:, :2])


def test_a_second_input_with_scale_and_shift(rng):
    x, x2, gamma, beta = (rng.standard_normal(s) for s in ((2, 3, 4), (2, 3, 2), (6,), (6,)))
    scale, shift = rng.standard_normal((2, 2, 6))
    check_op(
        lambda x, g, b, s, h, x2: ops.group_norm(x, g, b, 2, scale=s, shift=h, beside=x2),
        lambda x, g, b, s, h, x2: formula(np.concatenate([x, x2], axis=-1), g, b, 2) * (1 + s[:, None]) + h[:, None],
        x, gamma, beta, scale, shift, x2,
    )  # fmt: skip
