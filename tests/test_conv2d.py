"""Convolution against its definition, seven loops."""

import numpy as np
import pytest
from helpers import check_op

from minidiff import ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


def formula(x, w, b=None, stride=1, sides=((0, 0), (0, 0))):
    (top, bottom), (left, right) = sides
    B, H, W, C_in = x.shape
    kh, kw, _, C_out = w.shape
    H_out, W_out = (H + top + bottom - kh) // stride + 1, (W + left + right - kw) // stride + 1
    y = np.zeros((B, H_out, W_out, C_out))
    if b is not None:
        y += b
    for n, i, j, p, q in np.ndindex(B, H_out, W_out, kh, kw):
        row, column = stride * i + p - top, stride * j + q - left
        if 0 <= row < H and 0 <= column < W:
            for c in range(C_in):
                for d in range(C_out):
                    y[n, i, j, d] += x[n, row, column, c] * w[p, q, c, d]
    return y


@pytest.mark.parametrize(
    "x, w, stride, padding",
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0),
        ((2, 5, 3, 3), (1, 1, 3, 5), 1, 0),
        ((2, 5, 4, 3), (3, 3, 3, 2), 1, 1),
        ((1, 7, 5, 2), (3, 3, 2, 3), 2, 1),
        ((1, 6, 7, 3), (3, 3, 3, 1), 2, ((0, 1), (0, 1))),
        ((1, 6, 5, 1), (3, 3, 1, 3), 3, ((2, 0), (0, 3))),
        ((2, 3, 7, 2), (2, 5, 2, 3), 1, 0),
        ((1, 4, 6, 3), (2, 5, 3, 2), 2, ((1, 0), (2, 3))),
        ((1, 5, 5, 2), (1, 1, 2, 3), 2, 1),
        ((1, 3, 3, 5), (3, 3, 5, 7), 1, 0),
        ((1, 2, 2, 1), (5, 5, 1, 2), 1, 2),
        ((1, 3, 5, 17), (3, 3, 17, 33), 1, 1),
        ((0, 4, 4, 3), (3, 3, 3, 2), 1, 1),
    ],
)
def test_conv2d(x, w, stride, padding, rng):
    sides = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    inputs = rng.standard_normal(x), rng.standard_normal(w), rng.standard_normal(w[3])
    for arrays in (inputs, inputs[:2]):
        check_op(
            lambda x, w, b=None: ops.conv2d(x, w, b, stride, padding),
            lambda x, w, b=None: formula(x, w, b, stride, sides),
            *arrays,
        )


@pytest.mark.parametrize("stride, upsample", [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("silu", [False, True])
def test_what_stands_around_a_convolution(stride, upsample, silu, rng):
    """A second input beside the first, every pixel repeated, a shift for each image, a residual, SiLU of all that."""
    sides = ((1, 0), (1, 1))
    x, beside, w = (rng.standard_normal(s) for s in ((2, 3, 4, 3), (2, 3, 4, 2), (3, 3, 5, 4)))
    b, shift = rng.standard_normal(4), rng.standard_normal((2, 4))

    def whole(x, beside):
        return np.concatenate([x, beside], axis=3).repeat(upsample, axis=1).repeat(upsample, axis=2)

    def wanted(x, w, b, beside, shift, residual):
        y = formula(whole(x, beside), w, b, stride, sides) + shift[:, None, None] + residual
        return y / (1 + np.exp(-y)) if silu else y

    residual = rng.standard_normal(formula(whole(x, beside), w, b, stride, sides).shape)
    check_op(
        lambda x, w, b, beside, shift, residual: ops.conv2d(
            x, w, b, stride, sides, beside=beside, shift=shift, residual=residual, upsample=upsample, silu=silu
        ),
        wanted, x, w, b, beside, shift, residual,
    )  # fmt: skip


@pytest.mark.parametrize(
    "around, words",
    [
        ({"beside": np.zeros((1, 4, 4, 2))}, "does not fit weight"),
        ({"beside": np.zeros((1, 4, 3, 1))}, "does not lie beside"),
        ({"shift": np.zeros((1, 2))}, "shift"),
        ({"residual": np.zeros((1, 4, 4, 3))}, "residual"),
        ({"upsample": 0}, "upsample must be at least 1"),
    ],
)
def test_what_does_not_fit_around_a_convolution(around, words):
    channels = 3 - ("beside" in around and around["beside"].shape[2] == 3)
    with pytest.raises(ValueError, match=words):
        ops.conv2d(np.zeros((1, 4, 4, channels)), np.zeros((3, 3, 3, 5)), None, 1, 1, **around)


def test_one_by_one_of_two_inputs(rng):
    """A shortcut over a skip: two matrix products."""
    x, beside, w, b = (rng.standard_normal(s) for s in ((2, 3, 4, 3), (2, 3, 4, 2), (1, 1, 5, 4), (4,)))
    for silu in (False, True):
        check_op(
            lambda x, w, b, beside, silu=silu: ops.conv2d(x, w, b, beside=beside, silu=silu),
            lambda x, w, b, beside, silu=silu: (
                (y := np.concatenate([x, beside], axis=3) @ w[0, 0] + b) / (1 + np.exp(-y) if silu else 1)
            ),
            x, w, b, beside,
        )  # fmt: skip


def test_one_shift_for_all_images(rng):
    x, w, shift = (rng.standard_normal(s) for s in ((3, 4, 5, 2), (3, 3, 2, 4), (1, 4)))
    sides = ((1, 1), (1, 1))
    check_op(
        lambda x, w, shift: ops.conv2d(x, w, None, 1, 1, shift=shift),
        lambda x, w, shift: formula(x, w, None, 1, sides) + shift[:, None, None],
        x, w, shift,
    )  # fmt: skip
