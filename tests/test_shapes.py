"""The pictures are drawn as promised; the checker accepts true ones and rejects each kind of false one."""

from dataclasses import replace
from functools import cache, partial
from itertools import combinations

import numpy as np
import pytest

from minidiff.data import shapes
from minidiff.data.shapes import COLOURS, RELATIONS, SHAPES, SIZES, Object, Phrase, Scene

N = 1000
REQUIRED = 0.99
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def all_right(images, captions):
    return shapes.score(shapes.judge(images, captions))["all_right"]


def blank_like(images):
    return np.broadcast_to(shapes.render([Scene(())], images.shape[1]), images.shape)


def blur(images):
    """The 3 x 3 binomial filter."""
    for axis in (1, 2):
        padded = np.pad(images, [(1, 1) if i == axis else (0, 0) for i in range(4)], mode="edge")
        before, here, after = (np.take(padded, range(i, i + images.shape[axis]), axis) for i in range(3))
        images = (before + 2 * here + after) / 4
    return images


def noisy(images, rng, sigma=0.05):
    return images + rng.normal(0, sigma, images.shape).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(20)


@pytest.mark.parametrize("sigma", (0, 0.05, 0.1))
@pytest.mark.parametrize("size, soften", ((32, None), (32, blur), (16, None)))
def test_true_pictures_are_accepted(size, soften, sigma, rng):
    """Not blurred at 16, where a small object is three pixels wide and its blurred outline cannot be read."""
    images, captions = shapes.batch(N, rng, size=size)
    accepted = all_right(noisy(soften(images) if soften else images, rng, sigma), captions)
    print(f"size {size}{' blurred' if soften else ''} sigma {sigma}: accepted {accepted:.4f}")
    assert accepted >= REQUIRED


@pytest.mark.parametrize("split", ("val", "test"))
def test_held_out_pictures_are_accepted(split, rng):
    assert all_right(*shapes.batch(N, rng, split)) >= REQUIRED


def test_the_reverse_description_is_accepted(rng):
    images, captions = shapes.batch(N, rng, objects=2)
    assert all_right(images, [str(reverse(shapes.parse(text))) for text in captions]) >= REQUIRED


def reverse(caption):
    return replace(caption, phrases=caption.phrases[::-1], relation=OPPOSITE[caption.relation])


# False captions: one attribute is changed.


def change_phrase(field, words, caption, rng):
    """Another word for one property of one of the objects, or None where no phrase names it."""
    named = [i for i, phrase in enumerate(caption.phrases) if getattr(phrase, field)]
    if not named:
        return None
    phrases, i = list(caption.phrases), rng.choice(named)
    others = [word for word in words if word != getattr(phrases[i], field)]
    phrases[i] = replace(phrases[i], **{field: str(rng.choice(others))})
    return replace(caption, phrases=tuple(phrases))


def reverse_relation(caption, rng):
    return replace(caption, relation=OPPOSITE[caption.relation]) if caption.relation else None


def rotate_relation(caption, rng):
    if not caption.relation:
        return None
    others = [word for word in RELATIONS if word not in (caption.relation, OPPOSITE[caption.relation])]
    return replace(caption, relation=str(rng.choice(others)))


def swap(field, caption, rng):
    """Exchange one property of the two objects; None where they share it."""
    if not caption.relation:
        return None
    first, second = caption.phrases
    mine, yours = getattr(first, field), getattr(second, field)
    swapped = replace(first, **{field: yours}), replace(second, **{field: mine})
    return replace(caption, phrases=swapped) if mine != yours else None


CHANGES = {
    "colour": partial(change_phrase, "colour", COLOURS),
    "shape": partial(change_phrase, "shape", SHAPES),
    "size word": partial(change_phrase, "size", SIZES),
    "relation reversed": reverse_relation,
    "relation rotated": rotate_relation,
    "colours swapped": partial(swap, "colour"),
    "shapes swapped": partial(swap, "shape"),
}


@cache
def pictures_read(size):
    """Readings of noisy true pictures, and their captions."""
    rng = np.random.default_rng(21)
    images, captions = shapes.batch(2 * N, rng, size=size)
    return shapes.read_scenes(noisy(images, rng)), [shapes.parse(text) for text in captions]


@pytest.mark.parametrize("size", (32, 16))
@pytest.mark.parametrize("kind", CHANGES)
def test_changed_captions_are_rejected(kind, size, rng):
    readings, captions = pictures_read(size)
    changed = [CHANGES[kind](caption, rng) for caption in captions]
    pairs = zip(readings, changed, strict=True)
    verdicts = [shapes.compare(read, str(caption)) for read, caption in pairs if caption]
    rejected = 1 - np.mean([verdict.all_right for verdict in verdicts])
    print(f"{kind} at {size}: rejected {rejected:.4f} of {len(verdicts)}")
    assert len(verdicts) >= N and rejected >= REQUIRED


# False pictures, each against the caption of the scenes they were made from.


def blanks(scenes, size, rng):
    """Bare background, a constant colour, or black."""
    constant = rng.uniform(-1, 1, (len(scenes), 1, 1, 3))
    constant[::3] = blank_like(np.empty((1, size, size, 3)))[0, 0, 0]
    constant[1::3] = -1
    return np.broadcast_to(constant, (len(scenes), size, size, 3))


def pure_noise(scenes, size, rng):
    """Normal, uniform or blurred noise."""
    noise = rng.normal(0, 0.7, (len(scenes), size, size, 3))
    noise[::3] = rng.uniform(-1, 1, noise[::3].shape)
    noise[1::3] = 3 * blur(noise[1::3])
    return noise


def strong_noise(scenes, size, rng):
    return noisy(shapes.render(scenes, size), rng, 0.5)


def blends(scenes, size, rng):
    images = shapes.render(scenes, size)
    return (images + shapes.render(shapes.draw_scenes(len(scenes), rng), size)) / 2


def missing_object(scenes, size, rng):
    return shapes.render([Scene(scene.objects[:1]) for scene in scenes], size)


def extra_object(scenes, size, rng):
    """A small object more, where it is clear of the others."""
    return shapes.render([Scene((*scene.objects, one_more(scene, rng))) for scene in scenes], size)


def one_more(scene, rng):
    spots = rng.uniform(5, 27, (200, 2))
    room = [np.hypot(*(spots - (o.x, o.y)).T) - shapes.TRIANGLE * o.radius for o in scene.objects]
    x, y = spots[np.min(room, axis=0).argmax()]
    return Object(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), "small", x, y, 2.8)


def merged(scenes, size, rng):
    """The second object moved until it covers part of the first."""
    return shapes.render([Scene((s.objects[0], moved_onto(*s.objects))) for s in scenes], size)


def moved_onto(first, second):
    dx, dy = second.x - first.x, second.y - first.y
    share = 0.6 * (first.radius + second.radius) / np.hypot(dx, dy)
    return replace(second, x=first.x + share * dx, y=first.y + share * dy)


def pale(low, high, scenes, size, rng):
    """The whole picture faded towards the background, with alpha between low and high."""
    images = shapes.render(scenes, size)
    return images + rng.uniform(1 - high, 1 - low, (len(scenes), 1, 1, 1)) * (blank_like(images) - images)


def one_pale(scenes, size, rng):
    """Only the second object is half transparent."""
    first = shapes.render([Scene(scene.objects[:1]) for scene in scenes], size)
    return (first + shapes.render(scenes, size)) / 2


def smears(scenes, size, rng):
    """Motion blur over 3/8 of the side, along the columns or the rows."""
    images = shapes.render(scenes, size)
    reach = 3 * size // 16

    def mean(axis):
        return np.mean([np.roll(images, shift, axis) for shift in range(-reach, reach)], axis=0)

    return np.where(rng.integers(2, size=(len(scenes), 1, 1, 1)), mean(1), mean(2))


def two_coloured(scenes, size, rng):
    """The first object is painted in another colour right of its centre."""

    def repainted(thing):
        return replace(thing, colour=str(rng.choice([word for word in COLOURS if word != thing.colour])))

    painted = [Scene((repainted(scene.objects[0]), *scene.objects[1:])) for scene in scenes]
    edge = np.array([scene.objects[0].x for scene in scenes]) * size / shapes.SIDE
    right = np.arange(size) + 0.5 > edge[:, None]
    return np.where(right[:, None, :, None], shapes.render(painted, size), shapes.render(scenes, size))


def holes(scenes, size, rng):
    """The first object is a ring, its inner half the background."""
    images = shapes.render(scenes, size)
    first = [scene.objects[0] for scene in scenes]
    inner = [Scene((replace(thing, shape="circle", radius=thing.radius / 2),)) for thing in first]
    return images - (shapes.render(inner, size) - blank_like(images))


def specks(scenes, size, rng):
    """Three dots of dark blue on the background, of 2 x 2 pixels (a single one at 16)."""
    images = shapes.render(scenes, size).copy()
    empty = np.abs(images - blank_like(images)).max(-1) == 0
    side = size // 16
    for image, free in zip(images, empty, strict=True):
        rows, columns = np.nonzero(free[:-side, :-side])
        for i in rng.integers(len(rows), size=3):
            image[rows[i] : rows[i] + side, columns[i] : columns[i] + side] = (-0.7, -0.7, 0.7)
    return images


PICTURES = {
    "blank": blanks,
    "noise": pure_noise,
    "strong noise": strong_noise,
    "50/50 blend": blends,
    "missing object": missing_object,
    "extra object": extra_object,
    "merged objects": merged,
    "pale": partial(pale, 0.3, 0.6),
    "one pale object": one_pale,
    "smear": smears,
    "two-coloured object": two_coloured,
    "hole": holes,
    "specks": specks,
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("size", (32, 16))
def test_false_pictures_are_rejected(kind, size, rng):
    scenes = shapes.draw_scenes(N, rng, objects=2)
    captions = [shapes.caption(scene, rng) for scene in scenes]
    images = PICTURES[kind](scenes, size, rng)
    rejected = 1 - all_right(noisy(images, rng), captions)
    print(f"{kind} at {size}: rejected {rejected:.4f}")
    assert rejected >= REQUIRED


@pytest.mark.parametrize("size", (32, 16))
def test_a_picture_of_two_objects_is_wrong_for_a_caption_of_one(size, rng):
    images, captions = shapes.batch(N, rng, size=size, objects=2)
    first = [str(shapes.Caption(shapes.parse(text).phrases[:1], None)) for text in captions]
    assert 1 - all_right(images, first) >= REQUIRED


def test_triangles_stand_on_their_base(rng):
    scenes = [
        scene for scene in shapes.draw_scenes(2 * N, rng) if any(thing.shape == "triangle" for thing in scene.objects)
    ]
    readings = shapes.read_scenes(shapes.render(scenes)[:, ::-1])
    assert len(scenes) >= N and np.mean([reading.unclean is not None for reading in readings]) >= REQUIRED


def test_extreme_values_are_read_as_unclean(rng):
    images = shapes.batch(6, rng)[0].copy()
    images[0, 3, 4, 1] = np.nan
    images[1, 3, 4, 1] = np.inf
    images[2] = -np.inf
    images[3] *= 1e30
    images[4] = rng.normal(0, 1e6, images[4].shape)
    assert [reading.unclean is None for reading in shapes.read_scenes(images)] == [False] * 5 + [True]


def test_shapes_of_arrays_are_checked():
    with pytest.raises(ValueError, match=r"\(B, S, S, 3\), not \(32, 32, 3\)"):
        shapes.read_scenes(np.zeros((32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="a caption for each image, not 1 for 2"):
        shapes.judge(np.zeros((2, 32, 32, 3), np.float32), ["a red circle"])


def reading(*words, unclean=None):
    """Objects from left to right."""
    radius = {"small": 3.0, "large": 5.0}
    return shapes.Reading(
        tuple(
            Object(colour, shape, size, 8.0 + 16 * i, 16.0, radius[size])
            for i, (size, colour, shape) in enumerate(map(str.split, words))
        ),
        unclean,
    )


@pytest.mark.parametrize(
    "read, text, right",
    (
        (reading("small red circle"), "a red circle", "colours shapes sizes relation all_right"),
        (reading("small red circle"), "a large red circle", "colours shapes relation"),
        (
            reading("small red circle", "large blue square"),
            "a large blue square right of a small red circle",
            "colours shapes sizes relation all_right",
        ),
        (
            reading("small red circle", "large blue square", unclean="haze"),
            "a red circle left of a blue square",
            "colours shapes sizes relation",
        ),
        (
            reading("small blue circle", "small red square"),
            "a small red circle left of a blue square",
            "colours shapes sizes",
        ),  # colours swapped: which object is meant by which phrase cannot be told
        (
            reading("small red circle", "small red square"),
            "a small red circle left of a blue square",
            "shapes sizes relation",
        ),
        (reading("small red circle"), "a small red circle left of a small red circle", ""),
        (reading("small red circle", "small red circle"), "a red circle", ""),
        (reading(), "a red circle", ""),
    ),
)
def test_partial_credit(read, text, right):
    verdict = shapes.compare(read, text)
    assert " ".join(part for part, holds in vars(verdict).items() if holds) == right


@pytest.mark.parametrize("size, position, level, worst", ((32, 0.1, 0.004, 0.15), (16, 0.3, 0.012, 0.3)))
def test_drawing_what_was_read_gives_the_picture_back(size, position, level, worst, rng):
    """The errors are those of centre and radius (32nds of the side) and of pixels: RMS, and of any one."""
    scenes = shapes.draw_scenes(N, rng)
    images = shapes.render(scenes, size)
    readings = shapes.read_scenes(images)
    found, drawn = (
        np.array([place(thing) for scene in listed for thing in by_words(scene)]) for listed in (readings, scenes)
    )
    moved = np.abs(found - drawn).max()
    error = shapes.render(readings, size) - images
    rms, largest = np.sqrt(np.square(error).mean()), np.abs(error).max()
    print(f"size {size}: centre and radius {moved:.3f}, RMS {rms:.4f}, any pixel {largest:.3f}")
    assert moved <= position and rms <= level and largest <= worst


def by_words(scene):
    return sorted(scene.objects, key=lambda thing: (thing.colour, thing.shape, thing.size))


def place(thing):
    return thing.x, thing.y, thing.radius


def test_objects_are_apart_and_inside_and_clearly_related(rng):
    scenes = shapes.draw_scenes(N, rng, objects=2)
    images = shapes.render(scenes)
    border = np.ones(images.shape[1:], bool)
    border[1:-1, 1:-1] = False
    assert np.abs(images - blank_like(images))[:, border].max() <= 0.2
    for scene in scenes:
        first, second = scene.objects
        across, along = sorted((abs(first.x - second.x), abs(first.y - second.y)))
        assert across <= along / 2 + 1e-9
        assert shapes._gap(first, second) >= shapes.GAP - 1e-9
        assert (first.colour, first.shape) != (second.colour, second.shape)


def types(phrases):
    return frozenset((phrase.colour, phrase.shape) for phrase in phrases)


def pairs(split, rng):
    captions = [shapes.parse(text) for text in shapes.batch(5 * N, rng, split, size=16)[1]]
    return {types(caption.phrases) for caption in captions if caption.relation}


def test_held_out_pairs_never_occur_in_train(rng):
    train, val, test = (pairs(split, rng) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (122, 8, 23)
    assert len(train | val | test) == 122 + 8 + 23 == len(list(combinations(range(18), 2)))
    assert frozenset().union(*train) == {(colour, shape) for colour in COLOURS for shape in SHAPES}
    for split, held_out in (("val", val), ("test", test)):
        named = {types(shapes.parse(text).phrases) for text in shapes.held_out_captions(N, split=split)}
        assert named == held_out


VAL = [
    "cyan circle purple circle",
    "cyan square blue circle",
    "cyan square purple circle",
    "green circle cyan square",
    "red circle purple triangle",
    "red square green circle",
    "red triangle green square",
    "yellow triangle cyan square",
]


def test_the_division_is_fixed():
    """Scores can only be compared while this list stands."""
    named = [" ".join(shapes.TYPES[i] + shapes.TYPES[j]) for i, j in shapes.PAIRS["val"] if i < j]
    assert sorted(named) == VAL


def test_captions_name_each_size_half_the_time_and_two_objects_mostly(rng):
    captions = [shapes.parse(text) for text in shapes.batch(5 * N, rng, size=16)[1]]
    named = np.mean([phrase.size is not None for caption in captions for phrase in caption.phrases])
    two = np.mean([caption.relation is not None for caption in captions])
    assert abs(named - 0.5) < 0.02 and abs(two - 0.8) < 0.02


@pytest.mark.parametrize("split, ahead", (("train", 0.75), ("val", 0.5), ("test", 0.5)))
def test_training_captions_tend_to_name_the_upper_or_left_object_first(split, ahead, rng):
    captions = [shapes.parse(shapes.caption(scene, rng)) for scene in shapes.draw_scenes(5 * N, rng, split)]
    relations = [caption.relation for caption in captions if caption.relation]
    share = {relation: relations.count(relation) / len(relations) for relation in RELATIONS}
    assert abs(share["above"] + share["below"] - 0.5) < 0.03
    assert abs(share["above"] + share["left of"] - ahead) < 0.03
    assert abs(share["above"] / (share["above"] + share["below"]) - ahead) < 0.04


def test_seeds_reproduce():
    images, captions = shapes.batch(32, np.random.default_rng(5))
    again, same = shapes.batch(32, np.random.default_rng(5))
    others = shapes.batch(32, np.random.default_rng(6))[1]
    assert np.array_equal(images, again) and captions == same != others
    assert images.dtype == np.float32 and images.shape == (32, 32, 32, 3) and np.abs(images).max() <= 1
    assert shapes.held_out_captions(9, seed=1) == shapes.held_out_captions(9, seed=1)
    assert shapes.held_out_captions(9, seed=1) != shapes.held_out_captions(9, seed=2)


@pytest.mark.parametrize("objects", (1, 2))
def test_objects_are_forced(objects, rng):
    assert {len(scene.objects) for scene in shapes.draw_scenes(99, rng, objects=objects)} == {objects}


def test_impossible_draws_raise(rng):
    with pytest.raises(ValueError, match="split must be one of train, val, test, not 'dev'"):
        shapes.draw_scenes(1, rng, "dev")
    with pytest.raises(ValueError, match="objects must be 1 or 2 for the split 'train', not 3"):
        shapes.draw_scenes(1, rng, objects=3)
    with pytest.raises(ValueError, match="objects must be 2 for the split 'test', not 1"):
        shapes.draw_scenes(1, rng, "test", objects=1)


def test_captions_are_parsed_back(rng):
    captions = shapes.batch(N, rng, size=16)[1]
    assert [str(shapes.parse(text)) for text in captions] == captions
    assert {word for text in captions for word in text.split()} == set(shapes.VOCABULARY)
    phrases = Phrase("red", "circle", "large"), Phrase("blue", "square", None)
    assert shapes.parse("a large red circle left of a blue square") == shapes.Caption(phrases, "left of")


@pytest.mark.parametrize(
    "text",
    (
        "",
        "a circle",
        "red circle",
        "a red circle above",
        "a red circle a blue square",
        "a red  circle",
        "a red small circle",
        "A red circle",
        "a red circle near a blue square",
        "a pink circle",
        "a red circle\n",
        "a red circle left a blue square",
        "a red circle above a blue square above a red square",
    ),
)
def test_bad_captions_raise(text):
    with pytest.raises(ValueError, match=r"^caption .*\.$"):
        shapes.parse(text)


def test_chance_never_compares_a_picture_with_its_own_caption():
    assert shapes.chance(1)["all_right"] == 0


def test_chance_is_far_from_right():
    chance = shapes.chance(2 * N)
    print(chance)
    assert 0 < chance["all_right"] <= 0.02
    assert chance["colours"] <= 0.15 and chance["shapes"] <= 0.35 and chance["relation"] <= 0.25
    assert chance["sizes"] <= 0.7  # where a quarter of the captions name no size
