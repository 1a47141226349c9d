"""Solutions for notebook 6."""

import numpy as np


def clean(x_t: np.ndarray, eps: np.ndarray, alpha_bar: float) -> np.ndarray:
    """6.1"""
    return (x_t - np.sqrt(1 - alpha_bar) * eps) / np.sqrt(alpha_bar)


def target(x0: np.ndarray, eps: np.ndarray, alpha_bar: float) -> np.ndarray:
    """6.2"""
    return np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x0


def best(x_t: np.ndarray, alpha_bar: float) -> np.ndarray:
    """6.3: the weights are how likely x_t is from each image, divided by their sum."""
    signal, variance = np.sqrt(alpha_bar), 1 - alpha_bar
    plus, minus = (np.exp(-((x_t - s) ** 2) / (2 * variance)) for s in (signal, -signal))
    x0 = (plus - minus) / (plus + minus)
    return (x_t - signal * x0) / np.sqrt(variance)
