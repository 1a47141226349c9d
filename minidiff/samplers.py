"""Reverse processes as generators: each walks from noise to an image and yields what it did at every step.

    for step in ddim(model, x_T, cond, uncond, w, timesteps, schedule): ...
    image = step.x_prev

The walk is explicit: `timesteps` are the noise levels that are visited, falling, the last one included: 0 is the
image. They may lie between whole numbers (`Schedule.alpha_bar_at`). Noise comes in through `noise(i)`, one standard
normal array like x_t for step i, or which of them is to be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from minidiff.backend import Array
from minidiff.diffusion import (
    Model,
    clip_x0,
    conditioned,
    ddim_coefficients,
    denoise_step,
    predict_x0,
    reverse_step,
    reverse_step_drawn,
)
from minidiff.random import Draw, normal
from minidiff.schedule import Schedule

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
    if not 1 <= steps <= T:
        raise ValueError(f"the number of sampling steps must be in 1..{T}, got {steps}")
    return [int(t) for t in np.round(np.linspace(T, 0, steps + 1))]


def _pairs(timesteps: Sequence[float], schedule: Schedule) -> list[tuple[float, float]]:
    """(t, t_prev) for every step."""
    pairs = list(pairwise(timesteps))
    if not pairs or not timesteps[0] <= schedule.T or not timesteps[-1] >= 0 or any(not t > s for t, s in pairs):
        raise ValueError(f"timesteps must fall from at most {schedule.T} to at least 0, got {list(timesteps)}")
    return pairs


def ddpm(
    model: Model,
    x_T: Array,
    cond: Any,
    uncond: Any,
    w: float,
    timesteps: Sequence[float],
    schedule: Schedule,
    noise: Noise,
    sigma_kind: str = "small",
    clip: float | None = None,
) -> Iterator[SamplerStep]:
    """Ancestral sampling over any subset of steps. Ho et al. 2020, arXiv 2006.11239, algorithm 2."""
    x_t = x_T
    for i, (t, t_prev) in enumerate(_pairs(timesteps, schedule)):
        z = noise(i) if t_prev > 0 else None
        if isinstance(z, Draw):
            z = normal(*z, x_t.shape[1:], x_t)
        step = denoise_step(model, x_t, t, cond, uncond, w, z, schedule, t_prev, sigma_kind, clip)
        x0 = predict_x0(x_t, t, step.eps, schedule) if clip is None else clip_x0(x_t, t, step.eps, schedule, clip)[0]
        yield SamplerStep(t, t_prev, x_t, x0, step.eps, step.x_prev)
        x_t = step.x_prev


def ddim(
    model: Model,
    x_T: Array,
    cond: Any,
    uncond: Any,
    w: float,
    timesteps: Sequence[float],
    schedule: Schedule,
    noise: Noise | None = None,
    eta: float = 0.0,
    clip: float | None = None,
) -> Iterator[SamplerStep]:
    """Eta in 0..1 interpolates from deterministic to ancestral. Song et al. 2020, arXiv 2010.02502, equation 12."""
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be in 0..1, got {eta}")
    if eta > 0 and noise is None:
        raise ValueError("ddim: eta > 0 adds noise; give the `noise` to add")
    w, clip = float(w), None if clip is None else float(clip)  # NumPy's numbers would make float64 of float32 arrays
    x_t, pairs, both_eps = x_T, _pairs(timesteps, schedule), conditioned(model, cond, uncond, w)
    for i, (t, t_prev) in enumerate(pairs):
        eps_cond, eps_uncond = both_eps(x_t, t)
        z = noise(i) if noise is not None and eta > 0 else None
        alpha_bar = schedule.alpha_bar_at(t)
        levels = float(np.sqrt(alpha_bar)), float(np.sqrt(1 - alpha_bar))
        coefficients = map(float, ddim_coefficients(t, eta, schedule, t_prev))
        numbers: Any = (w, *levels, clip, *coefficients)
        if isinstance(z, Draw):
            x_prev, x0, eps = reverse_step_drawn(x_t, eps_cond, eps_uncond, z, *numbers)
        else:
            x_prev, x0, eps = reverse_step(x_t, eps_cond, eps_uncond, z, *numbers)
        yield SamplerStep(t, t_prev, x_t, x0, eps, x_prev)
        x_t = x_prev


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}
