"""Data: captioned images. A dataset gives batches that are a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from minidiff.data import shapes

NAMES = ("shapes",)


@dataclass(frozen=True)
class DataConfig:
    """What the model learns to draw."""

    name: str = field(default="shapes", metadata={"help": f"dataset: {', '.join(NAMES)}"})
    size: int = field(default=32, metadata={"help": "height and width of the images in pixels"})

    ahead_first: float = field(
        default=shapes.AHEAD_FIRST,
        metadata={"help": "shapes: the share of training captions that name the upper or left object first"},
    )

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"data.name: {self.name!r} is not one of {', '.join(NAMES)}")
        if self.size not in (16, 32):
            raise ValueError(f"data.size: shapes are drawn at 16 or 32 pixels, got {self.size}")
        if not 0.5 <= self.ahead_first <= 1:
            raise ValueError(f"data.ahead_first must be in 0.5..1, got {self.ahead_first}")


class Dataset(Protocol):
    """What training needs of its data."""

    @property
    def words(self) -> Sequence[str]:
        """Every word that a caption can hold."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""

    def batch(self, step: int, size: int) -> tuple[np.ndarray, list[str]]:
        """Images float32 (size, H, W, C) in [-1, 1] and their captions; a pure function of (seed, step, size)."""


class Shapes:
    """The procedural set of `shapes.py`: an endless stream of scenes from its training split."""

    words = shapes.VOCABULARY

    def __init__(self, config: DataConfig, seed: int):
        self.image_shape = (config.size, config.size, 3)
        self.ahead_first = config.ahead_first
        self.seed = seed

    def batch(self, step: int, size: int) -> tuple[np.ndarray, list[str]]:
        """The scenes of this step."""
        rng = np.random.default_rng((self.seed, step))
        return shapes.batch(size, rng, "train", self.image_shape[0], ahead_first=self.ahead_first)


def open_data(config: DataConfig, seed: int) -> Dataset:
    """The dataset that the settings name."""
    return Shapes(config, seed)
