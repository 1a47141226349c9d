"""Solutions for notebook 5."""

import numpy as np


def features_at(H: int, W: int, channels: tuple[int, ...], level: int) -> tuple[int, int, int]:
    """5.1: every level down halves both sides."""
    return H // 2**level, W // 2**level, channels[level]


def inputs_of_up(channels: tuple[int, ...], level: int) -> tuple[int, int]:
    """5.2: features from below beside the level's last skip; then the level's own beside its first."""
    below = channels[min(level + 1, len(channels) - 1)]
    above = channels[max(level - 1, 0)]
    return below + channels[level], channels[level] + above


def embed(t: float, dim: int, period: float) -> np.ndarray:
    """5.3"""
    half = dim // 2
    f = period ** (-np.arange(half) / half)
    return np.concatenate([np.cos(t * f), np.sin(t * f)])
