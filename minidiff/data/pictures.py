"""Captioned pictures as training wants them: shuffled each epoch, mirrored half of the time, one caption a visit."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minidiff.data.decoded import decoded
from minidiff.data.images import Item, read_image
from minidiff.errors import UserError
from minidiff.random import Purpose, uniform
from minidiff.text.words import split_words
from minidiff.threads import num_threads, parallel_map


@dataclass(frozen=True)
class Pictures:
    """A set of N captioned pictures; every batch is a pure function of (seed, step, size)."""

    images: np.ndarray  # uint8 (M, H, W, 3), usually a memory map
    rows: np.ndarray  # (N,) which of the M are in the set
    captions: Sequence[Sequence[str]]  # N times at least one
    words: tuple[str, ...]  # that a model of this set knows, the most frequent first
    prompts: tuple[str, ...]  # captions to show what a model has learned
    content: str  # what the pixels and captions are known by
    seed: int
    flip: bool = False
    labels: np.ndarray | None = None  # (N,) class numbers, where the pictures have classes
    classes: tuple[str, ...] = ()  # their names
    found: int = 0  # how many pictures there were to choose from
    left_out: tuple[str, ...] = ()  # why each picture that could not be read is missing
    cut: int = 0  # how many captions were longer than the model reads

    def __len__(self) -> int:
        return len(self.rows)

    def summary(self) -> str:
        """What the set holds, in a line."""
        of = f" of {self.found}" if self.found > len(self) else ""
        classes = "1 class" if len(self.classes) == 1 else f"{len(self.classes)} classes"
        texts = f"{sum(map(len, self.captions))} captions, {len(self.words)} words"
        what = texts if self.labels is None else classes
        broken = f"; {len(self.left_out)} are left out, the first: {self.left_out[0]}" if self.left_out else ""
        cut = f"; {self.cut} captions are cut to what the model reads (--text.context)" if self.cut else ""
        return f"{len(self)}{of} pictures, {what}{cut}{broken}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.images.shape[1:]  # type: ignore[return-value]

    def batch(self, step: int, size: int) -> tuple[np.ndarray, list[str]]:
        """Images float32 (size, H, W, 3) in [-1, 1] and a caption each: visits step * size ... of an endless walk.

        Every epoch is a permutation of the set. Order, mirroring and choice of caption depend on (seed, epoch) alone.
        """
        visited, draws = self._visits(step, size)
        texts = [self.captions[i] for i in visited]
        return self._images(visited, draws), [t[int(u * len(t))] for t, u in zip(texts, draws[:, 1], strict=True)]

    def labelled_batch(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """As `batch`, with the class numbers (size,) in place of captions."""
        assert self.labels is not None, "these pictures have no classes"
        visited, draws = self._visits(step, size)
        return self._images(visited, draws), self.labels[visited]

    def _visits(self, step: int, size: int) -> tuple[list[int], np.ndarray]:
        """Which pictures (size,) this step visits, and two uniform numbers (size, 2) for each visit."""
        visited, draws = [], []
        for visit in range(step * size, (step + 1) * size):
            epoch, place = divmod(visit, len(self))
            order, numbers = _epoch(self.seed, epoch, len(self))
            visited.append(int(order[place]))
            draws.append(numbers[visited[-1]])
        return visited, np.array(draws)

    def _images(self, visited: Sequence[int], draws: np.ndarray) -> np.ndarray:
        images = np.empty((len(visited), *self.image_shape), np.uint8)
        for image, i, u in zip(images, visited, draws[:, 0], strict=True):
            pixels = self.images[self.rows[i]]
            image[:] = pixels[:, ::-1] if self.flip and u < 0.5 else pixels
        return scaled(images)


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Bytes as float32 in [-1, 1]."""
    return np.multiply(pixels, np.float32(1 / 127.5), dtype=np.float32) - np.float32(1)


@lru_cache(maxsize=4)  # a batch may reach over the end of an epoch
def _epoch(seed: int, epoch: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The order (n,) of an epoch's visits, and two uniform numbers (n, 2) for each picture of the set."""
    draws = uniform(seed, range(n), epoch, Purpose.PICTURES, 3)
    return np.argsort(draws[:, 0], kind="stable"), draws[:, 1:]


def whole_words(match: str) -> re.Pattern[str]:
    """The regular expression as one that finds whole words, in any case. Raises re.error as re.compile does."""
    match = unicodedata.normalize("NFC", match)
    flags = re.match(r"(?:\(\?[a-zA-Z]+\))?", match)
    assert flags
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a bracket that may mean a set one day
        re.compile(match)  # its brackets must be whole by themselves
        return re.compile(rf"{flags[0]}\b(?:{match[flags.end() :]})\b", re.IGNORECASE)


def chosen(items: Sequence[Item], match: str, limit: int) -> list[Item]:
    """The items with a caption in which `whole_words(match)` are; at most `limit` (0: all), evenly at random.

    Raises UserError if none is left.
    """
    pattern = whole_words(match)
    kept = [item for item in items if any(pattern.search(caption) for caption in item.captions)]
    if not kept:
        raise UserError(f"data.match: no caption of {len(items)} pictures holds {match!r} as whole words")
    return [kept[i] for i in some_of(len(kept), limit)]


def some_of(n: int, limit: int) -> np.ndarray:
    """At most `limit` (0: all) of 0..n - 1, evenly at random but always the same, rising."""
    if not limit or limit >= n:
        return np.arange(n)
    order, _ = _epoch(0, 0, n)
    return np.sort(order[:limit])


def decode(
    items: Sequence[Item], size: int, cache: Path, name: str, skip_broken: bool
) -> tuple[np.ndarray, np.ndarray, str, tuple[str, ...]]:
    """Pixels uint8 (len(items), size, size, 3), the rows that were read, the pixels' digest, and why others were not.

    skip_broken: leave out the pictures that cannot be read; else the first one stops with its UserError.
    """

    def read_into(array: np.ndarray, i: int) -> str | None:
        """Why picture i could not be read, if so."""
        try:
            array[i] = read_image(items[i].path, size)
        except UserError as e:
            if not skip_broken:
                raise
            return str(e)
        return None

    def make(path: Path) -> dict[str, object]:
        shape = (len(items), size, size, 3)
        with open(path, "wb") as file:  # zeros, not a hole: on a full disk, filling one through a map is fatal
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for _ in items:
                file.write(bytes(size * size * 3))
        array = np.lib.format.open_memmap(path, mode="r+")
        read = parallel_map(lambda i: read_into(array, i), range(len(items)), num_threads())
        why = list(tqdm(read, "decoding", len(items), unit="picture", dynamic_ncols=True))
        array.flush()
        return {"rows": [i for i, w in enumerate(why) if not w], "broken": [w for w in why if w]}

    array, about = decoded(cache, name, ["pictures", size, skip_broken], make, [item.path for item in items])
    if not about["rows"]:
        raise UserError(f"none of the {len(items)} pictures could be read; the first: {about['broken'][0]}")
    return array, np.array(about["rows"]), about["content"], tuple(about["broken"])


def vocabulary(captions: Sequence[Sequence[str]], limit: int) -> tuple[str, ...]:
    """The `limit` most frequent words of all captions, the most frequent first; ties in alphabetical order."""
    counts = Counter(word for texts in captions for text in texts for word in split_words(text))
    return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:limit])


def shortened(captions: Sequence[tuple[str, ...]], longest: int) -> tuple[list[tuple[str, ...]], int]:
    """The captions, cut to their first `longest` words, and how many had more."""

    @lru_cache(maxsize=1000)  # those of a class are alike
    def cut(text: str) -> str:
        words = split_words(text)
        return text if len(words) <= longest else " ".join(words[:longest])

    short = [tuple(cut(text) for text in texts) for texts in captions]
    return short, sum(a != b for texts in zip(captions, short, strict=True) for a, b in zip(*texts, strict=True))
