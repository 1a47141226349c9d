"""Data: captioned images. A dataset gives batches that are a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from minidiff.data import cifar10, coco, folder, shapes
from minidiff.data.decoded import decoded
from minidiff.data.pictures import Pictures, chosen, decode, shortened, some_of, vocabulary, whole_words
from minidiff.errors import UserError

NAMES = ("shapes", "cifar10", "coco", "folder")


@dataclass(frozen=True)
class DataConfig:
    """What the model learns to draw."""

    name: str = field(default="shapes", metadata={"help": f"dataset: {', '.join(NAMES)}"})
    path: str = field(default="", metadata={"help": "where the pictures are (--data is short for it)"})
    size: int = field(default=32, metadata={"help": "height and width of the images in pixels"})
    flip: bool = field(default=False, metadata={"help": "mirror half of the pictures, left to right"})
    match: str = field(
        default="",
        metadata={"help": 'take the pictures whose captions hold these words, a regular expression: "dogs?|cats?"'},
    )
    limit: int = field(default=0, metadata={"help": "take at most this many pictures, evenly at random; 0: all"})
    words: int = field(
        default=4000, metadata={"help": "size of the vocabulary: the most frequent words of the captions"}
    )
    skip_broken: bool = field(
        default=False,
        metadata={"help": "leave out, and count, pictures that are missing or broken, instead of stopping"},
    )
    cache: str = field(default="", metadata={"help": "folder for decoded pictures (if not given: ~/.cache/minidiff)"})
    ahead_first: float = field(
        default=shapes.AHEAD_FIRST,
        metadata={"help": "shapes: the share of training captions that name the upper or left object first"},
    )

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"data.name: {self.name!r} is not one of {', '.join(NAMES)}")
        if self.name == "shapes" and self.size not in (16, 32):
            raise ValueError(f"data.size: shapes are drawn at 16 or 32 pixels, got {self.size}")
        if self.name == "cifar10" and self.size != cifar10.SIDE:
            raise ValueError(f"data.size: the pictures of cifar10 have {cifar10.SIDE} pixels a side, got {self.size}")
        if not 8 <= self.size <= 1024:
            raise ValueError(f"data.size must be in 8..1024, got {self.size}")
        if self.name == "shapes" and (self.flip or self.match or self.limit or self.path):
            raise ValueError("data.path, flip, match and limit are not for shapes, which are drawn as they are needed")
        if self.skip_broken and self.name in ("shapes", "cifar10"):
            raise ValueError(f"data.skip_broken is for coco and folder; no picture of {self.name} is a file of its own")
        if self.limit < 0:
            raise ValueError(f"data.limit must not be negative, got {self.limit}")
        if self.words < 1:
            raise ValueError(f"data.words must be at least 1, got {self.words}")
        if "\0" in self.path + self.cache:
            raise ValueError("data.path and data.cache name folders: they cannot hold the character NUL")
        try:
            whole_words(self.match)
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"data.match: {self.match!r} is no regular expression: {e}") from e
        if not 0.5 <= self.ahead_first <= 1:
            raise ValueError(f"data.ahead_first must be in 0.5..1, got {self.ahead_first}")


class Dataset(Protocol):
    """What training needs of its data."""

    @property
    def words(self) -> Sequence[str]:
        """The words that the model is to know."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""

    @property
    def content(self) -> str:
        """What this set is known by: a run goes on only with the set that it began with."""

    @property
    def prompts(self) -> Sequence[str]:
        """Captions that show what a model has learned."""

    def batch(self, step: int, size: int) -> tuple[np.ndarray, list[str]]:
        """Images float32 (size, H, W, C) in [-1, 1] and their captions; a pure function of (seed, step, size)."""


class Shapes:
    """The procedural set of `shapes.py`: an endless stream of scenes from its training split."""

    words = shapes.VOCABULARY
    content = "shapes"

    def __init__(self, config: DataConfig, seed: int):
        self.image_shape = (config.size, config.size, 3)
        self.ahead_first = config.ahead_first
        self.seed = seed

    @property
    def prompts(self) -> Sequence[str]:
        """Captions of the validation split."""
        return shapes.held_out_captions(16, 0, "val")

    def batch(self, step: int, size: int) -> tuple[np.ndarray, list[str]]:
        """The scenes of this step."""
        rng = np.random.default_rng((self.seed, step))
        return shapes.batch(size, rng, "train", self.image_shape[0], ahead_first=self.ahead_first)


def open_data(config: DataConfig, seed: int, longest: int = 1000) -> Dataset:
    """The dataset that the settings name; captions are cut to their first `longest` words.

    Pictures are decoded when a set is opened for the first time. Raises UserError for whatever is wrong with the files.
    """
    if config.name == "shapes":
        return Shapes(config, seed)
    return open_pictures(config, seed, longest)


def open_pictures(config: DataConfig, seed: int, longest: int = 1000, split: str = "train") -> Pictures:
    """The pictures of cifar10, coco or folder; cifar10 has the splits "train" and "test", coco "train" and "val"."""
    try:
        return _open_pictures(config, seed, longest, split)
    except OSError as e:
        raise UserError(
            f"{e.filename or config.path} cannot be read ({e.strerror or e}); check its name and permissions"
        ) from e


def _open_pictures(config: DataConfig, seed: int, longest: int, split: str) -> Pictures:
    if longest < 1:
        raise UserError("text.context leaves no room for a word; make it at least 3")
    for name, folder_name in (("data.path", config.path), ("data.cache", config.cache)):
        try:
            folder_name.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"{name}: {folder_name!r} is not UTF-8; rename it, or make a link of another name") from e
    if not config.path:
        how = "minidiff download cifar10, then --data data" if config.name == "cifar10" else "--data FOLDER"
        raise UserError(f"data.path: say where the pictures of {config.name} are: {how}")
    path = Path(os.path.expanduser(config.path)).absolute()
    cache = cache_folder(config)
    if config.name == "cifar10":
        return _open_cifar10(config, path, cache, seed, longest, split)
    found = coco.items(path, split) if config.name == "coco" else folder.items(path)
    items = chosen(found, config.match, config.limit)
    images, rows, digest, broken = decode(items, config.size, cache, config.name, config.skip_broken)
    items = [items[i] for i in rows]
    captions, cut = shortened([item.captions for item in items], longest)
    labels = [item.label for item in items if item.label is not None]
    data = _pictures(config, seed, images, rows, captions, labels, digest)
    prompts = _unseen(config, path, longest) or data.prompts
    return replace(data, prompts=prompts, found=len(found), left_out=broken, cut=cut)


def _unseen(config: DataConfig, path: Path, longest: int) -> tuple[str, ...]:
    """Captions of COCO's validation pictures, where they are there; a broken validation set stops no training."""
    if config.name != "coco":
        return ()
    try:
        items = chosen(coco.items(path, "val") if path.is_dir() else [], config.match, 16)
    except (UserError, OSError):
        return ()
    captions, _ = shortened([item.captions for item in items], longest)
    return tuple(texts[0] for texts in captions)


def cache_folder(config: DataConfig) -> Path:
    """Where decoded pictures are kept: data.cache, or minidiff in $XDG_CACHE_HOME or in ~/.cache."""
    if config.cache:
        return Path(os.path.expanduser(config.cache))
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minidiff"
    except RuntimeError as e:  # nobody's home
        raise UserError("there is no home folder to keep decoded pictures in; name a folder with --data.cache") from e


def _open_cifar10(config: DataConfig, path: Path, cache: Path, seed: int, longest: int, split: str) -> Pictures:
    def make(file: Path) -> dict[str, object]:
        images, labels, names = cifar10.read(path, split)
        np.save(file, images)
        return {"labels": labels.tolist(), "names": names}

    images, about = decoded(cache, "cifar10", ["cifar10", split], make, cifar10.files_of(path))
    pattern = whole_words(config.match)
    called = [cifar10.captions(name) for name in about["names"]]
    wanted = [any(pattern.search(text) for text in texts) for texts in called]
    labels = np.array(about["labels"])
    rows = np.flatnonzero(np.array(wanted)[labels])
    if not len(rows):
        raise UserError(f"data.match: {config.match!r} matches none of the classes {', '.join(about['names'])}")
    rows = rows[some_of(len(rows), config.limit)]
    captions, cut = shortened([called[label] for label in labels[rows]], longest)
    classes = [about["names"][label] for label in labels[rows]]
    data = _pictures(config, seed, images, rows, captions, classes, about["content"])
    return replace(data, found=len(labels), cut=cut)


def _pictures(
    config: DataConfig,
    seed: int,
    images: np.ndarray,
    rows: np.ndarray,
    captions: Sequence[Sequence[str]],
    labels: Sequence[str],
    digest: str,
) -> Pictures:
    """labels: the class of each picture of the set, or none at all."""
    classes, first, numbers = np.unique(np.array(labels, object), return_index=True, return_inverse=True)
    shown = first if labels else some_of(len(captions), 16)
    prompts = tuple(captions[i][0] for i in shown)
    facts = json.dumps([digest, rows.tolist(), [list(texts) for texts in captions]])
    return Pictures(
        images=images,
        rows=rows,
        captions=captions,
        words=vocabulary(captions, config.words),
        prompts=prompts,
        content=hashlib.sha256(facts.encode()).hexdigest(),
        seed=seed,
        flip=config.flip,
        labels=numbers if labels else None,
        classes=tuple(classes),
    )
