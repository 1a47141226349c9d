"""Noise schedules: how fast the forward process destroys an image.

    alpha_t = 1 - beta_t,   alpha_bar_t = alpha_1 * ... * alpha_t

Time counts t = 1..T; index 0 is the clean image: beta[0] = 0, alpha[0] = alpha_bar[0] = 1, so that no equation needs a
special case at either end. The tables are float64, of length T + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minidiff.backend import Array, array_module, to_numpy


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tables beta, alpha and alpha_bar, float64 (T + 1,), for t = 0..T; made from beta_1..beta_T."""

    betas: np.ndarray

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or not self.betas.size or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError("a schedule wants beta_1..beta_T, at least one, each strictly between 0 and 1")

    @cached_property
    def beta(self) -> np.ndarray:
        """beta[t], the variance that step t adds."""
        return np.concatenate([[0.0], self.betas.astype(np.float64)])

    @cached_property
    def alpha(self) -> np.ndarray:
        """alpha[t] = 1 - beta[t], the share of the variance that step t keeps."""
        return 1 - self.beta

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        """alpha_bar[t], the share of the image's variance that is left after t steps."""
        return np.cumprod(self.alpha)

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.betas)

    def between(self, t: Array, t_prev: Array | None = None) -> tuple[np.ndarray, ...]:
        """beta, alpha, alpha_bar at t and alpha_bar at t_prev, for the one step from t_prev to t (default t - 1).

        With a stride, alpha = alpha_bar[t] / alpha_bar[t_prev] and beta = 1 - alpha, not the table's beta[t].
        t and t_prev are numbers (or arrays of them), fractional ones too, 0 <= t_prev < t <= T; else ValueError.
        """
        t = self._check(t)
        t_prev = self._check(t - 1 if t_prev is None else t_prev)
        if not (t_prev < t).all():
            raise ValueError(f"a step needs t_prev < t, got t = {t} and t_prev = {t_prev}")
        alpha_bar, alpha_bar_prev = self.alpha_bar_at(t), self.alpha_bar_at(t_prev)
        last = np.floor(t).astype(np.int64)
        in_table = (t == last) & (t - t_prev == 1)  # it holds beta to full precision, the quotient loses a few digits
        alpha = np.where(in_table, self.alpha[last], alpha_bar / alpha_bar_prev)
        beta = np.where(in_table, self.beta[last], 1 - alpha)
        return beta, alpha, alpha_bar, alpha_bar_prev

    def alpha_bar_at(self, t: Array) -> np.ndarray:
        """alpha_bar at t in 0..T; else ValueError.

        Between whole numbers the logarithm of the noise level sqrt((1 - alpha_bar) / alpha_bar) is interpolated,
        between 0 and 1 the level itself (at 0 it is 0). So a level that lies off the table is that of a fractional t.
        """
        t = self._check(t)
        below = np.floor(t).astype(np.int64)
        exact = self.alpha_bar[below]
        share = t - below
        if not share.any():
            return exact
        level = np.sqrt((1 - self.alpha_bar) / self.alpha_bar)
        above = level[np.minimum(below + 1, self.T)]
        between = np.where(below > 0, level[np.maximum(below, 1)] ** (1 - share) * above**share, share * above)
        return np.where(share == 0, exact, 1 / (1 + between**2))

    def _check(self, t: Array) -> np.ndarray:
        t = to_numpy(t)
        if t.dtype.kind not in "iuf" or not ((t >= 0) & (t <= self.T)).all():
            raise ValueError(f"t must be numbers in 0..{self.T}, got {t}")
        return t


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta rises linearly. Ho et al. 2020, arXiv 2006.11239, section 4."""
    return Schedule(np.linspace(beta_start, beta_end, T, dtype=np.float64))


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """sqrt(beta) rises linearly: Stable Diffusion's schedule. Rombach et al. 2022, arXiv 2112.10752."""
    return Schedule(np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T, dtype=np.float64) ** 2)


def cosine(T: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> Schedule:
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2), with beta_t at most beta_max.

    Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17.
    """
    f = np.cos((np.arange(T + 1, dtype=np.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    return Schedule(np.minimum(1 - f[1:] / f[:-1], beta_max))


def per_sample(values: np.ndarray, x: Array) -> Array:
    """Coefficients, one number or one a sample (B,), in x's dtype and on its device, shaped to multiply x (B, ...)."""
    xp = array_module(x)
    if x.dtype.kind != "f":
        raise TypeError(f"diffusion works on floats, got {x.dtype}")
    a = xp.asarray(values, dtype=x.dtype)
    if a.ndim == 0:
        return a
    if a.shape != x.shape[:1]:
        raise ValueError(f"{a.shape[0]} timesteps for {x.shape[0]} samples")
    return a.reshape(-1, *(1,) * (x.ndim - 1))
