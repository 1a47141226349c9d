"""Noise schedules: how fast the forward process destroys an image, and which of its levels a walk back visits.

    alpha_t = 1 - beta_t,   alpha_bar_t = alpha_1 * ... * alpha_t

Time counts t = 1..T; index 0 is the clean image: beta[0] = 0, alpha[0] = alpha_bar[0] = 1, so that no equation needs a
special case at either end. The tables are float64, of length T + 1. Diffusers' timestep is t - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minidiff.backend import Array, array_module, to_numpy


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tables beta, alpha and alpha_bar, float64 (T + 1,), for t = 0..T; made from beta_1..beta_T.

    beta_T may be 1: then alpha_bar_T = 0, and x_T is noise alone (`zero_terminal_snr`).
    """

    betas: np.ndarray

    def __post_init__(self) -> None:
        b = self.betas
        if b.ndim != 1 or not b.size or not ((b > 0) & (b <= 1)).all() or (b[:-1] == 1).any():
            raise ValueError(
                "a schedule wants beta_1..beta_T, at least one, each strictly between 0 and 1 (beta_T may be 1)"
            )

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

    @cached_property
    def noise_level(self) -> np.ndarray:
        """sigma = sqrt((1 - alpha_bar) / alpha_bar) of x_t / sqrt(alpha_bar) = x0 + sigma eps; inf at alpha_bar = 0."""
        with np.errstate(divide="ignore"):
            return np.sqrt((1 - self.alpha_bar) / self.alpha_bar)

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
        between 0 and 1 the level itself (at 0 it is 0), below an infinite level its inverse. So a level that lies off
        the table is that of a fractional t.
        """
        t = self._check(t)
        below = np.floor(t).astype(np.int64)
        exact = self.alpha_bar[below]
        share = t - below
        if not share.any():
            return exact
        level, above = self.noise_level, self.noise_level[np.minimum(below + 1, self.T)]
        first = level[np.maximum(below, 1)]
        between = np.where(below > 0, first ** (1 - share) * above**share, share * level[1])
        between = np.where(np.isinf(above) & (below > 0), first / (1 - share), between)
        return np.where(share == 0, exact, 1 / (1 + between**2))

    def t_at(self, level: Array) -> np.ndarray:
        """The t with this noise level, float64: the inverse of `alpha_bar_at`; T for levels above the table's."""
        level, table = np.asarray(level, np.float64), self.noise_level
        t = np.interp(np.log(np.maximum(level, table[1])), np.log(table[1:]), np.arange(1, self.T + 1))
        t = np.where(level < table[1], level / table[1], t)
        if np.isinf(table[-1]):
            t = np.where(level > table[-2], self.T - table[-2] / np.maximum(level, table[-2]), t)
        return t

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


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with alpha_bar_T = 0: sqrt(alpha_bar) is shifted to end at 0 and scaled to begin where it did.

    A walk then begins where training ended, in noise alone. There eps says nothing of the image; v and x0 do.
    ValueError for T = 1. Lin et al. 2023, arXiv 2305.08891, algorithm 1.
    """
    if schedule.T < 2:
        raise ValueError("a schedule of one step cannot be rescaled to end in noise alone")
    root = np.sqrt(schedule.alpha_bar[1:])
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = np.append(1.0, root**2)
    return Schedule(1 - alpha_bar[1:] / alpha_bar[:-1])


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


# ---- the levels that a walk visits


def visited_timesteps(T: int, steps: int, spacing: str = "trailing", offset: int = 0, left_out: int = 0) -> np.ndarray:
    """The t of the `steps` levels at which a walk asks the model, falling, float64 (steps,), without the end.

    trailing: from T in even steps. leading: from offset + 1 upwards in even whole steps, so that T is not reached.
    linspace: evenly from T to 1, fractional; but one step is at 1. left_out: how many levels are spaced below these,
    and not visited. ValueError for steps outside 1..T. Lin et al. 2023, arXiv 2305.08891, table 2.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"the number of sampling steps must be in 1..{T}, got {steps}")
    n = steps + left_out
    if spacing == "trailing":
        return np.round(np.linspace(T, 0, steps + 1))[:-1]
    if spacing == "leading":
        return 1.0 + offset + np.arange(n)[::-1][:steps] * max(1, T // n)
    if spacing == "linspace":
        return 1 + np.linspace(0, T - 1, n)[::-1][:steps]
    raise ValueError(f"spacing: {spacing!r} is not one of {', '.join(SPACINGS)}")


def karras_levels(high: float, low: float, steps: int) -> np.ndarray:
    """Noise levels from high to low (steps,), even in sigma^(1/7). Karras et al. 2022, arXiv 2206.00364, equation 5."""
    high, low = high ** (1 / 7), low ** (1 / 7)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** 7


SPACINGS = ("leading", "linspace", "trailing")
