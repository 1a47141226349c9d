"""Captioned pictures of one or two coloured shapes, drawn from a seed, and an exact checker of such pictures.

"a small red circle above a blue square" is a caption that a tiny model can learn on a CPU, and, unlike a
photograph's, its picture can be checked without another network: `read_scenes` reads the objects back from
the pixels, without seeing the caption, and `compare` holds them against the caption word by word.

Lengths are in pixels of the 32 x 32 picture, whatever size is rendered (16 and 32 are tested); x grows to the
right, y downwards, and (0, 0) is the top left corner. An object's centre is its centroid, and its radius is
that of the disc of equal area: both can be summed over pixels before the shape is known.

Shapes: B scenes, M objects, S the picture's side, K the side of a patch around one object.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from itertools import combinations, permutations

import numpy as np

BACKGROUND = (235, 235, 235)
# Blends with the background lie on rays from it. These six are at least 32 degrees apart (orange would be 18
# from both red and yellow), so that an antialiased edge is never taken for another colour.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "yellow": (245, 205, 0),
    "green": (20, 160, 50),
    "cyan": (0, 200, 210),
    "blue": (40, 40, 220),
    "purple": (185, 30, 190),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left of", "right of")
VOCABULARY = tuple(sorted({"a", *COLOURS, *SHAPES, *SIZES, *" ".join(RELATIONS).split()}))

SIDE = 32
RADII = {"small": (2.8, 3.3), "large": (4.6, 5.1)}
LARGE_FROM = 3.95  # a radius from here on reads as large
MARGIN = 1.0  # least distance of an object from the picture's edge
GAP = 2.5  # least distance of two objects, along the axis of their relation
TWO_OBJECTS = 0.8  # the share of two-object scenes in "train"
AHEAD_FIRST = 0.75  # the share of captions in "train" that name the upper or left object first; elsewhere it is 1/2
SIZE_WORD = 0.5  # the chance that a caption names an object's size

HALF_SQUARE = np.sqrt(np.pi) / 2  # half the side of a square of area pi, the unit disc's
TRIANGLE = np.sqrt(4 * np.pi / np.sqrt(27))  # circumradius of an equilateral triangle of area pi
# How far each of SHAPES, at radius 1, reaches from its centroid: ((left, right), (up, down)).
EXTENT = np.array(
    [
        ((1, 1), (1, 1)),
        ((HALF_SQUARE, HALF_SQUARE), (HALF_SQUARE, HALF_SQUARE)),
        ((TRIANGLE * np.sqrt(3) / 2, TRIANGLE * np.sqrt(3) / 2), (TRIANGLE, TRIANGLE / 2)),
    ]
)

# The checker's bounds. True pictures stay clear of them up to noise of sigma 0.1 on the scale of [-1, 1].
LEAST_AREA = 10.0  # of an object, in square pixels; the smallest one drawn covers 24.6
RADIUS_SLACK = 1.2  # an object may be smaller or larger than any drawn by this factor
LEAST_GAP = 1.0  # as GAP, which allows for errors of measurement and for freer models
WORST_MISFIT = 0.06  # the squared errors of an object's alpha against a drawing of it, over its area
WORST_ERROR = 0.18  # of any 3 x 3 neighbourhood against a drawing of the reading; 1 is the full contrast


@dataclass(frozen=True)
class Object:
    """One object: its words, its centroid, and the radius of the disc of equal area, in 32nds of the side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two objects, in the order in which a caption names them."""

    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Reading:
    """What the checker sees: all objects found, and why this is no clean scene (None if it is one)."""

    objects: tuple[Object, ...]
    unclean: str | None


@dataclass(frozen=True)
class Phrase:
    """One object as a caption names it; `size` is None where the caption leaves it free."""

    colour: str
    shape: str
    size: str | None

    def __str__(self) -> str:
        return " ".join(filter(None, ("a", self.size, self.colour, self.shape)))


@dataclass(frozen=True)
class Caption:
    """One phrase and no relation, or two and how the first lies to the second; `str` gives the text."""

    phrases: tuple[Phrase, ...]
    relation: str | None

    def __str__(self) -> str:
        return f" {self.relation} ".join(map(str, self.phrases))


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption a picture gets right; see `compare`."""

    colours: bool
    shapes: bool
    sizes: bool
    relation: bool
    all_right: bool


TYPES: tuple[tuple[str, str], ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


def _split_pairs() -> dict[str, np.ndarray]:
    """The ordered pairs (2P, 2) of indices into TYPES in each split: 80% train, 5% val, 15% test.

    The unordered pairs are sorted by a hash of their words, so that no generator decides the division.
    """

    def digest(pair: tuple[int, int]) -> bytes:
        return sha256(" ".join(TYPES[pair[0]] + TYPES[pair[1]]).encode()).digest()

    pairs = sorted(combinations(range(len(TYPES)), 2), key=digest)
    held_out = round(len(pairs) / 5)
    val = round(held_out / 4)
    parts = {"train": pairs[held_out:], "val": pairs[:val], "test": pairs[val:held_out]}
    return {split: np.array(part + [pair[::-1] for pair in part]) for split, part in parts.items()}


PAIRS = _split_pairs()


def draw_scenes(
    n: int,
    rng: np.random.Generator,
    split: str = "train",
    objects: int | None = None,
    ahead_first: float = AHEAD_FIRST,
) -> list[Scene]:
    """Draw n scenes; "val" and "test" hold the pairs of (colour, shape) types that "train" never shows.

    In "train" the upper or left of two objects comes first in a share `ahead_first`, 1/2..1, of the scenes.
    `objects` forces one or two objects a scene. Without it 80% of the scenes in "train" have two, and all in
    the other splits. Raises ValueError for an unknown split, or for a single object outside "train".
    """
    if split not in PAIRS:
        raise ValueError(f"split must be one of {', '.join(PAIRS)}, not {split!r}.")
    if objects not in ((None, 1, 2) if split == "train" else (None, 2)):
        allowed = "1 or 2" if split == "train" else "2"
        raise ValueError(f"objects must be {allowed} for the split {split!r}, not {objects!r}.")
    types = PAIRS[split][rng.integers(len(PAIRS[split]), size=n)]  # (n, 2), as are sizes and radii
    sizes = rng.integers(len(SIZES), size=(n, 2))
    limits = np.array([RADII[size] for size in SIZES])[sizes]
    radii = rng.uniform(limits[..., 0], limits[..., 1])
    single = rng.random(n) >= (TWO_OBJECTS if split == "train" else 1)
    if objects is not None:
        single[:] = objects == 1
    reach = EXTENT[types % len(SHAPES)] * radii[..., None, None]  # (n, 2 objects, 2 axes, 2 sides)
    centres = np.where(single[:, None, None], _scatter(reach, rng), _place_pairs(reach, rng))
    columns = (column.tolist() for column in (types, sizes, centres, radii, single))
    scenes = [
        Scene(
            tuple(
                Object(TYPES[t[i]][0], TYPES[t[i]][1], SIZES[s[i]], c[i][0], c[i][1], r[i])
                for i in range(1 if alone else 2)
            )
        )
        for t, s, c, r, alone in zip(*columns, strict=True)
    ]
    return _name_ahead_first(scenes, rng, ahead_first) if split == "train" else scenes


def _name_ahead_first(scenes: list[Scene], rng: np.random.Generator, share: float) -> list[Scene]:
    """The same scenes, more of them beginning with the upper or left object, as people tend to begin.

    Were both orders equally common, neither a word's place in the caption nor "above" or "below" alone would tell
    anything of where its object is: only all three together would. Such a parity has no slope to begin learning on.
    """
    turn = (rng.random(len(scenes)) < 2 * share - 1).tolist()
    return [
        Scene(scene.objects[::-1])
        if t and len(scene.objects) == 2 and _relation(*scene.objects) in ("below", "right of")
        else scene
        for scene, t in zip(scenes, turn, strict=True)
    ]


def _scatter(reach: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centres (n, 2, 2) anywhere inside the picture, each object on its own."""
    return rng.uniform(MARGIN + reach[..., 0], SIDE - MARGIN - reach[..., 1])


def _place_pairs(reach: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centres (n, 2, 2) of objects at least GAP apart on a random axis and at most half as far off it."""
    n = np.arange(len(reach))
    axis = rng.integers(2, size=len(n))
    before = rng.integers(2, size=len(n))  # which of the two lies further left, or further up
    after, across = 1 - before, 1 - axis
    near, far = reach[n, before, axis], reach[n, after, axis]  # (n, 2 sides)
    spare = SIDE - 2 * MARGIN - GAP - near.sum(1) - far.sum(1)
    ahead, until = np.sort(rng.random((2, len(n))), axis=0) * spare
    centres = _scatter(reach, rng)
    centres[n, before, axis] = MARGIN + ahead + near[:, 0]
    centres[n, after, axis] = MARGIN + until + near.sum(1) + GAP + far[:, 0]

    half = (centres[n, after, axis] - centres[n, before, axis]) / 2
    anchor, side = centres[n, before, across], reach[n, after, across]
    low = np.maximum(anchor - half, MARGIN + side[:, 0])
    high = np.minimum(anchor + half, SIDE - MARGIN - side[:, 1])
    centres[n, after, across] = rng.uniform(low, high)
    return centres


def _relation(first: Object, second: Object) -> str:
    right, down = second.x - first.x, second.y - first.y
    if abs(right) > abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene; each object's size word appears with probability 1/2."""
    named = rng.random(len(scene.objects)) < SIZE_WORD
    phrases = tuple(
        Phrase(found.colour, found.shape, found.size if with_size else None)
        for found, with_size in zip(scene.objects, named, strict=True)
    )
    return str(Caption(phrases, _relation(*scene.objects) if len(phrases) == 2 else None))


_PHRASE = rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_GRAMMAR = re.compile(rf"{_PHRASE}(?: ({'|'.join(RELATIONS)}) {_PHRASE})?")


def parse(text: str) -> Caption:
    """Read a caption back. Raises ValueError for a text outside the grammar."""
    match = _GRAMMAR.fullmatch(text)
    if match:
        size, colour, shape, relation, other_size, other_colour, other_shape = match.groups()
        phrases = Phrase(colour, shape, size), Phrase(other_colour, other_shape, other_size)
        return Caption(phrases if relation else phrases[:1], relation)
    for word in text.split():
        if word not in VOCABULARY:
            raise ValueError(f"caption {text!r}: unknown word {word!r}; use {', '.join(VOCABULARY)}.")
    raise ValueError(
        f"caption {text!r}: write 'a [{'|'.join(SIZES)}] COLOUR SHAPE', or two of these with one of "
        f"{', '.join(RELATIONS)} between them."
    )


def _unit(rgb: tuple[int, int, int]) -> np.ndarray:
    return np.array(rgb, np.float32) / np.float32(127.5) - 1


_BACKGROUND = _unit(BACKGROUND)
_RGB = {colour: _unit(rgb) for colour, rgb in COLOURS.items()}
_CONTRASTS = np.array(list(_RGB.values())) - _BACKGROUND  # (6, 3)
_REACHES = np.linalg.norm(_CONTRASTS, axis=1)
_RAYS = _CONTRASTS / _REACHES[:, None]


def _coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The share of each pixel that a shape covers: 1/2 - d, d the pixel's signed distance to an edge.

    `dx` and `dy` are the pixel's offsets from the centroid, in pixels as is `radius`; they broadcast.
    """

    def inside(d: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - d, 0, 1)

    if shape == "circle":
        return inside(np.sqrt(dx * dx + dy * dy) - radius)
    if shape == "square":
        half = np.float32(HALF_SQUARE) * radius
        return inside(np.abs(dx) - half) * inside(np.abs(dy) - half)
    inradius = np.float32(TRIANGLE / 2) * radius
    across, up = np.float32(np.sqrt(3) / 2) * dx, dy / 2 + inradius
    return inside(across - up) * inside(-across - up) * inside(dy - inradius)


def _patches(x: np.ndarray, y: np.ndarray, radius: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (M, K, 1) and columns (M, 1, K) of a square around each object, with every pixel it touches."""
    k = min(size, int(np.ceil(2 * TRIANGLE * radius.max())) + 2)

    def span(centre: np.ndarray) -> np.ndarray:
        start = np.clip(np.rint(centre - k / 2), 0, size - k).astype(np.intp)
        return start[:, None] + np.arange(k)

    return span(y)[:, :, None], span(x)[:, None, :]


def _draw(
    shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Coverage (M, K, K) of the pixels in `rows` and `columns`; x, y and radius are (M,), in pixels."""
    dx = (columns + 0.5 - x[:, None, None]).astype(np.float32)
    dy = (rows + 0.5 - y[:, None, None]).astype(np.float32)
    return _coverage(shape, dx, dy, radius[:, None, None].astype(np.float32))


def render(scenes: Sequence[Scene | Reading], size: int = SIDE) -> np.ndarray:
    """Paint scenes, antialiased, later objects over earlier ones: float32 (B, size, size, 3) in [-1, 1]."""
    images = np.empty((len(scenes), size, size, 3), np.float32)
    images[:] = _BACKGROUND
    for layer in range(max((len(scene.objects) for scene in scenes), default=0)):
        present = [(b, scene.objects[layer]) for b, scene in enumerate(scenes) if len(scene.objects) > layer]
        for shape in SHAPES:
            alike = [(b, thing) for b, thing in present if thing.shape == shape]
            if alike:
                _paint(images, shape, alike)
    return images


def _paint(images: np.ndarray, shape: str, things: list[tuple[int, Object]]) -> None:
    """Blend objects of one shape, at most one for an image, into images."""
    size = images.shape[1]
    b = np.array([index for index, _ in things])[:, None, None]
    x, y, radius = np.array([(thing.x, thing.y, thing.radius) for _, thing in things]).T * (size / SIDE)
    colour = np.array([_RGB[thing.colour] for _, thing in things])[:, None, None]
    rows, columns = _patches(x, y, radius, size)
    alpha = _draw(shape, x, y, radius, rows, columns)[..., None]
    patch = images[b, rows, columns]  # (M, K, K, 3)
    patch += alpha * (colour - patch)
    images[b, rows, columns] = patch


def batch(
    n: int,
    rng: np.random.Generator,
    split: str = "train",
    size: int = SIDE,
    objects: int | None = None,
    ahead_first: float = AHEAD_FIRST,
) -> tuple[np.ndarray, list[str]]:
    """n pictures, float32 (n, size, size, 3), and their captions; see `draw_scenes` for the arguments."""
    scenes = draw_scenes(n, rng, split, objects, ahead_first)
    return render(scenes, size), [caption(scene, rng) for scene in scenes]


def held_out_captions(n: int, seed: int = 0, split: str = "test") -> list[str]:
    """n captions of two objects that "train" never shows together, always the same for one seed."""
    rng = np.random.default_rng(seed)
    return [caption(scene, rng) for scene in draw_scenes(n, rng, split, objects=2)]


def read_scenes(images: np.ndarray) -> list[Reading]:
    """Read the objects, as many as there are, in pictures (B, S, S, 3) in [-1, 1].

    A pixel is a blend background + alpha (colour - background), in the colour that leaves the least residual.
    Connected pixels of one colour with alpha > 1/2 make an object, unless they are too few. The sums of
    alpha, alpha x and alpha y over its neighbourhood give its area and centroid, and its shape is the one
    that, drawn there with that area, comes closest. A reading is clean if it has one or two objects, of
    plausible size, apart and clearly outlined, and if drawing it gives the whole picture back, which specks,
    haze and other colours prevent.
    Raises ValueError where the images have another shape; one that is not finite reads as empty and unclean.
    """
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"images must have shape (B, S, S, 3), not {images.shape}.")
    finite = np.isfinite(images).all(axis=(1, 2, 3))
    images = np.where(finite[:, None, None, None], images, _BACKGROUND).clip(-2, 2).astype(np.float32)
    away = images - _BACKGROUND
    objects: list[list[Object]] = [[] for _ in images]
    misfits = np.zeros(len(images))
    for b, thing, misfit in _measure(away, *_label(away)):
        objects[b].append(thing)
        misfits[b] = max(misfits[b], misfit)
    scenes = [Scene(tuple(things)) for things in objects]
    errors = _worst_errors(images, render(scenes, images.shape[1]))
    unclean = map(_objection, scenes, misfits, errors)
    return [
        Reading(scene.objects, why if ok else "it holds values that are not finite")
        for scene, why, ok in zip(scenes, unclean, finite, strict=True)
    ]


def _label(away: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the objects of a batch from 1: labels (B, S, S), 0 for none, and hues (M,) that index COLOURS.

    `away` is the pictures less the background.
    """
    along = away @ _RAYS.T  # the longest projection leaves the least residual
    hue = along.argmax(-1)
    solid = np.take_along_axis(along, hue[..., None], -1)[..., 0] > 0.5 * _REACHES[hue]
    pixel = np.cumsum(solid).reshape(solid.shape) - 1  # the index among the solid ones
    right = solid[:, :, 1:] & solid[:, :, :-1] & (hue[:, :, 1:] == hue[:, :, :-1])
    down = solid[:, 1:] & solid[:, :-1] & (hue[:, 1:] == hue[:, :-1])
    here = np.concatenate((pixel[:, :, :-1][right], pixel[:, :-1][down]))
    there = np.concatenate((pixel[:, :, 1:][right], pixel[:, 1:][down]))
    component = _connect(here, there, int(np.count_nonzero(solid)))
    area = np.bincount(component, minlength=len(component))
    first = np.flatnonzero(area >= LEAST_AREA * (away.shape[1] / SIDE) ** 2)  # each object's first pixel
    number = np.zeros(len(component), np.intp)
    number[first] = np.arange(1, len(first) + 1)
    labels = np.zeros(solid.shape, np.intp)
    labels[solid] = number[component]
    return labels, hue[solid][first]


def _connect(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """The smallest index (n,) that can be reached from each one over the links a[i] - b[i]."""
    lowest = np.arange(n)
    while (lowest[a] != lowest[b]).any():
        low, high = np.sort((lowest[a], lowest[b]), axis=0)
        np.minimum.at(lowest, high, low)
        lowest = lowest[lowest]
    return lowest


def _grow(labels: np.ndarray) -> np.ndarray:
    """Give each unlabelled pixel that touches an object, be it at a corner, to that object."""
    wide = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
    near = np.maximum(np.maximum(wide[:, :-2], wide[:, 2:]), wide[:, 1:-1])
    near = np.maximum(np.maximum(near[:, :, :-2], near[:, :, 2:]), near[:, :, 1:-1])
    return np.where(labels > 0, labels, near)


def _measure(away: np.ndarray, labels: np.ndarray, hues: np.ndarray) -> list[tuple[int, Object, float]]:
    """The objects behind labels, each with the index of its picture before it and its misfit behind."""
    if not len(hues):
        return []
    size = away.shape[1]
    for _ in range(max(1, size // 16)):
        labels = _grow(labels)
    inside = np.nonzero(labels)
    owner = labels[inside] - 1
    alpha = np.zeros(labels.shape)
    alpha[inside] = (away[inside] * _RAYS[hues[owner]]).sum(1) / _REACHES[hues[owner]]
    b = np.zeros(len(hues), np.intp)
    b[owner] = inside[0]

    def total(weight: np.ndarray | int) -> np.ndarray:
        return np.bincount(owner, alpha[inside] * weight)

    area = np.maximum(total(1), LEAST_AREA * (size / SIDE) ** 2)
    x, y, radius = total(inside[2] + 0.5) / area, total(inside[1] + 0.5) / area, np.sqrt(area / np.pi)
    shapes, errors = _nearest_shapes(alpha, labels, b, x, y, radius)
    places = (np.stack((x, y, radius), axis=1) * (SIDE / size)).tolist()
    colours = np.array(list(COLOURS))[hues].tolist()
    return [
        (index, Object(colour, SHAPES[shape], _size_word(place[2]), *place), misfit)
        for index, colour, shape, place, misfit in zip(b.tolist(), colours, shapes, places, errors / area, strict=True)
    ]


def _size_word(radius: float) -> str:
    return "large" if radius >= LARGE_FROM else "small"


def _nearest_shapes(
    alpha: np.ndarray, labels: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Index into SHAPES and squared error, both (M,), of the drawing, sharp or soft, nearest to alpha."""
    size = alpha.shape[1]
    rows, columns = _patches(x, y, radius, size)
    patch = b[:, None, None], rows, columns
    mine = labels[patch] == np.arange(1, len(b) + 1)[:, None, None]
    sharp = np.stack([_draw(shape, x, y, radius, rows, columns) for shape in SHAPES])  # (3, M, K, K)
    soft = _blur(sharp, _softness(size))
    errors = [np.square(alpha[patch] * mine - drawn).sum((2, 3)) for drawn in (sharp, soft)]
    nearest = np.min(errors, axis=0)  # (3, M)
    return nearest.argmin(0), nearest.min(0)


def _softness(size: int) -> float:
    """The weight w of the mild blur (see `_blur`) that a picture may have: equally wide at 16 and at 32."""
    return min(0.25, 0.25 * (size / SIDE) ** 2)


def _blur(images: np.ndarray, w: float) -> np.ndarray:
    """Convolve the last two axes with (w, 1 - 2 w, w) each; edges are repeated."""
    padded = np.pad(images, [(0, 0)] * (images.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
    rows = w * (padded[..., :-2, :] + padded[..., 2:, :]) + (1 - 2 * w) * padded[..., 1:-1, :]
    return w * (rows[..., :-2] + rows[..., 2:]) + (1 - 2 * w) * rows[..., 1:-1]


def _worst_errors(images: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The largest error (B,) of any 3 x 3 neighbourhood; 1 is an object where the background should be.

    A picture may be as sharp as the drawing or a little softer, whichever comes closer.
    """
    seen, sharp = (_blur(np.moveaxis(x, -1, 1), 0.25) for x in (images, drawn))
    soft = _blur(sharp, _softness(images.shape[1]))
    errors = [np.linalg.norm(seen - x, axis=1).max((1, 2)) for x in (sharp, soft)]
    return np.min(errors, axis=0) / _REACHES.mean()


def _objection(scene: Scene, misfit: float, error: float) -> str | None:
    """Why the objects that were read, with these errors at worst, are no clean scene."""
    if not 1 <= len(scene.objects) <= 2:
        return f"it shows {len(scene.objects)} objects"
    radii = [thing.radius for thing in scene.objects]
    if min(radii) < RADII["small"][0] / RADIUS_SLACK or max(radii) > RADII["large"][1] * RADIUS_SLACK:
        return "an object is too small or too large"
    if len(scene.objects) == 2 and _gap(*scene.objects) < LEAST_GAP:
        return "its objects touch"
    if not misfit <= WORST_MISFIT:
        return f"an object has no clear outline: misfit {misfit:.2f}"
    if not error <= WORST_ERROR:
        return f"it differs from a drawing of what was read by {error:.2f} of the full contrast"
    return None


def _gap(first: Object, second: Object) -> float:
    """The distance of two bounding boxes on the axis where it is larger; negative if they overlap."""
    a, b = (EXTENT[SHAPES.index(thing.shape)] * thing.radius for thing in (first, second))
    offset = np.array((second.x - first.x, second.y - first.y))
    return np.maximum(offset - a[:, 1] - b[:, 0], -offset - a[:, 0] - b[:, 1]).max()


def compare(reading: Reading, text: str) -> Verdict:
    """Hold a reading against a caption. Raises ValueError for a text outside the grammar.

    colours, shapes  those read are those named, in any order, each as often as it is named
    sizes, relation  the number of objects is right, and every size word, or the relation, holds when objects
                     are assigned to phrases so that most words agree (under each such assignment, where two
                     tie); a caption that names no size, or no relation, cannot fail there
    all_right        the reading is clean, and every word of the caption holds under one assignment

    An unclean reading is never all right; its other four are judged by the objects that were found.
    """
    wanted = parse(text)
    phrases, objects = wanted.phrases, reading.objects
    colours = Counter(o.colour for o in objects) == Counter(p.colour for p in phrases)
    shapes = Counter(o.shape for o in objects) == Counter(p.shape for p in phrases)
    if len(objects) != len(phrases):
        return Verdict(colours, shapes, sizes=False, relation=False, all_right=False)

    agreement = {order: sum(map(_agreement, order, phrases)) for order in permutations(objects)}
    most = max(agreement.values())
    best = [order for order in agreement if agreement[order] == most]
    sizes = all(p.size in (None, o.size) for order in best for o, p in zip(order, phrases, strict=True))
    relation = wanted.relation is None or all(_relation(*order) == wanted.relation for order in best)
    all_right = reading.unclean is None and most == 3 * len(phrases) and relation
    return Verdict(colours, shapes, sizes, relation, all_right)


def _agreement(thing: Object, phrase: Phrase) -> int:
    """How many of the three properties agree; a size that is not named does."""
    size = phrase.size in (None, thing.size)
    return (thing.colour == phrase.colour) + (thing.shape == phrase.shape) + size


SCORES = tuple(f.name for f in fields(Verdict))


def judge(images: np.ndarray, captions: Sequence[str]) -> list[Verdict]:
    """What each picture (B, S, S, 3) gets right of its caption."""
    if len(images) != len(captions) or not len(captions):
        raise ValueError(f"judge needs a caption for each image, not {len(captions)} for {len(images)}.")
    return [compare(reading, text) for reading, text in zip(read_scenes(images), captions, strict=True)]


def score(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The shares of pictures that get each part of their captions right."""
    return {part: float(np.mean([getattr(verdict, part) for verdict in verdicts])) for part in SCORES}


def chance(n: int, seed: int = 0, split: str = "test") -> dict[str, float]:
    """`score` of true pictures (2 or more) against each other's captions: the level of a model deaf to its text."""
    images, captions = batch(max(2, n), np.random.default_rng(seed), split)
    return score(judge(images, captions[1:] + captions[:1]))
