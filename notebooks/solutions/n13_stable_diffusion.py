"""Solutions for notebook 13."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def in_our_order(array: np.ndarray) -> np.ndarray:
    """13.1: (out, in, kh, kw) -> (kh, kw, in, out); (out, in) -> (in, out)."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def heads_of(
    kind: str, channels: Sequence[int], attention_head_dim: int | Sequence[int] | None
) -> list[int]:
    """13.2: the number itself in the one class, the size of a head in the other."""
    if isinstance(attention_head_dim, int) or attention_head_dim is None:
        each = [attention_head_dim] * len(channels)
    else:
        each = list(attention_head_dim)
    if kind == "UNet2DConditionModel":
        return [n or 1 for n in each]
    return [width // (size or width) for width, size in zip(channels, each, strict=True)]


def spell(symbols: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """13.3: the pair with the lowest rank first."""
    symbols = list(symbols)
    while known := [pair for pair in pairwise(symbols) if pair in merges]:
        first = min(known, key=merges.index)
        joined: list[str] = []
        for symbol in symbols:
            if joined and (joined[-1], symbol) == first:
                joined[-1] += symbol
            else:
                joined.append(symbol)
        symbols = joined
    return symbols
