"""Attention against its definition, one query after another."""

import math

import numpy as np
import pytest
from helpers import assert_close, check_op, placed

from minidiff import Tensor, ops

pytestmark = pytest.mark.usefixtures("kernels_kind")


def formula(q, k, v, bias=0.0, heads=1, scale=None, mask=None, causal=False):
    B, Lq, Lk, d, dv = *q.shape[:2], k.shape[1], q.shape[2] // heads, v.shape[2] // heads
    scale = scale or 1 / math.sqrt(d)
    bias = np.broadcast_to(bias, (B, heads, Lq, Lk))
    y = np.empty((B, Lq, heads * dv))
    for b, h, i in np.ndindex(B, heads, Lq):
        seen = [j for j in range(Lk) if (mask is None or mask[b, j]) and (not causal or j <= i)]
        here = slice(h * d, (h + 1) * d)
        scores = [q[b, i, here] @ k[b, j, here] * scale + bias[b, h, i, j] for j in seen]
        weights = np.exp(np.array(scores) - max(scores))
        y[b, i, h * dv : (h + 1) * dv] = weights / weights.sum() @ v[b, seen, h * dv : (h + 1) * dv]
    return y


def check(rng, B, Lq, Lk, D, Dv, bias=None, **options):
    arrays = [rng.standard_normal(s) for s in ((B, Lq, D), (B, Lk, D), (B, Lk, Dv))]
    if bias is not None:
        arrays.append(rng.standard_normal(bias))
    check_op(
        lambda q, k, v, bias=None: ops.attention(q, k, v, bias=bias, **options),
        lambda q, k, v, bias=0.0: formula(q, k, v, bias, **options),
        *arrays,
    )


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("B, Lq, Lk", [(1, 1, 1), (2, 3, 5), (2, 5, 3), (1, 7, 1), (1, 33, 67), (0, 3, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(heads, B, Lq, Lk, causal, rng):
    check(rng, B, Lq, Lk, 3 * heads, 5 * heads, heads=heads, causal=causal)


def test_scale(rng):
    check(rng, 2, 3, 5, 6, 6, heads=2, scale=0.3)


@pytest.mark.parametrize(
    "bias", [(2, 3, 4, 5), (1, 3, 4, 5), (3, 1, 1), (4, 5), (5,), (2, 1, 1, 5), (2, 1, 4, 1), (1, 1), ()]
)
def test_bias(bias, rng):
    check(rng, 2, 4, 5, 6, 3, bias=bias, heads=3)


@pytest.mark.parametrize("bias", [None, (2, 1, 5), (2, 2, 4, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_mask(bias, causal, rng):
    mask = np.array([[True, True, False, True, False], [True] * 5])
    check(rng, 2, 4, 5, 6, 4, bias=bias, heads=2, mask=mask, causal=causal)


def test_hidden_keys_have_no_influence(rng):
    q, k, v = (rng.standard_normal((1, 4, 6)) for _ in range(3))
    mask = np.array([[True, False, True, True]])
    before = ops.attention(Tensor(q), Tensor(k), Tensor(v), heads=2, mask=mask).data
    k[:, 1], v[:, 1] = 1e6, -1e6
    after = ops.attention(Tensor(q), Tensor(k), Tensor(v), heads=2, mask=mask).data
    assert np.array_equal(before, after)


@pytest.mark.filterwarnings("error")
def test_large_scores_do_not_overflow(rng):
    """All keys are alike, so every query takes the mean of the values, with scores of 1e4 as well."""
    q, k = np.full((1, 3, 4), 100, np.float32), np.full((1, 5, 4), 50, np.float32)
    v = rng.standard_normal((1, 5, 4)).astype(np.float32)
    y = ops.attention(*(Tensor(placed(a)) for a in (q, k, v))).data
    assert_close(y, np.broadcast_to(v.mean(axis=1, keepdims=True, dtype=np.float64), y.shape))
