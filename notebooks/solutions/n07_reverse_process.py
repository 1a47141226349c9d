"""Solutions for notebook 7."""

import numpy as np


def mean_of_step(
    x_t: np.ndarray, eps: np.ndarray, alpha: float, beta: float, alpha_bar: float
) -> np.ndarray:
    """7.1"""
    return (x_t - beta / np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha)


def finish(mu: np.ndarray, sigma_t: float, z: np.ndarray, t_prev: int) -> np.ndarray:
    """7.2"""
    return mu + sigma_t * z if t_prev > 0 else mu


def beta_of_stride(alpha_bar: np.ndarray, t: int, t_prev: int) -> float:
    """7.3: the alphas between are multiplied: alpha_bar_t / alpha_bar_prev."""
    return 1 - alpha_bar[t] / alpha_bar[t_prev]
