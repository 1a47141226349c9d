"""The sinusoidal timestep embedding: a number as a vector of waves, from fast to slow.

    emb[i] = cos(t * f_i), sin(t * f_i),   f_i = period^(-i / (D/2 - shift)),   i = 0 .. D/2 - 1

Vaswani et al. 2017 (3.5) for positions in a text, Ho et al. 2020 for the time of a diffusion process. The two halves
stand in the order cos, sin (`sin_first=False`) or sin, cos. Not differentiated: t is not learned.
"""

from __future__ import annotations

import math

import numpy as np

from minidiff.backend import Array, array_module


def timestep_embedding(
    t: Array, dim: int, sin_first: bool = False, shift: float = 0.0, period: float = 10000.0
) -> Array:
    """t (B,), any real numbers -> (B, dim), computed in float64 and returned in float32.

    An odd dim is filled up with a column of zeros. Networks embed t - 1, for t counted from 1.
    """
    xp = array_module(t)
    half = dim // 2
    f = xp.exp(-math.log(period) * xp.arange(half, dtype=np.float64) / (half - shift))
    angle = xp.asarray(t, dtype=np.float64)[:, None] * f
    waves = [xp.sin(angle), xp.cos(angle)] if sin_first else [xp.cos(angle), xp.sin(angle)]
    if dim % 2:
        waves.append(xp.zeros_like(angle[:, :1]))
    return xp.concatenate(waves, axis=1).astype(np.float32)
