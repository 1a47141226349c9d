"""The schedules against the papers' formulas worked out by hand, and against others' published figures."""

import math

import numpy as np
import pytest

from minidiff.schedule import (
    Schedule,
    cosine,
    karras_levels,
    linear,
    per_sample,
    scaled_linear,
    visited_timesteps,
    zero_terminal_snr,
)

MAKERS = [linear, scaled_linear, cosine]
LENGTHS = [1, 2, 3, 1000, 4000]


def close(actual, expected, rtol=1e-12, atol=0.0):
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, equal_nan=False)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("make", MAKERS)
def test_tables(make, T):
    with np.errstate(all="raise"):
        s = make(T)
        tables = s.beta, s.alpha, s.alpha_bar
    assert s.T == T
    for table in tables:
        assert table.shape == (T + 1,) and table.dtype == np.float64 and np.isfinite(table).all()
    assert s.beta[0] == 0 and s.alpha[0] == 1 and s.alpha_bar[0] == 1
    assert (s.beta[1:] > 0).all() and (s.beta < 1).all()
    assert (np.diff(s.beta) > 0).all()
    assert (np.diff(s.alpha_bar) < 0).all() and s.alpha_bar[-1] > 0
    close(s.alpha, 1 - s.beta)
    product = 1.0
    for t in range(1, T + 1):
        product *= 1 - s.beta[t]
        assert abs(s.alpha_bar[t] / product - 1) < 1e-12


def test_tables_are_float64_whatever_the_betas_are():
    s = Schedule(np.full(5, 0.1, np.float32))
    assert s.beta.dtype == s.alpha_bar.dtype == np.float64


def test_linear_by_hand():
    s = linear(1000)
    close(s.beta[[1, 2, 500, 1000]], [1e-4, 1e-4 + 0.0199 / 999, 1e-4 + 0.0199 * 499 / 999, 0.02])
    close(linear(3, 0.1, 0.3).beta, [0, 0.1, 0.2, 0.3])
    close(linear(3, 0.1, 0.3).alpha_bar, [1, 0.9, 0.72, 0.504])


def test_scaled_linear_by_hand():
    s = scaled_linear(1000)
    root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * 499 / 999
    close(s.beta[[1, 500, 1000]], [0.00085, root**2, 0.012])
    close(scaled_linear(3, 0.01, 0.09).beta, [0, 0.01, 0.04, 0.09])  # roots 0.1, 0.2, 0.3


def test_cosine_by_hand():
    s = cosine(1000)
    for t in (1, 250, 500, 999):
        f = math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        close(s.alpha_bar[t], f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rtol=1e-9)
    assert s.beta[1000] == 0.999
    f0, f1 = (math.cos(x / 1.008 * math.pi / 2) ** 2 for x in (0.008, 0.508))
    close(cosine(2).beta, [0, 1 - f1 / f0, 0.999])
    close(cosine(1).beta, [0, 0.999])
    close(cosine(100, s=0.0).alpha_bar[50], 0.5)  # cos^2(pi / 4)


@pytest.mark.parametrize("T", LENGTHS)
def test_cosine_beta_is_capped(T):
    assert cosine(T).beta.max() <= 0.999
    assert cosine(T, beta_max=0.5).beta.max() == 0.5


@pytest.mark.parametrize(
    ("schedule", "sigma_min", "sigma_max"),
    [(linear(), 0.0100, 157.407), (scaled_linear(), 0.0292, 14.6146)],  # as k-diffusion prints them
)
def test_published_noise_to_signal_ratios(schedule, sigma_min, sigma_max):
    ratio = np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)
    close(ratio[1], sigma_min, atol=5e-5)
    close(ratio[-1], sigma_max, rtol=5e-6)


def test_published_cosine_betas():
    close(cosine(1000).beta[[1, 2]], [4.1284e-5, 4.6142e-5], atol=5e-10)  # diffusers' squaredcos_cap_v2


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("T", LENGTHS)
def test_one_step_is_the_table(make, T):
    s = make(T)
    t = np.arange(1, T + 1)
    for values in (s.between(t), s.between(t, t - 1)):
        for value, table in zip(values[:3], (s.beta, s.alpha, s.alpha_bar), strict=True):
            np.testing.assert_array_equal(value, table[1:])
        np.testing.assert_array_equal(values[3], s.alpha_bar[:-1])


@pytest.mark.parametrize("make", MAKERS)
def test_strides_are_consistent(make):
    s = make(1000)
    rng = np.random.default_rng(0)
    t_prev = rng.integers(0, 1000, 500)
    t = rng.integers(t_prev + 1, 1001)
    with np.errstate(all="raise"):
        beta, alpha, alpha_bar, alpha_bar_prev = s.between(t, t_prev)
    close(alpha * alpha_bar_prev, alpha_bar)
    close(alpha + beta, np.ones(500))
    assert ((beta > 0) & (beta < 1)).all()
    for i in range(0, 500, 50):  # the product of the single steps
        close(alpha[i], np.prod(1 - s.beta[t_prev[i] + 1 : t[i] + 1]), rtol=1e-10)
    close(s.between(t, 0)[1], s.alpha_bar[t])


def test_between_takes_numbers_and_arrays():
    s = linear(10)
    assert all(np.ndim(v) == 0 for v in s.between(5, 2))
    arrays = s.between(np.array([5, 7]), np.array([2, 6]))
    for i, (t, t_prev) in enumerate([(5, 2), (7, 6)]):
        np.testing.assert_array_equal([v[i] for v in arrays], s.between(t, t_prev))


@pytest.mark.parametrize(
    "t",
    [
        0,
        11,
        -1,
        10.5,
        0.5,
        True,
        np.array([1, 0]),
        np.array([1, 11]),
        np.array([1.5, 0.5]),
        np.uint8(0),
        np.nan,
        "1",
    ],
    ids=repr,
)
def test_no_step_starts_there(t):
    with pytest.raises(ValueError, match="t"):
        linear(10).between(t)


@pytest.mark.parametrize(("t", "t_prev"), [(5, 5), (5, 6), (5, -1), (5, 5.5), (5, 11), (5, np.nan), ([3, 3], [2, 3])])
def test_no_step_ends_there(t, t_prev):
    with pytest.raises(ValueError, match="t"):
        linear(10).between(t, t_prev)


def test_alpha_bar_at():
    s = cosine(10)
    assert s.alpha_bar_at(0) == 1
    np.testing.assert_array_equal(s.alpha_bar_at(np.array([0, 10, 3])), s.alpha_bar[[0, 10, 3]])
    for t in (-1, 11, 10.5, np.nan):
        with pytest.raises(ValueError, match=r"numbers in 0\.\.10"):
            s.alpha_bar_at(t)


@pytest.mark.parametrize("make", MAKERS)
def test_levels_between_whole_numbers(make):
    """Falling, equal to the table on it, halfway in the logarithm of the noise level, and close to a finer schedule."""
    s = make(100)
    t = np.linspace(0, 100, 1001)
    alpha_bar = s.alpha_bar_at(t)
    np.testing.assert_array_equal(alpha_bar[::10], s.alpha_bar)
    np.testing.assert_array_equal(s.alpha_bar_at(np.arange(101.0)), s.alpha_bar)
    assert (np.diff(alpha_bar) < 0).all()
    level = np.sqrt((1 - alpha_bar) / alpha_bar)
    np.testing.assert_allclose(level[15::10] ** 2, level[10:-1:10] * level[20::10], rtol=1e-12)
    np.testing.assert_allclose(level[:10], level[10] * t[:10], rtol=1e-9, atol=0)
    for here, there in zip(s.between(57.5, 20.25)[2:], (57.5, 20.25), strict=True):
        assert here == s.alpha_bar_at(there)
    beta, alpha, alpha_bar, alpha_bar_prev = s.between(57.5, 20.25)
    assert alpha == alpha_bar / alpha_bar_prev and beta == 1 - alpha


@pytest.mark.parametrize(
    "betas", [[0.0, 0.1], [1.0, 0.1], [0.1, 1.1], [0.1, np.nan], [-0.1], [[0.1, 0.2]], []], ids=str
)
def test_impossible_betas(betas):
    with pytest.raises(ValueError, match="schedule"):
        Schedule(np.array(betas, dtype=np.float64))


@pytest.mark.parametrize("make", MAKERS)
def test_no_steps_at_all(make):
    with np.errstate(all="ignore"), pytest.raises(ValueError):
        make(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_per_sample(dtype):
    x = np.ones((2, 3, 4), dtype)
    assert per_sample(0.5, x).shape == ()
    c = per_sample(np.array([0.5, 0.25]), x)
    assert c.shape == (2, 1, 1) and c.dtype == dtype and (c * x).dtype == dtype
    close((c * x)[:, 0, 0], [0.5, 0.25])
    with pytest.raises(ValueError, match="3 timesteps for 2 samples"):
        per_sample(np.ones(3), x)


# ---- noise alone at the end


@pytest.mark.parametrize("make", MAKERS)
def test_zero_terminal_snr(make):
    """It ends at 0 and begins where it did; between, sqrt(alpha_bar) is an affine function of what it was."""
    before, after = (np.sqrt(s.alpha_bar[1:]) for s in (make(1000), zero_terminal_snr(make(1000))))
    assert after[-1] == 0 and (np.diff(after) < 0).all()
    close(after[0], before[0])
    close(
        (after[:-1] - after[1:]) / (before[:-1] - before[1:]), np.full(999, before[0] / (before[0] - before[-1])), 1e-6
    )
    with pytest.raises(ValueError, match="one step"):
        zero_terminal_snr(make(1))


@pytest.mark.parametrize("make", MAKERS)
def test_levels_beside_noise_alone(make):
    s = zero_terminal_snr(make(100))
    t = np.linspace(99, 100, 11)
    with np.errstate(all="raise"):
        alpha_bar = s.alpha_bar_at(t)
        beta, alpha, _, alpha_bar_prev = s.between(100, 99.5)
    assert alpha_bar[-1] == 0 and (np.diff(alpha_bar) < 0).all() and s.noise_level[-1] == np.inf
    level = np.sqrt((1 - alpha_bar[:-1]) / alpha_bar[:-1])
    close(1 / level, (100 - t[:-1]) / s.noise_level[99], 1e-9)
    assert (beta, alpha, alpha_bar_prev) == (1, 0, s.alpha_bar_at(99.5))
    assert s.t_at(np.inf) == 100


@pytest.mark.parametrize("make", [*MAKERS, lambda T: zero_terminal_snr(linear(T))])
def test_t_at_is_the_inverse(make):
    s = make(50)
    t = np.concatenate([np.linspace(0, 49.99, 1001), np.arange(51)])
    alpha_bar = s.alpha_bar_at(t)
    with np.errstate(divide="ignore"):
        level = np.sqrt((1 - alpha_bar) / alpha_bar)
    close(s.t_at(level), t, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(s.t_at(s.noise_level), np.arange(51))
    assert s.t_at(2 * s.noise_level[-1]) == 50


# ---- which levels are visited


def test_spacings_by_hand():
    """The table 2 of arXiv 2305.08891: T = 1000, 10 steps."""
    assert list(visited_timesteps(1000, 10, "leading")) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert list(np.round(visited_timesteps(1000, 10, "linspace"))) == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
    assert list(visited_timesteps(1000, 10, "trailing")) == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]
    assert list(visited_timesteps(1000, 4, "leading", offset=1)) == [752, 502, 252, 2]
    assert list(visited_timesteps(1000, 4, "leading", left_out=1)) == [801, 601, 401, 201]
    assert list(visited_timesteps(9, 4, "linspace", left_out=1)) == [9, 7, 5, 3]
    with pytest.raises(ValueError, match="leading, linspace, trailing"):
        visited_timesteps(10, 2, "trailling")
    for steps in (0, 11):
        with pytest.raises(ValueError, match=rf"in 1\.\.10, got {steps}"):
            visited_timesteps(10, steps)


def test_karras_levels_by_hand():
    levels = karras_levels(80.0, 0.002, 3)
    close(levels, [80, ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, 0.002])
    assert list(karras_levels(80.0, 0.002, 1)) == pytest.approx([80])
