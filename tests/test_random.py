"""Philox against the published vectors; a number depends on (seed, sample, step, purpose, element) alone."""

import math

import numpy as np
import pytest
from helpers import placed

from minidiff import random
from minidiff.backend import to_numpy
from minidiff.random import Purpose, normal, philox, uniform

N = 100_000
PI_COUNTER, PI_KEY = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0_A4093822

# The known-answer file (kat_vectors) of Random123, the authors' own implementation.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def one(n=N, seed=0, sample=0, step=0, purpose=Purpose.START_NOISE):
    return normal(seed, [sample], step, purpose, (n,))[0].astype(np.float64)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    assert tuple(int(w) for w in philox(*(np.uint64(c) for c in counter), key)) == words


def test_philox_of_an_array_is_philox_of_each_element():
    counters = np.random.default_rng(0).integers(2**32, size=(4, 7), dtype=np.uint64)
    together = np.stack(philox(*counters, seed=99))
    alone = [np.concatenate(philox(*(c[i : i + 1] for c in counters), seed=99)) for i in range(7)]
    np.testing.assert_array_equal(together.T, alone)


def test_the_counter_is_block_sample_step_purpose():
    u = uniform(PI_KEY, [6, 5], 7, Purpose.DROP_CAPTION, elements=11)
    for row, sample in enumerate([6, 5]):
        for e in range(11):
            counter = (np.uint64(c) for c in (e // 4, sample, 7, Purpose.DROP_CAPTION))
            assert u[row, e] == int(philox(*counter, PI_KEY)[e % 4]) / 2**32


def test_purposes_keep_their_numbers():
    """They are part of every picture ever drawn: renumbering them would change the seeds' meaning."""
    assert {p.name: int(p) for p in Purpose} == {
        "PARAMETERS": 0,
        "TRAIN_NOISE": 1,
        "TRAIN_TIMESTEP": 2,
        "DROP_CAPTION": 3,
        "START_NOISE": 4,
        "STEP_NOISE": 5,
        "PICTURES": 6,
    }


def test_normal_is_box_muller_of_the_published_words():
    a, b, c, d = KNOWN[0][2]
    expected = []
    for radius_word, angle_word in ((a, b), (c, d)):
        radius, angle = math.sqrt(-2 * math.log((radius_word + 1) / 2**32)), 2 * math.pi * angle_word / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    got = normal(0, [0], 0, Purpose.PARAMETERS, (4,))[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5, equal_nan=False)


@pytest.mark.parametrize("shape", [(1,), (3,), (4, 4, 3), (5, 1), ()])
def test_a_sample_does_not_depend_on_its_batch(shape):
    batch = normal(3, range(8), 2, Purpose.STEP_NOISE, shape)
    assert batch.shape == (8, *shape) and batch.dtype == np.float32
    for i in (0, 5, 7):
        np.testing.assert_array_equal(normal(3, [i], 2, Purpose.STEP_NOISE, shape)[0], batch[i])
    np.testing.assert_array_equal(normal(3, [5, 0, 5], 2, Purpose.STEP_NOISE, shape), batch[[5, 0, 5]])
    u = uniform(3, range(8), 2, Purpose.STEP_NOISE, 5)
    np.testing.assert_array_equal(uniform(3, [7, 2], 2, Purpose.STEP_NOISE, 5), u[[7, 2]])


def test_elements_count_in_c_order():
    """A shorter list is a prefix of a longer one. A smaller picture is not a crop of a larger one."""
    flat = normal(1, [0], 0, Purpose.START_NOISE, (101,))[0]
    for shape in [(2, 3), (5, 5, 4), (7,), (1, 1, 1)]:
        x = normal(1, [0], 0, Purpose.START_NOISE, shape)[0]
        np.testing.assert_array_equal(x.ravel(), flat[: x.size])
    wide = normal(1, [0], 0, Purpose.START_NOISE, (4, 4))[0]
    assert not np.array_equal(wide[:2, :2], normal(1, [0], 0, Purpose.START_NOISE, (2, 2))[0])
    np.testing.assert_array_equal(
        uniform(1, [0], 0, Purpose.START_NOISE, 5), uniform(1, [0], 0, Purpose.START_NOISE, 50)[:, :5]
    )


OTHERS = [
    {"seed": 1},
    {"seed": 2**32},
    {"seed": 2**63},
    {"sample": 1},
    {"step": 1},
    {"purpose": Purpose.STEP_NOISE},
    {"purpose": Purpose.TRAIN_NOISE},
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_streams_are_uncorrelated(other):
    """|r| < 4.5 / sqrt(n), which chance exceeds once in 150,000; for the numbers and their squares."""
    a, b = one(), one(**other)
    assert (a == b).mean() < 1e-3
    for f in (lambda x: x, np.square):
        for shift in (0, 1, 2):
            r = np.corrcoef(f(a), f(np.roll(b, shift)))[0, 1]
            assert abs(r) < 4.5 / math.sqrt(N)


def test_neighbours_are_uncorrelated():
    x = one()
    for f in (lambda x: x, np.square):
        for lag in (1, 2, 3, 4, 8, 32):  # lag 1 holds the Box-Muller pairs, lag 4 the next Philox block
            r = np.corrcoef(f(x[:-lag]), f(x[lag:]))[0, 1]
            assert abs(r) < 4.5 / math.sqrt(N)


def check_normal(x):
    """Moments 1 to 4 within 4.5 standard errors, and Kolmogorov-Smirnov at p = 0.0002: sqrt(n) D < 2.15."""
    n = len(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 4.5 * math.sqrt(variance / n)
    cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in np.sort(x)])
    distance = max((np.arange(1, n + 1) / n - cdf).max(), (cdf - np.arange(n) / n).max())
    assert distance * math.sqrt(n) < 2.15


def test_numbers_of_one_sample_are_normal():
    check_normal(one())


def test_numbers_across_samples_and_steps_are_normal():
    x = [normal(2**40, range(1000), step, Purpose.STEP_NOISE, (10,)).ravel() for step in range(10)]
    check_normal(np.concatenate(x).astype(np.float64))


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x * 1.02,
        lambda x: x + 0.02,
        np.abs,
        lambda x: x + 0.1 * (x**2 - 1),
        lambda x: np.clip(x, -2, 2),
    ],
)
def test_the_check_of_normality_notices(fault):
    with pytest.raises(AssertionError):
        check_normal(fault(one()))


def test_normal_is_finite_for_every_word(monkeypatch):
    top = 2**32
    edges = [0, 1, 2, 127, 128, 2**24, 2**30, 2**31 - 1, 2**31, top - 257, top - 129, top - 128, top - 1]
    words = np.array([(a, b) for a in edges for b in edges], np.uint64).reshape(1, -1)
    monkeypatch.setattr(random, "_words", lambda *args: words)
    with np.errstate(all="raise"):
        x = normal.reference(0, [0], 0, Purpose.START_NOISE, (words.size,))[0].astype(np.float64)
    assert np.isfinite(x).all()
    u, angle = (words[0, ::2] + 1) / 2**32, words[0, 1::2] / 2**32 * 2 * math.pi
    radius = np.sqrt(-2 * np.log(u))
    assert abs(x).max() == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)  # a = 0: the largest there is
    # float32 keeps 24 bits of u, so near u = 1 the radius is known to sqrt(2 * 2^-24) only
    np.testing.assert_allclose(x[::2], radius * np.cos(angle), rtol=0, atol=4e-4, equal_nan=False)
    np.testing.assert_allclose(x[1::2], radius * np.sin(angle), rtol=0, atol=4e-4, equal_nan=False)


def test_uniform_is_in_0_1(monkeypatch):
    u = uniform(0, range(10), 0, Purpose.TRAIN_TIMESTEP, N // 10)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 4.5 * math.sqrt(1 / 12 / N)
    assert abs((u**2).mean() - 1 / 3) < 4.5 * math.sqrt(4 / 45 / N)
    counts = np.bincount((u.ravel() * 100).astype(int), minlength=100)
    chi2 = ((counts - N / 100) ** 2 / (N / 100)).sum()
    assert abs(chi2 - 99) < 4.5 * math.sqrt(2 * 99)
    monkeypatch.setattr(random, "_words", lambda *args: np.array([[0, 2**32 - 1]], np.uint64))
    low, high = uniform(0, [0], 0, Purpose.TRAIN_TIMESTEP, 2)[0]
    assert low == 0 and high == 1 - 2**-32


@pytest.mark.parametrize("seed, sample, step", [(-1, 0, 0), (2**64, 0, 0), (0, 2**32, 0), (0, 0, 2**32), (0, -1, 0)])
def test_numbers_beyond_the_counter_are_refused(seed, sample, step):
    for draw in (uniform, normal):
        with pytest.raises(ValueError, match=r"must be in 0\.\.2"):
            draw(seed, [sample], step, Purpose.START_NOISE, 4 if draw is uniform else (4,))


def test_every_kind_of_kernels_draws_the_same_numbers(kernels_kind):
    """To 1e-5: logarithm and cosine differ in the last digits, the 32-bit words do not. Ragged and large numbers."""
    for seed, samples, step, shape in (
        (0, [0], 0, (1,)),
        (2**64 - 1, [0, 2**32 - 1, 7], 2**32 - 1, (3, 7)),
        (12345, range(5), 9, (130, 67)),
        (3, [], 1, (4,)),
        (3, [1], 1, (0,)),
    ):
        x = normal(seed, samples, step, Purpose.STEP_NOISE, shape, placed(np.zeros(1, np.float32)))
        wanted = normal.reference(seed, samples, step, Purpose.STEP_NOISE, shape)
        assert x.shape == wanted.shape and x.dtype == np.float32
        assert np.abs(to_numpy(x) - wanted).max(initial=0) < 1e-5
    for kernel in (normal, normal.reference):
        with pytest.raises(ValueError, match="seed"):
            kernel(2**64, [0], 0, Purpose.STEP_NOISE, (1,))


def test_the_largest_and_the_smallest_numbers_agree(kernels_kind):
    """A million numbers: u near 0 gives the largest, u near 1 the smallest radius."""
    x = to_numpy(normal(1, [0], 0, Purpose.TRAIN_NOISE, (1_000_000,), placed(np.zeros(1, np.float32))))[0]
    wanted = normal.reference(1, [0], 0, Purpose.TRAIN_NOISE, (1_000_000,))[0]
    assert np.abs(x - wanted).max() < 1e-5 and np.abs(wanted).max() > 4.5
