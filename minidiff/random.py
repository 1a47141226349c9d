"""Randomness as a pure function: Philox4x32-10 counters in, uniform and normal numbers out.

A counter names what a number is for: (element, sample, step, purpose). The same seed and counter always give the
same number, so a picture does not change with the batch it is drawn in, and a training run resumes from its step
number alone. Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from minidiff.backend import Array, array_module, kernel

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1: what the key grows by each round
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)


class Purpose(IntEnum):
    """What a number is drawn for; numbers of different purposes are independent."""

    PARAMETERS = 0
    TRAIN_NOISE = 1
    TRAIN_TIMESTEP = 2
    DROP_CAPTION = 3
    START_NOISE = 4
    STEP_NOISE = 5
    PICTURES = 6


class Draw(NamedTuple):
    """Which normal numbers: what `normal` is told before their shape."""

    seed: int
    samples: Sequence[int]
    step: int
    purpose: Purpose


def philox(c0: Array, c1: Array, c2: Array, c3: Array, seed: int) -> tuple[Array, Array, Array, Array]:
    """Four 32-bit counters (arrays of uint64 that broadcast) and a 64-bit key -> four 32-bit words (uint64 arrays)."""
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        p0 = c0 * np.uint64(_MULTIPLIERS[0])
        p1 = c2 * np.uint64(_MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> 32) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def check_counters(seed: int, samples: Sequence[int], step: int) -> None:
    """Raises ValueError for a seed beyond 64 bits, or a step or sample number beyond 32."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed must be in 0..2^64 - 1, got {seed}")
    if max(step, *samples, 0, 0) >= 2**32 or min(step, *samples, 0, 0) < 0:
        raise ValueError("the numbers of the step and of the samples must be in 0..2^32 - 1")


def _words(seed: int, samples: Sequence[int], step: int, purpose: Purpose, elements: int) -> np.ndarray:
    """32-bit words (len(samples), elements); element e is word e % 4 of the block with counter e // 4."""
    check_counters(seed, samples, step)
    blocks = np.arange((elements + 3) // 4, dtype=np.uint64)[None, :]
    sample = np.asarray(samples, dtype=np.uint64)[:, None]
    words = philox(blocks, sample, np.uint64(step), np.uint64(purpose), seed)
    return np.stack(np.broadcast_arrays(*words), axis=-1).reshape(len(samples), 4 * blocks.size)


def uniform(seed: int, samples: Sequence[int], step: int, purpose: Purpose, elements: int = 1) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (len(samples), elements); multiples of 2^-32."""
    return _words(seed, samples, step, purpose, elements)[:, :elements] * 2.0**-32


@kernel
def normal(
    seed: int, samples: Sequence[int], step: int, purpose: Purpose, shape: tuple[int, ...], like: Array | None = None
) -> Array:
    """Standard normal numbers, float32 (len(samples), *shape), the elements counted in C order.

    like: an array on the device where they are wanted; None: in the computer's own memory.

    Box-Muller: words (a, b) give u = (a + 1) / 2^32 in (0, 1], so that log(u) is finite, an angle 2 pi b / 2^32, and
    the pair  sqrt(-2 log u) cos(angle), sqrt(-2 log u) sin(angle).
    """
    elements = math.prod(shape)
    words = _words(seed, samples, step, purpose, elements).astype(np.float32)
    words = words.reshape(len(samples), words.shape[1] // 2, 2)
    radius = np.sqrt(-2 * np.log((words[..., 0] + 1) * np.float32(2.0**-32)))
    angle = words[..., 1] * np.float32(2 * math.pi * 2.0**-32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    numbers = pairs.reshape(len(samples), words.shape[1] * 2)[:, :elements].reshape(len(samples), *shape)
    return array_module(like).asarray(numbers)
