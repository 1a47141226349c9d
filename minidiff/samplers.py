"""Reverse processes as generators: each walks from noise to an image and yields what it did at every step.

    for step in ddim(model, x_T, cond, uncond, w, timesteps, schedule): ...
    image = step.x_prev

The walk is explicit: `timesteps` are the noise levels that are visited, falling, the last one included: 0 is the
image. They may lie between whole numbers (`Schedule.alpha_bar_at`). Noise comes in through `noise(i)`, one standard
normal array like x_t for step i, or which of them is to be drawn.

All are called alike, with clip and prediction by name; those that add no noise take `noise` and never ask it. w: a
number, or a `Guidance`. clip: the limit of `clip_x0`, or None. prediction: what the model answers, eps, v or x0. A walk
from alpha_bar = 0 needs v or x0, else a ValueError.

Papers that solve the probability flow ODE call alpha_t = sqrt(alpha_bar_t) and sigma_t = sqrt(1 - alpha_bar_t), so that
x_t = alpha_t x0 + sigma_t eps, and lambda_t = log(alpha_t / sigma_t). Those in sigma space walk y = x_t / alpha_t =
x0 + sigma eps with sigma = sigma_t / alpha_t; here their steps are written for x_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from minidiff.backend import Array
from minidiff.diffusion import (
    Guidance,
    Model,
    clip_x0,
    conditioned,
    ddim_coefficients,
    denoise_step,
    guide,
    guided_eps,
    posterior,
    predict_x0,
    reverse_step,
    reverse_step_drawn,
    sigma,
    x0_and_eps,
)
from minidiff.random import Draw, normal
from minidiff.schedule import Schedule, per_sample, visited_timesteps

Noise = Callable[[int], Array | Draw]


class SamplerStep(NamedTuple):
    """What one step saw and did."""

    t: float  # where it started
    t_prev: float  # where it ended; 0 is the image
    x_t: Array  # the noisy image at t (B, H, W, C)
    x0: Array  # the image predicted from it
    eps: Array  # the (guided, clipped) noise prediction
    x_prev: Array  # the result at t_prev


def spaced_timesteps(T: int, steps: int) -> list[int]:
    """The levels of `steps` steps: steps + 1 whole numbers from T to 0, evenly spaced. ValueError outside 1..T."""
    return [int(t) for t in visited_timesteps(T, steps)] + [0]


def _pairs(timesteps: Sequence[float], schedule: Schedule, prediction: str) -> list[tuple[float, float]]:
    """(t, t_prev) for every step."""
    pairs = list(pairwise(timesteps))
    if not pairs or not timesteps[0] <= schedule.T or not timesteps[-1] >= 0 or any(not t > s for t, s in pairs):
        raise ValueError(f"timesteps must fall from at most {schedule.T} to at least 0, got {list(timesteps)}")
    if prediction == "eps" and schedule.alpha_bar_at(timesteps[0]) == 0:
        raise ValueError(
            f"t = {timesteps[0]} is noise alone (zero terminal SNR), of which eps says nothing: sample a model that "
            "predicts v or x0, or begin lower"
        )
    return pairs


def _predictor(
    model: Model, cond: Any, uncond: Any, w: float | Guidance, schedule: Schedule, clip: float | None, prediction: str
) -> Callable[[Array, float], tuple[Array, Array]]:
    """(x_t, t) -> (x0, eps)."""
    answers = conditioned(model, cond, uncond, w)
    return lambda x_t, t: x0_and_eps(guide(*answers(x_t, t), w), x_t, t, schedule, prediction, clip)


def _drawn(z: Array | Draw, x_t: Array) -> Array:
    return normal(*z, x_t.shape[1:], x_t) if isinstance(z, Draw) else z


def _alpha_sigma(t: float, schedule: Schedule) -> tuple[float, float]:
    alpha_bar = schedule.alpha_bar_at(t)
    return float(np.sqrt(alpha_bar)), float(np.sqrt(1 - alpha_bar))


def _lambda(t: float, schedule: Schedule) -> float:
    """log(alpha_t / sigma_t): inf at t = 0, -inf at alpha_bar = 0."""
    alpha, sigma = _alpha_sigma(t, schedule)
    return math.log(alpha / sigma) if alpha * sigma else math.inf if alpha else -math.inf


def ddpm(
    model: Model,
    x_T: Array,
    cond: Any,
    uncond: Any,
    w: float | Guidance,
    timesteps: Sequence[float],
    schedule: Schedule,
    noise: Noise,
    sigma_kind: str = "small",
    clip: float | None = None,
    prediction: str = "eps",
) -> Iterator[SamplerStep]:
    """Ancestral sampling over any subset of steps. Ho et al. 2020, arXiv 2006.11239, algorithm 2."""
    x_t = x_T
    for i, (t, t_prev) in enumerate(_pairs(timesteps, schedule, prediction)):
        z = _drawn(noise(i), x_t) if t_prev > 0 else None
        if prediction == "eps":
            step = denoise_step(model, x_t, t, cond, uncond, w, z, schedule, t_prev, sigma_kind, clip)
            eps, x_prev = step.eps, step.x_prev
            x0 = predict_x0(x_t, t, eps, schedule) if clip is None else clip_x0(x_t, t, eps, schedule, clip)[0]
        else:
            answer = guided_eps(model, x_t, t, cond, uncond, w)
            x0, eps = x0_and_eps(answer, x_t, t, schedule, prediction, clip)
            x_prev, _ = posterior(x0, x_t, t, schedule, t_prev)
            if z is not None:
                x_prev = x_prev + per_sample(sigma(t, schedule, sigma_kind, t_prev), x_t) * z
        yield SamplerStep(t, t_prev, x_t, x0, eps, x_prev)
        x_t = x_prev


def ddim(
    model: Model,
    x_T: Array,
    cond: Any,
    uncond: Any,
    w: float | Guidance,
    timesteps: Sequence[float],
    schedule: Schedule,
    noise: Noise | None = None,
    eta: float = 0.0,
    clip: float | None = None,
    prediction: str = "eps",
) -> Iterator[SamplerStep]:
    """Eta in 0..1 interpolates from deterministic to ancestral. Song et al. 2020, arXiv 2010.02502, equation 12."""
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be in 0..1, got {eta}")
    if eta > 0 and noise is None:
        raise ValueError("ddim: eta > 0 adds noise; give the `noise` to add")
    clip = None if clip is None else float(clip)  # NumPy's numbers would make float64 of float32 arrays
    x_t, pairs, answers = x_T, _pairs(timesteps, schedule, prediction), conditioned(model, cond, uncond, w)
    for i, (t, t_prev) in enumerate(pairs):
        answer = answers(x_t, t)
        z = noise(i) if noise is not None and eta > 0 else None
        of_x0, of_eps, of_z = map(float, ddim_coefficients(t, eta, schedule, t_prev))
        if prediction == "eps" and not isinstance(w, Guidance):  # one kernel does it all
            numbers: Any = (float(w), *_alpha_sigma(t, schedule), clip, of_x0, of_eps, of_z)
            if isinstance(z, Draw):
                x_prev, x0, eps = reverse_step_drawn(x_t, *answer, z, *numbers)
            else:
                x_prev, x0, eps = reverse_step(x_t, *answer, z, *numbers)
        else:
            x0, eps = x0_and_eps(guide(*answer, w), x_t, t, schedule, prediction, clip)
            x_prev = of_x0 * x0 + of_eps * eps
            if z is not None:
                x_prev = x_prev + of_z * _drawn(z, x_t)
        yield SamplerStep(t, t_prev, x_t, x0, eps, x_prev)
        x_t = x_prev


def euler(
    model: Model, x_T: Array, cond: Any, uncond: Any, w: float | Guidance, timesteps: Sequence[float],
    schedule: Schedule, noise: Noise | None = None, clip: float | None = None, prediction: str = "eps",
) -> Iterator[SamplerStep]:  # fmt: skip
    """Euler's method in sigma space: y_prev = y + (sigma_prev - sigma) eps. Karras et al. 2022, arXiv 2206.00364.

    With y = x0 + sigma eps that is y_prev = x0 + sigma_prev eps, which for x_t is DDIM's step. First order.
    """
    return ddim(model, x_T, cond, uncond, w, timesteps, schedule, None, 0.0, clip, prediction)


def euler_a(
    model: Model, x_T: Array, cond: Any, uncond: Any, w: float | Guidance, timesteps: Sequence[float],
    schedule: Schedule, noise: Noise, clip: float | None = None, prediction: str = "eps",
) -> Iterator[SamplerStep]:  # fmt: skip
    """Euler's method to sigma_down, below sigma_prev, and fresh noise sigma_up z back to it, as k-diffusion has it.

    y_prev = y + (sigma_down - sigma) eps + sigma_up z,  sigma_up = sigma_prev sqrt(1 - sigma_prev^2 / sigma^2),
    sigma_down^2 = sigma_prev^2 - sigma_up^2. For x_t that is DDIM's step with eta = 1, DDPM's with the small sigma.
    """
    return ddim(model, x_T, cond, uncond, w, timesteps, schedule, noise, 1.0, clip, prediction)


def heun(
    model: Model, x_T: Array, cond: Any, uncond: Any, w: float | Guidance, timesteps: Sequence[float],
    schedule: Schedule, noise: Noise | None = None, clip: float | None = None, prediction: str = "eps",
) -> Iterator[SamplerStep]:  # fmt: skip
    """Euler's step to t_prev, then the same again with the mean of the slopes eps at both ends. Second order.

    y_prev = y + (sigma_prev - sigma) (eps + eps_prev) / 2: two calls of the model a step. From an infinite sigma, and
    to the image, Euler's step is all. Karras et al. 2022, arXiv 2206.00364, algorithm 1.
    """
    x_t, predict = x_T, _predictor(model, cond, uncond, w, schedule, clip, prediction)
    for t, t_prev in _pairs(timesteps, schedule, prediction):
        x0, eps = predict(x_t, t)
        (alpha, sigma_t), (alpha_prev, sigma_prev) = _alpha_sigma(t, schedule), _alpha_sigma(t_prev, schedule)
        x_prev = alpha_prev * x0 + sigma_prev * eps
        if alpha > 0 and sigma_prev > 0:
            _, eps_prev = predict(x_prev, t_prev)
            x_prev = x_prev + alpha_prev * (sigma_prev / alpha_prev - sigma_t / alpha) / 2 * (eps_prev - eps)
        yield SamplerStep(t, t_prev, x_t, x0, eps, x_prev)
        x_t = x_prev


def _towards(x0: Array, x_t: Array, t: float, t_prev: float, schedule: Schedule) -> Array:
    """x_prev = (sigma_prev / sigma_t) x_t - alpha_prev (exp(-h) - 1) x0,  h = lambda_prev - lambda_t.

    The exact solution of the probability flow ODE while the predicted image stays x0: DDIM's step.
    """
    (alpha, sigma_t), (alpha_prev, sigma_prev) = _alpha_sigma(t, schedule), _alpha_sigma(t_prev, schedule)
    ratio = sigma_prev / sigma_t
    return ratio * x_t + (alpha_prev - ratio * alpha) * x0  # exp(-h) = ratio alpha / alpha_prev, with no infinity


def dpmpp_2m(
    model: Model, x_T: Array, cond: Any, uncond: Any, w: float | Guidance, timesteps: Sequence[float],
    schedule: Schedule, noise: Noise | None = None, clip: float | None = None, prediction: str = "eps",
) -> Iterator[SamplerStep]:  # fmt: skip
    """DPM-Solver++(2M): the predicted image is extrapolated to the middle of the step, from the one before.

    D = x0 + (x0 - x0_before) / 2r,  r = h_before / h. Second order. D = x0 in the first step, in a last one to the
    image (where h is infinite), and in the last of fewer than 15. Lu et al. 2022, arXiv 2211.01095, algorithm 2.
    """
    x_t, predict = x_T, _predictor(model, cond, uncond, w, schedule, clip, prediction)
    pairs, h_before, x0_before = _pairs(timesteps, schedule, prediction), 0.0, x_T  # none yet
    for i, (t, t_prev) in enumerate(pairs):
        x0, eps = predict(x_t, t)
        h = _lambda(t_prev, schedule) - _lambda(t, schedule)
        D = x0
        if i > 0 and t_prev > 0 and not (i == len(pairs) - 1 and len(pairs) < 15):
            D = x0 + h / (2 * h_before) * (x0 - x0_before)
        x_prev = _towards(D, x_t, t, t_prev, schedule)
        yield SamplerStep(t, t_prev, x_t, x0, eps, x_prev)
        x_t, x0_before, h_before = x_prev, x0, h


def unipc(
    model: Model, x_T: Array, cond: Any, uncond: Any, w: float | Guidance, timesteps: Sequence[float],
    schedule: Schedule, noise: Noise | None = None, clip: float | None = None, prediction: str = "eps",
) -> Iterator[SamplerStep]:  # fmt: skip
    """UniPC-2 with B_2(h) = exp(-h) - 1: what each step predicts, the next corrects, for no further call of the model.

    Both are `_towards` an image D. Predictor: D = x0 + D_1 / 2, D_1 = (x0_before - x0) / r_1, r_1 = -h_before / h.
    Corrector, once x0_prev is known at t_prev: D = x0 + rho_1 D_1 + rho_2 (x0_prev - x0). In the first step there is no
    D_1, in the last none is taken. Third order where corrected. Zhao et al. 2023, arXiv 2302.04867.
    """
    x_t, predict = x_T, _predictor(model, cond, uncond, w, schedule, clip, prediction)
    pairs, h_before, x0_before = _pairs(timesteps, schedule, prediction), 0.0, x_T  # none yet
    corrected, D_1, rho_1, rho_2 = x_T, 0.0, 0.0, 0.5  # x_t after the corrector, and what the next will need
    for i, (t, t_prev) in enumerate(pairs):
        x0, eps = predict(x_t, t)
        if i > 0:
            D = x0_before + rho_1 * D_1 + rho_2 * (x0 - x0_before)
            corrected = _towards(D, corrected, pairs[i - 1][0], t, schedule)
        h = _lambda(t_prev, schedule) - _lambda(t, schedule)
        if 0 < i < len(pairs) - 1:
            r_1 = -h_before / h
            D_1, (rho_1, rho_2) = (x0_before - x0) / r_1, _unic_rho(h, r_1)
        else:
            D_1 = 0.0
        x_prev = _towards(x0 + D_1 / 2, corrected, t, t_prev, schedule)
        yield SamplerStep(t, t_prev, x_t, x0, eps, x_prev)
        x_t, x0_before, h_before = x_prev, x0, h


def _unic_rho(h: float, r_1: float) -> tuple[float, float]:
    """The corrector's weights for data prediction: rho_1 + rho_2 = b_1 and r_1 rho_1 + rho_2 = b_2."""
    shrink = -math.expm1(-h)  # = -B_2(h)
    rest = 1 - shrink / h
    b_1, b_2 = rest / shrink, (1 - 2 * rest / h) / shrink
    rho_1 = (b_1 - b_2) / (1 - r_1)
    return rho_1, b_1 - rho_1


SAMPLERS: dict[str, Callable[..., Iterator[SamplerStep]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "unipc": unipc,
}
