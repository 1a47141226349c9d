"""GroupNorm in one group, some, or one for each channel; alone and followed by SiLU."""

import importlib

import numpy as np
import pytest
from helpers import assert_close, check_op, forward_backward

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
        ((2, 31, 12), 2),
        ((1, 3, 1100), 1),
        ((1, 2, 515), 1),
        ((0, 3, 3, 4), 2),
    ],
)
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm(shape, groups, silu, rng):
    check(draw(rng, shape), groups=groups, silu=silu)


@pytest.mark.parametrize("N", [24 * 24, 16 * 16, 15 * 15])
def test_a_stripe_that_with_its_sums_is_beyond_48_kib(N, rng):
    """Where the kernels keep a group in shared memory: forward, and backward x and dy, just below it and just above."""
    check(draw(rng, (1, N, 40)), dict(dtypes=("float32",)), groups=2)


def test_a_group_that_no_block_holds(rng):
    """Of 256 KiB: it is split where others would stay in shared memory."""
    arrays, dy = draw(rng, (1, 4096, 16)), rng.standard_normal((1, 4096, 16))

    def run(dtype):
        leaves = [a.astype(dtype) for a in arrays]
        return forward_backward(lambda *a: ops.group_norm(*a, groups=1), leaves, dy.astype(dtype))

    (y, grads), (wanted, exact) = run("float32"), run("float64")
    for got, reference in zip((y, *grads), (wanted, *exact), strict=True):
        assert_close(got, reference)


def emulator(kind):
    """The emulated kernels' module; for the other kinds there is nothing to pretend to."""
    if kind not in ("emulated", "checked"):
        pytest.skip("the device is what it is")
    return importlib.import_module(f"minidiff._{kind}")


@pytest.mark.parametrize("C", [8, 6])
def test_images_in_rounds(C, kernels_kind, rng):
    """Of five images the L2 keeps two: the split kernels take them in three rounds, and backward one by one."""
    module, x = emulator(kernels_kind), draw(rng, (5, 40, C))
    module.set_options(l2_bytes=2 * 2 * (40 * C * 4) + 100)
    try:
        check(x, groups=2, silu=True)
        launches = launches_of(module, x, groups=2)
    finally:
        module.set_options()
    if module.rung("group_norm") == 4:
        of_each = {"statistics": 3, "finish": 3, "apply": 3, "gradient_sums": 5, "finish_sums": 5, "apply_gradient": 5}
        assert launches == of_each


def test_a_large_group_stays_on_a_small_chip(kernels_kind, rng):
    """Some 70 KiB of one group: in one block, if there are no other multiprocessors that would have nothing to do."""
    module, x = emulator(kernels_kind), draw(rng, (1, 900, 20))
    split = {"statistics", "finish", "apply", "gradient_sums", "finish_sums", "apply_gradient"}
    for multiprocessors, kernels in (1, {"forward_on_chip", "backward_on_chip"}), (2, split):
        module.set_options(multiprocessors=multiprocessors)
        try:
            check(x, dict(dtypes=("float32",)), groups=1)
            launches = launches_of(module, x, groups=1)
        finally:
            module.set_options()
        if module.rung("group_norm") == 5:
            assert set(launches) == kernels


def launches_of(module, arrays, groups):
    """How often one pass forward and back launches each kernel."""
    module.reset_counts()
    forward_backward(lambda *a: ops.group_norm(*a, groups=groups), [a.astype(np.float32) for a in arrays])
    return {name.partition("<")[0]: count["launches"] for name, count in module.counts().items()}


def test_silu_far_from_zero(rng):
    """Where e^-z overflows, or is so large that a fast division by it gives 0."""
    x, gamma, _ = draw(rng, (2, 9, 8))
    beta = np.array([-300.0, -100, -88, -40, 0, 40, 88, 300])
    check((x, gamma, beta), dict(dtypes=("float32",)), groups=2, silu=True)


def test_silu_at_minus_infinity(kernels_kind, rng):
    if kernels_kind not in ("emulated", "checked", "cuda"):
        pytest.skip("it is NumPy's 0 * infinity there")
    x, gamma, beta = (a.astype(np.float32) for a in draw(rng, (2, 9, 8)))
    beta[3] = -np.inf
    y, grads = forward_backward(lambda *a: ops.group_norm(*a, groups=2, silu=True), [x, gamma, beta])
    assert not y[..., 3].any()
    assert all(np.isfinite(g).all() for g in (y, *grads)) and not grads[2][3]


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
