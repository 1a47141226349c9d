"""Samplers on a problem whose solution is known: order, moments, and nothing that is not finite.

The data are a Gaussian mixture, so eps is known exactly, and the probability flow ODE dy/dsigma = eps,
y = x_t / alpha_t, is solved in float64 as finely as one likes. Both ends of a walk are fixed noise levels; the steps
between are even in lambda = -log(sigma).
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from test_samplers import draw_noise, exact_eps

from minidiff import samplers
from minidiff.diffusion import PREDICTIONS, training_target
from minidiff.pretrained.scheduler import Sampling
from minidiff.samplers import SAMPLERS
from minidiff.schedule import SPACINGS, cosine, linear, scaled_linear, zero_terminal_snr

MIXTURE = SimpleNamespace(p=[0.5, 0.3, 0.2], m=[[-1.0], [0.25], [1.0]], s=[0.4, 0.5, 0.3])
SCHEDULE = scaled_linear()
HIGH, LOW = 10.0, 0.1
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpm++2m": 2, "unipc": 3}  # UniPC-p is of order p + 1, and ours has p = 2


def model(x, t, cond):
    return exact_eps(MIXTURE, x, SCHEDULE.alpha_bar_at(t))


def levels(steps):
    """From HIGH to LOW, and on to the image: the last step, which is of lower order, is not looked at."""
    return [*SCHEDULE.t_at(np.geomspace(HIGH, LOW, steps + 1)), 0]


def to_low(name, x_T, steps, noise=None):
    """What a sampler makes of x_T at the level LOW."""
    return list(SAMPLERS[name](model, x_T, None, None, 1, levels(steps), SCHEDULE, noise))[-1].x_t


@pytest.fixture(scope="module")
def solution():
    """(x_T, x at LOW): classical Runge-Kutta in 4,000 steps."""
    x_T = np.linspace(-2, 2, 9)[:, None]

    def slope(y, sigma):
        alpha_bar = np.full(len(y), 1 / (1 + sigma**2))
        return exact_eps(MIXTURE, y * np.sqrt(alpha_bar[0]), alpha_bar)

    y, sigmas = x_T * np.sqrt(1 + HIGH**2), np.geomspace(HIGH, LOW, 4001)
    for a, b in itertools.pairwise(sigmas):
        h, middle = b - a, (a + b) / 2
        k1 = slope(y, a)
        k2 = slope(y + h / 2 * k1, middle)
        k3 = slope(y + h / 2 * k2, middle)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, b))
    return x_T, y / np.sqrt(1 + LOW**2)


def order(name, x_T, exact):
    """The slope of log error over log step size, from 8 to 128 steps."""
    steps = np.array([8, 16, 32, 64, 128])
    errors = [np.sqrt(((to_low(name, x_T, n) - exact) ** 2).mean()) for n in steps]
    assert np.isfinite(errors).all()
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("name", ORDERS)
def test_order(name, solution):
    assert abs(order(name, *solution) - ORDERS[name]) <= 0.2


def no_correction(monkeypatch):
    monkeypatch.setattr(samplers, "_unic_rho", lambda h, r: (0.0, 0.5))


def half_a_step(monkeypatch):
    found = samplers._lambda
    monkeypatch.setattr(samplers, "_lambda", lambda t, s: found(t, s) + (0.3 * np.sin(t) if t else 0))


def model_one_level_behind(monkeypatch):
    found = samplers.conditioned

    def faulty(*args):
        answers = found(*args)
        return lambda x, t: answers(x, 0.9 * t)

    monkeypatch.setattr(samplers, "conditioned", faulty)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("unipc", no_correction), ("unipc", half_a_step), ("dpm++2m", half_a_step)]
    + [(name, model_one_level_behind) for name in ORDERS],
)
def test_order_notices(name, fault, solution, monkeypatch):
    fault(monkeypatch)
    assert not abs(order(name, *solution) - ORDERS[name]) <= 0.2


@pytest.mark.parametrize("name", ["ddpm", "euler_a"])
def test_moments(name):
    """Of x at LOW, from x_T of the right law: mean, variance and skewness, within 4 standard errors and O(1/steps)."""
    n, steps, rng = 20000, 100, np.random.default_rng(0)
    mode = rng.choice(3, n, p=MIXTURE.p)
    m, s = np.array(MIXTURE.m)[:, 0], np.array(MIXTURE.s)
    x0 = m[mode] + s[mode] * rng.standard_normal(n)
    x_T = ((x0 + HIGH * rng.standard_normal(n)) / np.sqrt(1 + HIGH**2))[:, None]
    y = to_low(name, x_T, steps, lambda i: rng.standard_normal((n, 1)))[:, 0] * np.sqrt(1 + LOW**2)
    wanted = x0 + LOW * rng.standard_normal(n)
    for k in (1, 2, 3):
        error = np.sqrt(((y**k).var() + (wanted**k).var()) / n)
        assert abs((y**k).mean() - (wanted**k).mean()) <= 4 * error + k / steps


# ---- never non-finite

SCHEDULES = {"linear": linear(), "scaled_linear": scaled_linear(), "cosine": cosine()}
SCHEDULES |= {f"{name}, no signal left": zero_terminal_snr(s) for name, s in SCHEDULES.items()}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "unipc"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_number_of_steps_has_levels_that_fall(schedule, sampler, spacing):
    """As many as there are steps; with an offset leading spacing loses those of 999 and 1000 that lie above T."""
    for karras in (False, True):
        ways = Sampling(SCHEDULES[schedule], "v", sampler, spacing, offset=1, karras=karras)
        for steps in [*range(1, 30), *range(31, 1000, 53), 999, 1000]:
            timesteps = ways.timesteps(steps)
            assert np.isfinite(timesteps).all() and timesteps[0] <= 1000 and timesteps[-1] == 0
            assert (np.diff(timesteps) < 0).all() and steps - 2 * (steps > 998) <= len(timesteps) - 1 <= steps


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine, no signal left"])
def test_always_finite(name, schedule):
    z, x_T = (draw_noise((2, 5), seed=i, dtype=np.float32)(0) for i in (0, 1))
    models = [lambda x, t, c: np.zeros_like(x), lambda x, t, c: x, lambda x, t, c: -np.tanh(x)]
    ends_in_noise = SCHEDULES[schedule].alpha_bar[-1] == 0
    for prediction in PREDICTIONS[1:] if ends_in_noise else PREDICTIONS:
        for spacing, steps in [("trailing", (1, 2, 3, 5, 50)), ("leading", (1, 20)), ("linspace", (2, 20))]:
            for karras in (False, True):
                for n in steps if karras or spacing != "trailing" else (*steps, 1000):
                    ways = Sampling(SCHEDULES[schedule], prediction, name, spacing, offset=1, karras=karras)
                    for answer in models if n < 1000 else models[2:]:
                        with np.errstate(over="raise", invalid="raise", divide="raise"):
                            walk = SAMPLERS[name](
                                answer, x_T, None, None, 1, ways.timesteps(n), ways.schedule, lambda i: z,
                                clip=1.0 if n == 3 else None, prediction=prediction,
                            )  # fmt: skip
                            for step in walk:
                                for array in step[2:]:
                                    assert np.isfinite(array).all() and array.dtype == np.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_eps_prediction_cannot_begin_in_noise_alone(name):
    s, x, asked = zero_terminal_snr(linear(10)), np.ones((1, 2)), []

    def walk(timesteps):
        return list(SAMPLERS[name](lambda x, t, c: asked.append(t) or x, x, None, None, 1, timesteps, s, lambda i: x))

    with pytest.raises(ValueError, match=r"t = 10 is noise alone \(zero terminal SNR\).*v or x0"):
        walk([10, 5, 0])
    assert not asked
    assert np.isfinite(walk([9.5, 5, 0])[-1].x_prev).all()


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_model_of_one_image_returns_it_from_noise_alone(name, prediction):
    s, image = zero_terminal_snr(scaled_linear()), np.linspace(-1, 1, 6).reshape(1, 6)

    def model(x_t, t, cond):
        alpha_bar = s.alpha_bar_at(t)[:, None]
        eps = (x_t - np.sqrt(alpha_bar) * image) / np.sqrt(1 - alpha_bar)
        return training_target(np.broadcast_to(image, x_t.shape), t, eps, s, prediction)

    x_T = draw_noise((4, 6), seed=1)(0)
    for timesteps in ([1000, 0], [1000, 999.5, 700, 3, 0], [1000, 750, 500, 250, 0]):
        walk = SAMPLERS[name](model, x_T, None, None, 1, timesteps, s, draw_noise((4, 6)), prediction=prediction)
        np.testing.assert_allclose(list(walk)[-1].x_prev, np.broadcast_to(image, (4, 6)), atol=1e-9)
