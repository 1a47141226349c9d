"""Pictures as training gets them: the walk, the mirroring, the captions, and decoding once."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minidiff.data import pictures as module
from minidiff.data.images import Item
from minidiff.data.pictures import Pictures, chosen, decode, shortened, some_of, vocabulary
from minidiff.errors import UserError

N = 10


def numbered(n=N, seed=0, **changes):
    """A set of n pictures 4 x 6: picture i has the value 20 + i, and a dark left column; labels are i % 3."""
    images = np.full((n + 2, 4, 6, 3), 20, np.uint8) + np.arange(n + 2, dtype=np.uint8)[:, None, None, None]
    images[:, :, 0] = 0
    rows = np.arange(n) + 1  # the first and the last picture are not in the set
    captions = [tuple(f"picture {i + 1} caption {k}" for k in range(1 + i % 3)) for i in range(n)]
    data = Pictures(images, rows, captions, (), (), "", seed, labels=np.arange(n) % 3, classes=("a", "b", "c"))
    return replace(data, **changes)


def numbers(images):
    """Which pictures of `numbered` these are."""
    return [round((float(image[0, 3, 0]) + 1) * 127.5) - 20 for image in images]


def walk(data, visits, size=1):
    """The numbers of the pictures of the first visits."""
    return [number for step in range(-(-visits // size)) for number in numbers(data.batch(step, size)[0])][:visits]


def epochs(data, count):
    visited = walk(data, count * len(data), 5)
    return [visited[i : i + len(data)] for i in range(0, len(visited), len(data))]


def test_every_epoch_is_another_permutation_and_the_same_for_the_same_seed():
    orders = epochs(numbered(), 6)
    assert all(sorted(order) == list(range(1, N + 1)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert epochs(numbered(), 6) == orders
    others = [tuple(epochs(numbered(seed=seed), 1)[0]) for seed in range(1, 6)]
    assert len({tuple(orders[0]), *others}) == 6


def test_the_order_hangs_on_the_seed_and_the_epoch_alone():
    data = numbered()
    changed = replace(data, images=data.images.copy(), flip=True, captions=[("x", "y")] * N)
    assert walk(changed, 3 * N) == walk(data, 3 * N)


def test_pictures_are_well_mixed():
    """At each place of an epoch, each picture stands about equally often."""
    counts = np.zeros((N, N))
    for epoch in range(400):
        order, _ = module._epoch(3, epoch, N)
        counts[np.arange(N), order] += 1
    assert 15 < counts.min() and counts.max() < 75  # 40 +- 6


@pytest.mark.parametrize("size", [1, 3, 4, N, 25])
def test_the_walk_does_not_hang_on_the_size_of_its_batches(size):
    """Batches over the end of an epoch, and larger than the set."""
    data = numbered(flip=True)
    images, texts = zip(*(data.batch(step, 1) for step in range(50)), strict=True)
    for step in range(50 // size):
        batch, captions = data.batch(step, size)
        assert batch.shape == (size, 4, 6, 3)
        assert (batch == np.concatenate(images[step * size : (step + 1) * size])).all()
        assert captions == [c for text in texts[step * size : (step + 1) * size] for c in text]


def test_a_batch_is_a_pure_function():
    data, again = numbered(flip=True), numbered(flip=True)
    later, texts = data.batch(7, 4)
    for step in (3, 0, 7, 7):
        images, captions = again.batch(step, 4)
    assert (images == later).all() and captions == texts
    images += 1  # belongs to the caller
    assert (again.batch(7, 4)[0] == later).all()


def test_pixels_are_float32_and_exact_at_both_ends():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    data = replace(numbered(1), images=images, rows=np.array([0]))
    (image,), _ = data.batch(0, 1)
    assert image.dtype == np.float32 and data.image_shape == image.shape == (16, 16, 3)
    assert image.min() == -1 and image.max() == 1
    np.testing.assert_allclose(image[..., 0].ravel(), np.arange(256) / 127.5 - 1, atol=2e-7)


def test_half_of_the_visits_are_mirrored_and_nothing_else_is_changed():
    data = numbered(flip=True)
    left = right = 0
    for step in range(40):
        for image, number in zip(*(f(data.batch(step, N)[0]) for f in (list, numbers)), strict=True):
            pixels = data.images[number].astype(np.float64) / 127.5 - 1
            mirrored = image[0, -1, 0] == -1
            np.testing.assert_allclose(image, pixels[:, ::-1] if mirrored else pixels, atol=1e-6)
            left, right = left + (not mirrored), right + mirrored
    assert abs(left - right) < 80  # 400 visits: 20 is one standard deviation
    plain, _ = numbered().batch(0, 400)
    assert (plain[:, :, 0] == -1).all()


def test_mirroring_and_caption_are_drawn_anew_each_epoch_and_independently():
    data = numbered(flip=True, captions=[("0", "1")] * N)
    seen = {}
    for epoch in range(200):
        images, captions = data.batch(epoch, N)
        for number, image, caption in zip(numbers(images), images, captions, strict=True):
            seen.setdefault(number, []).append((image[0, -1, 0] == -1, caption == "1"))
    assert len(seen) == N
    for draws in seen.values():
        counts = np.unique(np.array(draws) @ [1, 2], return_counts=True)[1]
        assert len(counts) == 4 and counts.min() > 25  # 50 +- 6


def test_a_caption_is_one_of_the_pictures_own_and_all_of_them_come():
    data = numbered()
    seen = set()
    for step in range(60):
        images, captions = data.batch(step, N)
        for number, caption in zip(numbers(images), captions, strict=True):
            assert caption in data.captions[number - 1]
            seen.add(caption)
    assert seen == {caption for texts in data.captions for caption in texts}


def test_a_labelled_batch_agrees_with_the_batch():
    data = numbered(flip=True)
    for step in range(7):
        images, labels = data.labelled_batch(step, 4)
        assert (images == data.batch(step, 4)[0]).all()
        assert labels.tolist() == [(number - 1) % 3 for number in numbers(images)]
    with pytest.raises(AssertionError, match="no classes"):
        replace(data, labels=None).labelled_batch(0, 4)


# ---- choosing, words


def items(*captions):
    return [Item(f"{i}.png", texts if isinstance(texts, tuple) else (texts,)) for i, texts in enumerate(captions)]


def test_chosen_looks_into_every_caption_in_any_case():
    found = items("a Dog", ("a cat", "two DOGS"), "a cat", "a dog.")
    assert chosen(found, "dogs?", 0) == [found[0], found[1], found[3]]
    assert chosen(found, "dog", 0) == chosen(found, r"\bdog\b", 0) == chosen(found, "^a dog", 0) == [found[0], found[3]]
    assert chosen(found, "dogs?|cats?", 0) == found == chosen(found, "", 0) == chosen(found, ".*", 0)
    with pytest.raises(UserError, match=re.escape("no caption of 4 pictures holds 'zebra' as whole words")):
        chosen(found, "zebra", 0)
    few = chosen(found, "dogs?", 2)
    assert len(few) == 2 and set(few) <= set(chosen(found, "dogs?", 0))


def test_chosen_finds_whole_words_in_every_alternative():
    found = items("a located cat-like dog", "located", "cattle", "hotdog", "one dog", "the cat")
    assert chosen(found, "dog|cat", 0) == [found[0], found[4], found[5]]


def test_what_a_set_holds_in_a_line():
    data = replace(numbered(labels=None), words=("a", "b"), found=N)
    assert data.summary() == "10 pictures, 19 captions, 2 words"
    assert replace(data, found=80).summary() == "10 of 80 pictures, 19 captions, 2 words"
    broken = replace(numbered(found=12), left_out=("x.png is empty", "y"))
    assert broken.summary() == "10 of 12 pictures, 3 classes; 2 are left out, the first: x.png is empty"


def test_some_of_is_even_rising_and_always_the_same():
    assert some_of(5, 0).tolist() == some_of(5, 5).tolist() == some_of(5, 9).tolist() == [0, 1, 2, 3, 4]
    few = some_of(10_000, 300)
    assert len(set(few.tolist())) == 300 and (np.diff(few) > 0).all() and (some_of(10_000, 300) == few).all()
    quarters = np.bincount(few // 2500, minlength=4)
    assert quarters.min() > 50  # 75 +- 7.5
    assert set(few.tolist()) <= set(some_of(10_000, 500).tolist())  # a larger limit keeps them


def test_the_vocabulary_is_the_most_frequent_words():
    captions = [("A cat, a DOG.", "the cat"), ("a_zebra's cat",)]
    assert vocabulary(captions, 100) == ("a", "cat", "dog", "s", "the", "zebra")
    assert vocabulary(captions, 3) == ("a", "cat", "dog")
    assert vocabulary([("Ünï 中文 7",)], 9) == ("7", "ünï", "中文")


def test_shortened_cuts_words_and_leaves_the_rest_alone():
    captions = [("One, two; three!", "four"), ("a b c d",)]
    assert shortened(captions, 3) == ([("One, two; three!", "four"), ("a b c",)], 1)
    assert shortened(captions, 1) == ([("one", "four"), ("a",)], 2)
    assert shortened(captions, 9) == (captions, 0)


# ---- decoding


@pytest.fixture
def folder(tmp_path):
    """Six flat pictures of their own colour, 8 x 8, as items."""
    found = []
    for i in range(6):
        path = tmp_path / "pictures" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        paint(path, i)
        found.append(Item(path, (f"number {i}",)))
    return found


def paint(path, value):
    Image.new("RGB", (8, 8), (10 * value, value, 255 - value)).save(path)


@pytest.fixture
def reads(monkeypatch):
    """The paths that were decoded."""
    found = []
    plain = module.read_image
    monkeypatch.setattr(module, "read_image", lambda path, size: found.append(path) or plain(path, size))
    return found


def test_pictures_are_decoded_once(tmp_path, folder, reads):
    for _ in range(2):
        array, rows, digest, broken = decode(folder, 8, tmp_path / "cache", "set", False)
        assert array.shape == (6, 8, 8, 3) and rows.tolist() == list(range(6)) and broken == ()
        assert [tuple(pixels[0, 0]) for pixels in array] == [(10 * i, i, 255 - i) for i in range(6)]
    assert sorted(reads) == [item.path for item in folder]
    small, _, other, _ = decode(folder, 4, tmp_path / "cache", "set", False)
    assert small.shape == (6, 4, 4, 3) and len(reads) == 12 and other != digest


@pytest.mark.skipif(not hasattr(os, "SEEK_HOLE"), reason="holes in files cannot be found here")
def test_the_disk_has_room_for_all_before_the_first_is_read(tmp_path, folder, monkeypatch):
    """On a full disk, writing into a hole of a mapped file would end the process without a word."""
    holes = []

    def read(path, size):
        (file,) = tmp_path.glob("cache/.set-*/images.npy")
        with open(file, "rb") as f:
            holes.append((f.seek(0, os.SEEK_HOLE), file.stat().st_size))
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(module, "read_image", read)
    decode(folder, 256, tmp_path / "cache", "set", False)
    assert len(holes) == 6 and all(hole == size > 6 * 256 * 256 * 3 for hole, size in holes)


def test_a_picture_that_changed_is_decoded_again(tmp_path, folder, reads):
    _, _, before, _ = decode(folder, 8, tmp_path / "cache", "set", False)
    paint(folder[2].path, 9)
    array, _, after, _ = decode(folder, 8, tmp_path / "cache", "set", False)
    assert tuple(array[2, 0, 0]) == (90, 9, 246) and before != after and len(reads) == 12
    with pytest.raises(UserError, match="there is no image file"):
        folder[3].path.unlink()
        decode(folder, 8, tmp_path / "cache", "set", False)
    assert len(decode(folder[:3], 8, tmp_path / "cache", "set", False)[0]) == 3


def ruin(folder):
    """The second picture is missing, the fifth broken."""
    folder[1].path.unlink()
    folder[4].path.write_bytes(b"no picture")


def test_a_name_that_the_file_system_refuses_is_left_out_as_well(tmp_path, folder):
    folder[2] = Item(tmp_path / ("x" * 400 + ".png"), ("far too long",))
    _, rows, _, broken = decode(folder, 8, tmp_path / "cache", "set", True)
    assert rows.tolist() == [0, 1, 3, 4, 5] and "cannot be read" in broken[0] and len(broken[0]) < 700


def test_the_first_broken_picture_stops(tmp_path, folder):
    ruin(folder)
    for _ in range(2):
        with pytest.raises(UserError, match=r"there is no image file .*1\.png"):
            decode(folder, 8, tmp_path / "cache", "set", False)
    assert not list((tmp_path / "cache").iterdir())


def test_broken_pictures_are_left_out_and_told(tmp_path, folder, reads):
    ruin(folder)
    for _ in range(2):  # decoded, then kept
        array, rows, _, broken = decode(folder, 8, tmp_path / "cache", "set", True)
        assert rows.tolist() == [0, 2, 3, 5] and [tuple(array[i, 0, 0])[1] for i in rows] == [0, 2, 3, 5]
        assert len(broken) == 2 and "1.png" in broken[0] and "4.png" in broken[1]
    assert len(reads) == 6
    with pytest.raises(UserError, match=r"1\.png"):  # what was kept with gaps does not serve where none are allowed
        decode(folder, 8, tmp_path / "cache", "set", False)
    paint(folder[1].path, 1)
    assert decode(folder, 8, tmp_path / "cache", "set", True)[1].tolist() == [0, 1, 2, 3, 5]


def test_none_that_can_be_read(tmp_path, folder):
    for item in folder:
        item.path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 6 pictures could be read; the first: .*0\.png is empty"):
            decode(folder, 8, tmp_path / "cache", "set", True)


def test_what_is_kept_is_named_by_json(tmp_path, folder):
    decode(folder, 8, tmp_path / "cache", "set", False)
    (place,) = (tmp_path / "cache").iterdir()
    assert json.loads((place / "about.json").read_text())["facts"]["rows"] == list(range(6))
