"""Solutions for notebook 1."""

from collections.abc import Mapping

import numpy as np

from minidiff.schedule import Schedule


def noisier(x_prev: np.ndarray, beta: float, eps: np.ndarray) -> np.ndarray:
    """1.1"""
    return np.sqrt(1 - beta) * x_prev + np.sqrt(beta) * eps


def first_t(schedules: Mapping[str, Schedule]) -> dict[str, int]:
    """1.2: argmax gives the first True."""
    return {
        name: int(np.argmax(s.alpha_bar < 1 - s.alpha_bar)) for name, s in schedules.items()
    }


def jump(
    x_s: np.ndarray, alpha_bar_s: float, alpha_bar_t: float, eps: np.ndarray
) -> np.ndarray:
    """1.3: one step of q, with the product of all alphas between s and t in place of one."""
    alpha = alpha_bar_t / alpha_bar_s
    return np.sqrt(alpha) * x_s + np.sqrt(1 - alpha) * eps
