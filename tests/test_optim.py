from itertools import pairwise

import numpy as np
import pytest
from helpers import placed

from minidiff.backend import to_numpy
from minidiff.nn import Parameter
from minidiff.optim import AdamW, Muon, clip_factor, gradient_norm, learning_rate, orthogonalised


def parameter(data, hidden=False):
    p = Parameter(data.shape, "zeros", hidden)
    p.data = placed(data.copy())
    return p


def test_adamw_follows_the_papers_algorithm(kernels_kind, rng):
    """Against the textbook recursion in float64, several steps, a matrix (decays) and a vector (does not)."""
    start = {"w": rng.normal(size=(3, 5)), "b": rng.normal(size=5)}
    grads = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(4)]
    parameters = {k: parameter(v.astype(np.float32)) for k, v in start.items()}
    optimizer = AdamW(parameters, betas=(0.8, 0.95), weight_decay=0.1, ema_decay=0.5)
    for g in grads:
        optimizer.step(0.01, {k: placed(v.astype(np.float32)) for k, v in g.items()})

    for name, decay in (("w", 0.1), ("b", 0.0)):
        p, m, v, ema = start[name], 0, 0, start[name]
        for n, g in enumerate(grads, 1):
            m = 0.8 * m + 0.2 * g[name]
            v = 0.95 * v + 0.05 * g[name] ** 2
            p = p - 0.01 * (m / (1 - 0.8**n) / (np.sqrt(v / (1 - 0.95**n)) + 1e-8) + decay * p)
            d = min(0.5, (1 + n) / (10 + n))
            ema = d * ema + (1 - d) * p
        assert np.abs(to_numpy(parameters[name].data) - p).max() < 1e-6
        assert np.abs(to_numpy(optimizer.ema[name]) - ema).max() < 1e-6


def test_orthogonalised_keeps_the_singular_vectors_and_levels_their_values(rng):
    """Squares, wide and tall matrices, some of one size, at once; and zeros stay zeros."""
    shapes = ((5, 5), (7, 30), (30, 7), (1, 4), (5, 5), (5, 9))
    factors = [np.linalg.svd(rng.normal(size=shape), full_matrices=False) for shape in shapes]
    matrices = [(u * np.geomspace(1, 0.05, len(s))) @ vt * 1e-4 for u, s, vt in factors]
    for (u, _, vt), x in zip(factors, orthogonalised(matrices), strict=True):
        levelled = u.T @ x @ vt.T
        assert np.abs(levelled - np.diag(np.diag(levelled))).max() < 1e-8
        assert 0.6 < np.diag(levelled).min() <= np.diag(levelled).max() < 1.3
    zeros = orthogonalised([np.zeros((3, 4), np.float32)])[0]
    assert not zeros.any() and zeros.dtype == np.float32


def test_muon_follows_its_algorithm_where_adamw_does_not(kernels_kind, rng):
    """Hidden kernels and matrices by Muon, here through the singular value decomposition; the rest by AdamW."""
    start = {"kernel": rng.normal(size=(1, 1, 4, 6)), "first": rng.normal(size=(3, 5)), "bias": rng.normal(size=5)}
    grads = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(4)]
    optimizers = []
    for kind in (Muon, AdamW):
        parameters = {k: parameter(v.astype(np.float32), hidden=k == "kernel") for k, v in start.items()}
        optimizers.append(kind(parameters, weight_decay=0.1, ema_decay=0.5))
        for g in grads:
            optimizers[-1].step(0.01, {k: placed(v.astype(np.float32)) for k, v in g.items()})
    muon, adamw = optimizers
    for name in ("first", "bias"):
        assert np.array_equal(to_numpy(muon.parameters[name].data), to_numpy(adamw.parameters[name].data))

    p, m = start["kernel"].reshape(4, 6), 0
    ema = p
    for n, g in enumerate(grads, 1):
        g = g["kernel"].reshape(4, 6)
        m = 0.95 * m + 0.05 * g
        u, s, vt = np.linalg.svd(0.05 * g + 0.95 * m, full_matrices=False)
        s = s / np.sqrt((s * s).sum())
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        p = p - 0.1 * ((u * s) @ vt * np.sqrt(6 / 4) + 0.01 * p)
        d = min(0.5, (1 + n) / (10 + n))
        ema = d * ema + (1 - d) * p
    assert np.abs(to_numpy(muon.parameters["kernel"].data).reshape(4, 6) - p).max() < 1e-5
    assert np.abs(to_numpy(muon.ema["kernel"]).reshape(4, 6) - ema).max() < 1e-5


def test_the_average_does_not_remember_its_beginning():
    """EMA with warm-up: after 100 steps of a parameter that jumped to 1 at once, the average is there too."""
    p = parameter(np.zeros((1, 1), np.float32))
    optimizer = AdamW({"p": p}, ema_decay=0.9999, weight_decay=0.0)
    p.data[:] = 1
    for _ in range(100):
        optimizer.step(0.0, {"p": np.zeros((1, 1), np.float32)})
    assert optimizer.ema["p"].item() > 0.99


def test_norm_and_clipping():
    grads = [np.full((2, 2), 3.0, np.float32), np.full(4, 4.0, np.float32)]
    assert gradient_norm(grads) == pytest.approx(10.0)
    assert clip_factor(10.0, 1.0) == pytest.approx(0.1)
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(0.0, 1.0) == 1.0


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(n, 100, 1.0, 10) for n in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0 == max(rates)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[54] == pytest.approx(0.5)  # half-way down the cosine
