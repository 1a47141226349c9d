"""Samplers given the exact score: whole walks must end where theory says, and planted faults must be noticed.

If x0 follows a Gaussian mixture, x_t follows the mixture with means sqrt(alpha_bar) m and variances
alpha_bar s^2 + 1 - alpha_bar, so the perfect network is known in closed form:
eps = -sqrt(1 - alpha_bar) grad log q(x_t).
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from minidiff import Tensor, diffusion, samplers
from minidiff.config import SampleConfig
from minidiff.diffusion import PREDICTIONS, Guidance, guide, predict_x0, q_sample
from minidiff.random import Draw, Purpose, normal
from minidiff.sample import denoise
from minidiff.samplers import SAMPLERS, ddim, ddpm, spaced_timesteps
from minidiff.schedule import Schedule, cosine, linear, scaled_linear, zero_terminal_snr

SCHEDULES = {"linear": linear(), "scaled_linear": scaled_linear(), "cosine": cosine()}
KINDS = ["small", "large", 0.0, 0.5, 1.0]  # DDPM's sigma, or DDIM's eta

every_schedule = pytest.mark.parametrize("s", SCHEDULES.values(), ids=SCHEDULES)


def close(actual, expected, rtol=1e-10, atol=0.0):
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, equal_nan=False)


def walk(kind, model, x_T, timesteps, schedule, noise, clip=None):
    """The steps of DDPM with sigma `kind`, or of DDIM with eta `kind`, unguided."""
    if isinstance(kind, str):
        return list(ddpm(model, x_T, None, None, 1, timesteps, schedule, noise, kind, clip))
    return list(ddim(model, x_T, None, None, 1, timesteps, schedule, noise, kind, clip))


def draw_noise(shape, seed=0, dtype=np.float64):
    """noise(i), each a fresh draw."""
    return lambda i: np.random.default_rng([seed, i]).standard_normal(shape).astype(dtype)


# ---- the walk


@pytest.mark.parametrize("T", [1, 2, 3, 7, 10, 64, 99])
def test_every_number_of_steps_falls_from_T_to_0(T):
    for steps in range(1, T + 1):
        ts = spaced_timesteps(T, steps)
        assert len(ts) == steps + 1 and ts[0] == T and ts[-1] == 0
        assert all(isinstance(t, int) for t in ts)
        gaps = -np.diff(ts)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_spaced_timesteps_of_1000():
    for steps in range(1, 1001):
        ts = spaced_timesteps(1000, steps)
        assert len(ts) == steps + 1 and ts[0] == 1000 and ts[-1] == 0 and (np.diff(ts) < 0).all()
    assert spaced_timesteps(1000, 1000) == list(range(1000, -1, -1))
    assert spaced_timesteps(1000, 4) == [1000, 750, 500, 250, 0]


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(ValueError, match=f"in 1..10, got {steps}"):
        spaced_timesteps(10, steps)


@pytest.mark.parametrize(
    "timesteps", [[], [10], [11, 5], [5, 5], [3, 5], [5, 0, 0], [5, -1], [0], [10, np.nan, 0]], ids=str
)
@pytest.mark.parametrize("kind", ["small", 0.0])
def test_impossible_timesteps(kind, timesteps):
    asked, x = [], np.ones((1, 1))
    with pytest.raises(ValueError, match="timesteps must fall from at most 10 to at least 0"):
        walk(kind, lambda x, t, c: asked.append(t), x, timesteps, linear(10), lambda i: x)
    assert not asked


@pytest.mark.parametrize("kind", ["small", 0.0])
def test_a_walk_may_end_before_the_image_and_go_on_later(kind):
    """Levels between whole numbers too; the noise of a step is asked for by its number in the walk."""
    x_T, model = draw_noise((2, 3), seed=1)(0), lambda x, t, c: np.tanh(x)
    z = draw_noise((2, 3))
    ts = [9.5, 7, 3.25, 0.5, 0]
    whole = walk(kind, model, x_T, ts, linear(10), z)
    first = walk(kind, model, x_T, ts[:3], linear(10), z)
    rest = walk(kind, model, first[-1].x_prev, ts[2:], linear(10), lambda i: z(i + 2))
    assert [(step.t, step.t_prev) for step in whole] == list(itertools.pairwise(ts))
    np.testing.assert_array_equal(rest[-1].x_prev, whole[-1].x_prev)
    close(whole[-1].x_prev, whole[-1].x0, atol=1e-10)


def test_impossible_options():
    x, s = np.ones((1, 1)), linear(10)
    for eta in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"eta must be in 0\.\.1"):
            walk(eta, lambda x, t, c: x, x, [10, 0], s, draw_noise(x.shape))
    with pytest.raises(ValueError, match="noise"):
        walk(0.5, lambda x, t, c: x, x, [10, 0], s, None)
    with pytest.raises(ValueError, match="neither 'small' nor 'large'"):
        walk("medium", lambda x, t, c: x, x, [10, 5, 0], s, draw_noise(x.shape))


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 0.8])
def test_steps_are_linked(s, kind, clip):
    x_T = draw_noise((3, 2, 2), seed=1)(0)
    ts = [1000, 700, 699, 20, 1, 0]
    seen = []

    def model(x_t, t, cond):
        seen.append((x_t, list(t)))
        return np.tanh(x_t)

    steps = walk(kind, model, x_T, ts, s, draw_noise((3, 2, 2)), clip)
    assert [(step.t, step.t_prev) for step in steps] == list(itertools.pairwise(ts))
    assert [t for _, t in seen] == [[t] * 3 for t in ts[:-1]]
    assert steps[0].x_t is x_T
    for a, b in itertools.pairwise(steps):
        assert a.x_prev is b.x_t
    for step, (x_t, _) in zip(steps, seen, strict=True):
        assert step.x_t is x_t
        close(step.x0, predict_x0(step.x_t, step.t, step.eps, s), rtol=1e-7, atol=1e-9)
        close(q_sample(step.x0, step.t, step.eps, s), step.x_t, atol=1e-10)
        if clip is None:
            np.testing.assert_array_equal(step.eps, np.tanh(x_t))
        else:
            assert abs(step.x0).max() <= clip + 1e-9
    close(steps[-1].x_prev, steps[-1].x0, atol=1e-10)


def test_noise_is_asked_for_by_step_number():
    """DDIM with eta = 0 asks for none. Whether the last step, which adds none, asks is left open."""
    asked = []

    def noise(i):
        asked.append(i)
        return np.zeros((2, 1))

    for kind in KINDS:
        asked.clear()
        walk(kind, lambda x, t, c: 0 * x, np.ones((2, 1)), [9, 5, 2, 0], linear(10), noise)
        assert asked[:2] == ([] if kind == 0 else [0, 1]) and asked[2:] in ([], [2])


@every_schedule
def test_ddim_with_eta_1_is_ddpm_step_by_step(s):
    x_T, noise, ts = draw_noise((4, 3), seed=1)(0), draw_noise((4, 3)), spaced_timesteps(1000, 37)
    a, b = (walk(kind, lambda x, t, c: np.tanh(x), x_T, ts, s, noise) for kind in ("small", 1.0))
    for p, q in zip(a, b, strict=True):
        scale = abs(p.x_prev).max()
        close(q.x_prev, p.x_prev, rtol=0, atol=1e-9 * scale)
        close(q.eps, p.eps, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_reaches_the_samplers(kind):
    """A model whose answer is its token: the guided eps is uncond + w (cond - uncond)."""
    x, s = np.ones((2, 1)), linear(10)
    cond, uncond = ((np.full((2, 1, 1), v), None) for v in (3.0, 1.0))
    options = {"sigma_kind": kind} if isinstance(kind, str) else {"eta": kind}
    sampler = ddpm if isinstance(kind, str) else ddim

    def model(x_t, t, c):
        return c[0][:, 0]

    for w, eps in ((0, 1.0), (1, 3.0), (2, 5.0), (-1, -1.0)):
        for step in sampler(model, x, cond, uncond, w, [10, 5, 0], s, noise=draw_noise((2, 1)), **options):
            close(step.eps, np.full((2, 1), eps))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_graph_is_recorded_between_yields_and_not_within(name):
    made = []

    def model(x_t, t, cond):
        made.append(Tensor(x_t, requires_grad=True) * 2.0)
        return made[-1]

    for step in SAMPLERS[name](model, np.ones((1, 2)), None, None, 1, [9, 5, 0], linear(10), draw_noise((1, 2))):
        x = Tensor(step.x_prev, requires_grad=True)
        loss = (x * x).sum()
        loss.backward()
        close(x.grad, 2 * step.x_prev)
    assert len(made) == 2 + (name == "heun") and all(y.node is None for y in made)


# ---- one known image


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_model_of_one_image_returns_it(s, kind):
    """From any number of steps, whatever the noise."""
    T = 13
    short = Schedule(1 - s.alpha_bar[80::80] / s.alpha_bar[:-80:80])  # 12 strides of the long schedule
    short = Schedule(np.append(short.betas, 1 - s.alpha_bar[1000] / s.alpha_bar[960]))
    x0 = np.linspace(-1, 1, 6).reshape(1, 6)
    x_T = np.broadcast_to(draw_noise((5, 1), seed=1)(0), (5, 6))

    def model(x_t, t, cond):
        alpha_bar = short.alpha_bar[t][:, None]
        return (x_t - np.sqrt(alpha_bar) * x0) / np.sqrt(1 - alpha_bar)

    for steps in range(1, T + 1):
        last = walk(kind, model, x_T, spaced_timesteps(T, steps), short, draw_noise((5, 6)))[-1]
        close(last.x_prev, np.broadcast_to(x0, (5, 6)), rtol=0, atol=1e-10)


# ---- never non-finite


@every_schedule
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 50, 1000])
def test_always_finite(s, steps, clip):
    x_T = draw_noise((2, 5), seed=1, dtype=np.float32)(0)
    models = {
        "silent": lambda x, t, c: np.zeros_like(x),
        "echo": lambda x, t, c: x,
        "wrong": lambda x, t, c: -np.tanh(x),
    }
    z = draw_noise((2, 5), dtype=np.float32)(0)
    for model in models.values():
        for kind in ("large", 0.0, 1.0):
            with np.errstate(over="raise", invalid="raise", divide="raise"):
                for step in walk(kind, model, x_T, spaced_timesteps(1000, steps), s, lambda i: z, clip):
                    assert np.isfinite(step.x_prev).all() and step.x_prev.dtype == np.float32
                    assert np.isfinite(step.x0).all() and np.isfinite(step.eps).all()
            if clip and steps >= 50:
                assert abs(step.x_prev).max() < clip + 1e-5


# ---- faults, planted to see that the two checks below notice them


def noise_on_the_last_step(monkeypatch):
    step = samplers.denoise_step

    def faulty(model, x_t, t, cond, uncond, w, z, schedule, t_prev, kind, clip):
        out = step(model, x_t, t, cond, uncond, w, z, schedule, t_prev, kind, clip)
        fresh = np.random.default_rng(99).standard_normal(x_t.shape)
        last = diffusion.sigma(t, schedule, kind, t_prev) * fresh if t_prev == 0 else 0
        return out._replace(x_prev=out.x_prev + last)

    monkeypatch.setattr(samplers, "denoise_step", faulty)


def beta_of_the_table(monkeypatch):
    def between(self, t, t_prev=None):
        return self.beta[t], self.alpha[t], self.alpha_bar[t], self.alpha_bar[t_prev]

    monkeypatch.setattr(Schedule, "between", between)


def model_one_step_behind(monkeypatch):
    conditioned = diffusion.conditioned

    def faulty(*args):
        eps = conditioned(*args)
        return lambda x, t: eps(x, t - 1)

    for module in (samplers, diffusion):
        monkeypatch.setattr(module, "conditioned", faulty)


def walk_that_stops_early(monkeypatch):
    pairs = samplers._pairs
    monkeypatch.setattr(samplers, "_pairs", lambda *args: pairs(*args)[:-1])


def no_noise(monkeypatch):
    step, jump = samplers.denoise_step, samplers.reverse_step

    def silent_step(model, x, t, cond, uncond, w, z, *rest):
        return step(model, x, t, cond, uncond, w, 0 * x, *rest)

    monkeypatch.setattr(samplers, "denoise_step", silent_step)
    monkeypatch.setattr(samplers, "reverse_step", lambda *a: jump(*a[:3], None if a[3] is None else 0 * a[3], *a[4:]))


FAULTS = [  # fault, kind, stride
    (noise_on_the_last_step, "large", 2),
    (noise_on_the_last_step, "large", 1),
    (beta_of_the_table, "small", 2),
    (beta_of_the_table, "large", 2),
    (model_one_step_behind, "small", 1),
    (model_one_step_behind, "large", 1),
    (model_one_step_behind, 0.0, 1),
    (model_one_step_behind, 1.0, 1),
    (walk_that_stops_early, "small", 1),
    (walk_that_stops_early, 0.0, 1),
    (no_noise, "small", 1),
    (no_noise, 1.0, 1),
]
FAULT_IDS = [f"{fault.__name__}-{kind}-{stride}" for fault, kind, stride in FAULTS]
every_fault = pytest.mark.parametrize(("fault", "kind", "stride"), FAULTS, ids=FAULT_IDS)


# ---- one Gaussian: every step is affine, so the law of the result is known exactly


def check_gaussian(kind, schedule, timesteps, m, s):
    """Mean and variance of the sampler's result against their recursion, to 1e-10.

    The sampler's side: its result is affine in x_T and in each step's noise, so a batch of unit vectors reads
    off the coefficients. The recursion's side is Bayesian: E[x0 | x_t] by regression, then two measurements
    of x_prev (from x0, from x_t) weighted by their precisions.
    """
    alpha_bar = schedule.alpha_bar_at

    def model(x_t, t, cond):
        ab = alpha_bar(t)[:, None]
        return np.sqrt(1 - ab) * (x_t - np.sqrt(ab) * m) / (ab * s**2 + 1 - ab)

    n = len(timesteps) + 1
    unit = np.eye(n)[:, :, None]  # row 0: nothing; row 1: x_T = 1; row 2 + i: the noise of step i is 1
    y = walk(kind, model, unit[:, 1], timesteps, schedule, lambda i: unit[:, 2 + i])[-1].x_prev[:, 0]
    y = y - np.append(0, np.full(n - 1, y[0]))

    mean, variance = 0.0, 1.0
    for t, t_prev in itertools.pairwise(timesteps):
        ab, ab_prev = alpha_bar(t), alpha_bar(t_prev)
        gain = np.sqrt(ab) * s**2 / (ab * s**2 + 1 - ab)  # E[x0 | x_t] = m + gain (x_t - sqrt(ab) m)
        x0 = np.array([gain, m - gain * np.sqrt(ab) * m])  # as (slope, offset) in x_t
        x_t = np.array([1.0, 0.0])
        alpha = ab / ab_prev
        if t_prev == 0:
            x_prev, noise = x0, 0.0
        else:
            precise = 1 / (1 - ab_prev), alpha / (1 - alpha)
            small = 1 / sum(precise)
            if isinstance(kind, str):
                x_prev = (precise[0] * np.sqrt(ab_prev) * x0 + precise[1] * x_t / np.sqrt(alpha)) * small
                noise = small if kind == "small" else 1 - alpha
            else:
                noise = kind**2 * small
                eps = (x_t - np.sqrt(ab) * x0) / np.sqrt(1 - ab)
                x_prev = np.sqrt(ab_prev) * x0 + np.sqrt(1 - ab_prev - noise) * eps
        mean, variance = x_prev[0] * mean + x_prev[1], x_prev[0] ** 2 * variance + noise
    close(y[0], mean, rtol=0, atol=1e-10)
    close((y[1:] ** 2).sum(), variance, rtol=0, atol=1e-10)


WALKS = [[1000, 0], [1000, 1, 0], [1000, 999, 500, 3, 2, 0], [999.5, 600.25, 30.5, 1.5, 0.5, 0.25, 0]]
WALKS += [spaced_timesteps(1000, 20), spaced_timesteps(1000, 333)]


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timesteps", WALKS, ids=len)
def test_gaussian(s, kind, timesteps):
    for mean, std in ((0.0, 1.0), (0.7, 0.3), (-1.0, 0.01)):
        check_gaussian(kind, s, timesteps, mean, std)


def test_gaussian_step_by_step():
    check_gaussian("small", linear(100), list(range(100, -1, -1)), 0.7, 0.3)


@every_fault
def test_gaussian_notices(fault, kind, stride, monkeypatch):
    s = linear(50, 0.001, 0.3)
    timesteps = [*range(50, 0, -stride), 0]
    check_gaussian(kind, s, timesteps, 0.7, 0.3)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_gaussian(kind, s, timesteps, 0.7, 0.3)


@every_schedule
def test_the_large_sigma_is_right_for_unit_variance_data(s):
    """If x0 ~ N(0, 1), so is x_t at every t; DDPM with sigma^2 = beta keeps it so, up to the last step."""
    timesteps, n = [1000, 600, 599, 50, 7, 0], 6
    unit = np.eye(n)[:, :, None]
    steps = walk(
        "large",
        lambda x, t, c: np.sqrt(1 - s.alpha_bar[t])[:, None] * x,
        unit[:, 0],
        timesteps,
        s,
        lambda i: unit[:, 1 + i],
    )
    for step in steps[:-1]:
        close((step.x_prev**2).sum(), 1.0)
    close((steps[-1].x_prev ** 2).sum(), s.alpha_bar[7])  # the variance of E[x0 | x_7]


# ---- a mixture: the walk is nonlinear, the law of the result is known up to the size of the steps

SIGMA_1, SIGMA_T, LENGTH = 0.03, 60.0, 120
SIGMAS = np.geomspace(SIGMA_1, SIGMA_T, LENGTH)  # noise to signal, in even steps: so 120 are enough
ALPHA_BAR = np.append(1, 1 / (1 + SIGMAS**2))
GEOMETRIC = Schedule(1 - ALPHA_BAR[1:] / ALPHA_BAR[:-1])

MIXTURES = {
    1: SimpleNamespace(p=[0.5, 0.3, 0.2], m=[[-1.0], [0.25], [1.0]], s=[0.1, 0.05, 0.1]),
    2: SimpleNamespace(p=[0.5, 0.3, 0.2], m=[[-1.0, -0.5], [0.25, 0.8], [1.0, -0.6]], s=[0.1, 0.05, 0.1]),
}


def exact_eps(mixture, x, alpha_bar):
    """-sqrt(1 - alpha_bar) grad log q(x_t): the modes' own scores, weighted by their responsibilities."""
    p, m, s = (np.array(v) for v in (mixture.p, mixture.m, mixture.s))
    variance = alpha_bar[:, None] * s**2 + 1 - alpha_bar[:, None]  # (n, modes)
    towards = np.sqrt(alpha_bar)[:, None, None] * m - x[:, None]  # (n, modes, d)
    log_r = np.log(p) - 0.5 * (towards**2).sum(-1) / variance - 0.5 * x.shape[1] * np.log(variance)
    r = np.exp(log_r - log_r.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    return -np.sqrt(1 - alpha_bar)[:, None] * ((r / variance)[..., None] * towards).sum(1)


@pytest.mark.parametrize("d", MIXTURES)
def test_exact_eps_is_the_gradient_of_the_log_density(d):
    mixture, x, ab, h = MIXTURES[d], draw_noise((20, d))(0), np.full(20, 0.8), 1e-5

    def log_q(x):
        parts = [
            p * np.exp(-0.5 * ((x - np.sqrt(0.8) * np.array(m)) ** 2).sum(1) / v) / v ** (d / 2)
            for p, m, v in zip(mixture.p, mixture.m, 0.8 * np.array(mixture.s) ** 2 + 0.2, strict=True)
        ]
        return np.log(sum(parts))

    slope = np.stack([(log_q(x + h * e) - log_q(x - h * e)) / (2 * h) for e in np.eye(d)], axis=1)
    close(exact_eps(mixture, x, ab), -np.sqrt(0.2) * slope, rtol=0, atol=1e-7)


def check_mixture(kind, stride, d, n=6000, seed=0):
    """Each mode's weight, mean and width, within 4 standard errors plus a discretisation error of O(1/steps).

    The last step jumps to E[x0 | x_t], which is narrower than x0 by the known factor
    sqrt(alpha_bar s^2 / (alpha_bar s^2 + 1 - alpha_bar)).
    """
    mixture = MIXTURES[d]
    timesteps = [*range(LENGTH, 0, -stride), 0]
    rng = np.random.default_rng(seed)

    def model(x_t, t, cond):
        return exact_eps(mixture, x_t, GEOMETRIC.alpha_bar[t])

    x_T = rng.standard_normal((n, d))
    y = walk(kind, model, x_T, timesteps, GEOMETRIC, lambda i: rng.standard_normal((n, d)))[-1].x_prev
    assert np.isfinite(y).all()
    nearest = ((y[:, None] - np.array(mixture.m)) ** 2).sum(-1).argmin(1)
    signal, h = GEOMETRIC.alpha_bar[timesteps[-2]], 1 / (len(timesteps) - 1)
    for k, (p, m, s) in enumerate(zip(mixture.p, mixture.m, mixture.s, strict=True)):
        mode = y[nearest == k]
        width = s * np.sqrt(signal * s**2 / (signal * s**2 + 1 - signal))
        assert abs(len(mode) / n - p) < 4 * np.sqrt(p * (1 - p) / n) + h
        assert abs(mode.mean(0) - m).max() < s * (4 / np.sqrt(n * p) + 6 * h)
        assert abs(mode.std(0) / width - 1).max() < 4 / np.sqrt(2 * n * p) + 5 * h


@pytest.mark.parametrize("d", MIXTURES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_mixture(kind, stride, d):
    check_mixture(kind, stride, d)


@every_fault
def test_mixture_notices(fault, kind, stride, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_mixture(kind, stride, 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_numpys_numbers_do_not_change_the_precision(name):
    """A sweep over np.linspace gives float64 scalars, which would make float64 of everything."""
    x_T = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)

    def model(x, t, cond):
        return 0.5 * x + cond[0].mean(axis=(1, 2), dtype=np.float32)[:, None]

    tokens = (np.ones((2, 1, 1), np.float32), None), (np.zeros((2, 1, 1), np.float32), None)
    walk = SAMPLERS[name](
        model, x_T, *tokens, np.float64(2.0), [1000, 500, 0], linear(), lambda i: x_T, clip=np.float64(1.0)
    )
    assert {step.x_prev.dtype for step in walk} == {np.dtype(np.float32)}


# ---- what all samplers share


def nonlinear(x, t, cond):
    return np.tanh(x + cond[0].mean(axis=(1, 2))[:, None]) * (1 + t[:, None] / 1000)


CONDITIONS = [(np.full((3, 2, 4), v), None) for v in (0.4, -0.3)]


def all_steps(name, model, x_T, w=1.0, timesteps=(1000, 700, 699.5, 20, 1, 0), s=SCHEDULES["scaled_linear"], **options):
    return list(SAMPLERS[name](model, x_T, *CONDITIONS, w, timesteps, s, draw_noise(x_T.shape), **options))


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_linked(name, prediction, clip):
    """x0 and eps make x_t, in every step; a walk to the image ends at its x0."""
    x_T, s = draw_noise((3, 4), seed=1)(0), SCHEDULES["scaled_linear"]
    steps = all_steps(name, nonlinear, x_T, 2.0, clip=clip, prediction=prediction)
    assert steps[0].x_t is x_T
    for a, b in itertools.pairwise(steps):
        assert a.x_prev is b.x_t and a.t_prev == b.t
    for step in steps:
        close(q_sample(step.x0, step.t, step.eps, s), step.x_t, atol=1e-9)
        assert clip is None or abs(step.x0).max() <= clip + 1e-9
    if name != "unipc":  # its last step sets out from the corrected x_t
        close(steps[-1].x_prev, steps[-1].x0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_prediction_of_the_same_network_gives_the_same_walk(name):
    x_T, s = draw_noise((3, 4), seed=1)(0), SCHEDULES["scaled_linear"]

    def told(prediction):
        def model(x, t, cond):
            eps = 0.9 * nonlinear(x, t, cond)
            return diffusion.training_target(predict_x0(x, t, eps, s), t, eps, s, prediction)

        return all_steps(name, model, x_T, 3.0, prediction=prediction)

    walks = [told(prediction) for prediction in PREDICTIONS]
    for a, b, c in zip(*walks, strict=True):
        for other in (b, c):
            close(other.x_prev, a.x_prev, rtol=0, atol=1e-9 * abs(a.x_prev).max())


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_unknown_prediction(name):
    with pytest.raises(ValueError, match="'noise' is not one of eps, v, x0"):
        all_steps(name, nonlinear, np.ones((3, 4)), prediction="noise")


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawn_noise_is_the_same_noise(name):
    """A Draw names the numbers that an array holds; the deterministic samplers look at neither."""
    x_T = draw_noise((3, 4), seed=1, dtype=np.float32)(0)
    draws = [Draw(7, range(3), i, Purpose.STEP_NOISE) for i in range(5)]
    for prediction in PREDICTIONS:
        walks = [
            list(
                SAMPLERS[name](
                    lambda x, t, c: np.tanh(x), x_T, None, None, 1, [1000, 500, 20, 0], SCHEDULES["linear"],
                    lambda i, drawn=drawn: normal(*draws[i], (4,)) if drawn else draws[i], prediction=prediction,
                )
            )
            for drawn in (False, True)
        ]  # fmt: skip
        for a, b in zip(*walks, strict=True):
            np.testing.assert_allclose(a.x_prev, b.x_prev, rtol=1e-4, atol=1e-4)


def test_samplers_that_add_noise_want_it():
    with pytest.raises(ValueError, match="noise"):
        list(SAMPLERS["euler_a"](nonlinear, np.ones((3, 4)), *CONDITIONS, 1, [10, 5, 0], linear(10), None))


@pytest.mark.parametrize("name", ["euler", "euler_a"])
def test_euler_in_sigma_space(name):
    """Karras et al.'s and k-diffusion's formulas, on y = x_t / sqrt(alpha_bar)."""
    s, x_T, z = SCHEDULES["scaled_linear"], draw_noise((3, 4), seed=1)(0), draw_noise((3, 4))
    for i, step in enumerate(all_steps(name, nonlinear, x_T)):
        sigma, to = (np.sqrt(1 / s.alpha_bar_at(t) - 1) for t in (step.t, step.t_prev))
        up = to * np.sqrt(1 - to**2 / sigma**2) if name == "euler_a" else 0
        down = np.sqrt(to**2 - up**2)
        y = step.x_t / np.sqrt(s.alpha_bar_at(step.t)) + (down - sigma) * step.eps + up * z(i)
        close(step.x_prev, y * np.sqrt(s.alpha_bar_at(step.t_prev)), rtol=1e-9, atol=1e-9)


# ---- guidance


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_number_and_a_guidance_of_it_are_the_same(name, prediction):
    x_T = draw_noise((3, 4), seed=1)(0)
    for w in (0.0, 1.0, 4.0):
        number, guidance = (all_steps(name, nonlinear, x_T, v, prediction=prediction) for v in (w, Guidance(w)))
        for a, b in zip(number, guidance, strict=True):
            close(b.x_prev, a.x_prev, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_in_an_interval(name):
    """Outside, the steps are those without guidance, and the model sees no second batch."""
    x_T, seen = draw_noise((3, 4), seed=1)(0), []

    def model(x, t, cond):
        seen.append((t[0], len(x)))
        return nonlinear(x, t, cond)

    timesteps, w = [1000, 800, 600, 400, 200, 100, 0], Guidance(5.0, interval=(200, 700))
    list(SAMPLERS[name](model, x_T, *CONDITIONS, w, timesteps, linear(), draw_noise(x_T.shape)))
    assert seen and all(batch == (6 if 200 <= t <= 700 else 3) for t, batch in seen)
    walks = [all_steps(name, nonlinear, x_T, w, timesteps) for w in (w, 1.0)]
    for a, b in itertools.islice(zip(*walks, strict=True), 2 if name != "heun" else 1):
        close(a.x_prev, b.x_prev, rtol=1e-9, atol=1e-9)
    assert abs(walks[0][-1].x_prev - walks[1][-1].x_prev).max() > 1e-3


def test_rescaled_guidance():
    """phi = 1 gives each sample the deviation of its conditional answer; phi between is a straight line to it."""
    cond, uncond = draw_noise((3, 50, 2))(0), draw_noise((3, 50, 2))(1) + 0.5
    full = guide(cond, uncond, Guidance(7.5, 1.0))
    guided = guide(cond, uncond, 7.5)
    close(full.std(axis=(1, 2)), cond.std(axis=(1, 2)))
    close(full / guided, np.broadcast_to((full / guided)[:, :1, :1], full.shape))
    close(guide(cond, uncond, Guidance(7.5, 0.7)), 0.7 * full + 0.3 * guided)
    np.testing.assert_array_equal(guide(cond, uncond, Guidance(7.5)), guided)
    np.testing.assert_array_equal(guide(cond, None, Guidance(7.5, 1.0)), cond)
    flat = np.ones((2, 1), np.float32)
    assert np.isfinite(guide(flat, 0 * flat, Guidance(7.5, 1.0))).all()
    assert guide(flat, 0 * flat, Guidance(np.float64(7.5), np.float64(0.5))).dtype == np.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_rescaling_reaches_the_samplers(name):
    x_T = draw_noise((3, 4), seed=1)(0)
    first = all_steps(name, nonlinear, x_T, Guidance(6.0, 0.8))[0]
    cond, uncond = (nonlinear(x_T, np.full(3, 1000), c) for c in CONDITIONS)
    close(first.eps, guide(cond, uncond, Guidance(6.0, 0.8)))


@pytest.mark.parametrize(
    "way", [{"rescale": 1.1}, {"rescale": np.nan}, {"interval": (5, 4)}, {"interval": (0, np.nan)}]
)
def test_impossible_guidance(way):
    with pytest.raises(ValueError, match="guidance"):
        Guidance(3.0, **way)


# ---- noise alone


@pytest.mark.parametrize("convert", [predict_x0, diffusion.clip_x0, diffusion.mu_theta])
def test_eps_of_noise_alone_is_refused(convert):
    s, x = zero_terminal_snr(linear(10)), np.ones((2, 3))
    for t in (10, np.array([5, 10])):
        with pytest.raises(ValueError, match="zero terminal SNR"):
            convert(*((x, t, x, s) if convert is not diffusion.clip_x0 else (x, t, x, s, 1.0)))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        diffusion.denoise_step(lambda x, t, c: x, x, 10, None, None, 1, x, s)
    assert np.isfinite(predict_x0(x, np.array([5, 9]), x, s)).all()


# ---- from settings


def test_settings_reach_the_samplers(monkeypatch):
    """`denoise` calls each by its name, with its own options."""
    calls, model = [], SimpleNamespace(schedule=linear(10), array_module=np, latent_shape=(2,))
    model.condition = lambda captions: (Tensor(np.zeros((len(captions), 1, 1))), None)
    for name in SAMPLERS:
        monkeypatch.setitem(SAMPLERS, name, lambda *a, name=name, **k: calls.append((name, a[4], k)) or iter(()))
        list(denoise(model, ["a"], SampleConfig(name, steps=2)))
    own = {"ddpm": {"sigma_kind": "small"}, "ddim": {"eta": 0.0}}
    assert calls == [(name, 1.5, {"clip": 1.0, **own.get(name, {})}) for name in SAMPLERS]
    calls.clear()
    list(denoise(model, ["a"], SampleConfig("heun", steps=2, clip=False, rescale=0.5, interval=(0.2, 0.5))))
    assert calls == [("heun", Guidance(1.5, 0.5, (2.0, 5.0)), {"clip": None})]


@pytest.mark.parametrize(
    "way",
    [{"rescale": -0.1}, {"rescale": np.nan}, {"interval": (0.5, 0.2)}, {"interval": (0.5,)}, {"interval": (0, 2)}],
)
def test_impossible_settings(way):
    with pytest.raises(ValueError, match=rf"sample\.{next(iter(way))} must be"):
        SampleConfig(**way)
