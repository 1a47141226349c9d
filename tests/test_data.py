"""Settings and opening of real pictures, and runs on them through the command line."""

import contextlib
import io
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_cifar10 import BINARY, FORMS, PYTHON, small_cifar, write_binary, write_form, write_python
from test_cli import fails
from test_train import TINY, same_bits

from minidiff import classifier, evaluate
from minidiff.checkpoint import FILE
from minidiff.cli import main
from minidiff.config import Config
from minidiff.data import DataConfig, Shapes, cache_folder, open_data, open_pictures, pictures
from minidiff.data.cifar10 import CLASSES
from minidiff.errors import UserError
from minidiff.train import load_state, read_log, train

SIDE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is written outside the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minidiff"


def paint(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_classes(path, n=6, names=("cat", "red_fox")):
    """A folder for each class, of n pictures."""
    for k, name in enumerate(names):
        for i in range(n):
            paint(path / name / f"{i}.png", 100 * k + i)


CAPTIONS = {"a.png": ["a cat", "one cat on a mat"], "b.png": ["a dog"], "c.png": ["two dogs"], "d.png": ["a bird"]}


def write_captions(path, captions=CAPTIONS):
    """A folder with metadata.jsonl."""
    for i, name in enumerate(captions):
        paint(path / name, i)
    lines = [json.dumps({"file_name": name, "text": texts}) for name, texts in captions.items()]
    (path / "metadata.jsonl").write_text("\n".join(lines))


def write_coco(path, captions=CAPTIONS, split="train"):
    folder = path / f"{split}2017"
    for i, name in enumerate(captions):
        paint(folder / name, i)
    content = {
        "images": [{"id": 7 + i, "file_name": name} for i, name in enumerate(captions)],
        "annotations": [{"image_id": 7 + i, "caption": c} for i, texts in enumerate(captions.values()) for c in texts],
    }
    (path / "annotations").mkdir(exist_ok=True)
    (path / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))


def config(name, path, **changes):
    return DataConfig(name=name, path=str(path), size=32 if name == "cifar10" else SIDE, **changes)


# ---- settings


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "imagenet"}, ["data.name", "'imagenet'", "shapes, cifar10, coco, folder"]),
        ({"size": 64}, ["data.size", "16 or 32 pixels", "got 64"]),
        ({"name": "cifar10", "size": 64}, ["data.size", "32 pixels a side", "got 64"]),
        ({"name": "coco", "size": 4}, ["data.size", "8..1024", "got 4"]),
        ({"name": "folder", "size": 2048}, ["data.size", "8..1024", "got 2048"]),
        ({"flip": True}, ["not for shapes"]),
        ({"match": "cat"}, ["not for shapes"]),
        ({"limit": 3}, ["not for shapes"]),
        ({"path": "x"}, ["not for shapes"]),
        ({"skip_broken": True}, ["data.skip_broken", "coco and folder", "shapes"]),
        ({"name": "cifar10", "skip_broken": True}, ["data.skip_broken", "coco and folder", "cifar10"]),
        ({"name": "coco", "limit": -1}, ["data.limit must not be negative, got -1"]),
        ({"name": "coco", "words": 0}, ["data.words must be at least 1, got 0"]),
        ({"name": "coco", "match": ")("}, ["data.match", "')('", "no regular expression"]),
        ({"name": "coco", "match": "("}, ["data.match", "'('", "no regular expression"]),
        ({"name": "coco", "match": "a{99999999999999999999}"}, ["data.match", "no regular expression"]),
        ({"name": "coco", "cache": "a\0b"}, ["data.cache", "NUL"]),
        ({"ahead_first": 0.4}, ["data.ahead_first", "0.5..1"]),
        ({"ahead_first": float("nan")}, ["data.ahead_first"]),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(ValueError) as e:
        DataConfig(**changes)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize("size", [8, 1024])
def test_settings_at_their_limits(size):
    DataConfig("folder", size=size, limit=1, words=1, match="dogs?|cats?", flip=True, skip_broken=True)
    DataConfig(size=16, ahead_first=0.5)


def test_where_the_cache_is(tmp_path, monkeypatch, cache):
    assert cache_folder(DataConfig()) == cache
    assert cache_folder(DataConfig(cache=str(tmp_path / "own"))) == tmp_path / "own"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(DataConfig(cache="~/own")) == tmp_path / "own"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataConfig()) == tmp_path / ".cache" / "minidiff"


def test_shapes_need_no_path(cache):
    assert isinstance(open_data(DataConfig(), 0), Shapes) and not cache.exists()


@pytest.mark.parametrize(
    "name, word", [("cifar10", "minidiff download"), ("coco", "--data FOLDER"), ("folder", "--data")]
)
def test_pictures_need_a_path_that_is_there(tmp_path, name, word):
    with pytest.raises(UserError, match=f"data.path: .*{name}.*{word}"):
        open_data(config(name, ""), 0)
    for path in (tmp_path / "nowhere", "~nobody-of-this-name/pictures"):
        with pytest.raises(UserError, match=r"nowhere|nobody-of-this-name"):
            open_data(config(name, path), 0)


# ---- opening CIFAR-10


def test_cifar10_has_its_pixels_captions_and_classes(tmp_path):
    batches = small_cifar()
    write_python(tmp_path / PYTHON, batches)
    for split, n in (("train", 20), ("test", 4)):
        data = open_pictures(config("cifar10", tmp_path), 0, split=split)
        planes, labels = (
            np.concatenate([batches[s][i] for s in batches if s.startswith("data") == (split == "train")])
            for i in (0, 1)
        )
        assert len(data) == n and data.image_shape == (32, 32, 3)
        assert (data.images.transpose(0, 3, 1, 2).reshape(n, -1) == planes).all()
        assert data.classes == tuple(CLASSES[k] for k in sorted(set(labels.tolist())))
        for i, label in enumerate(labels):
            assert data.classes[data.labels[i]] == CLASSES[label]
            assert all(CLASSES[label] in caption for caption in data.captions[i]) and len(data.captions[i]) > 1
    assert data.prompts == ("an airplane", "an automobile", "a bird", "a cat")
    assert {"photo", "a", "an", "cat"} <= set(data.words) and "dog" not in data.words


def test_every_form_of_cifar10_is_the_same_content(tmp_path):
    contents = set()
    for name in FORMS:
        write_form(tmp_path / name, name, small_cifar())
        contents.add(open_pictures(config("cifar10", tmp_path / name), 0).content)
    assert len(contents) == 1


@pytest.mark.parametrize("match, wanted", [("cat|dog", {"cat", "dog"}), ("CAT", {"cat"}), ("photo", set(CLASSES))])
def test_some_classes_of_cifar10(tmp_path, match, wanted):
    batches = small_cifar()
    write_binary(tmp_path / BINARY, batches)
    labels = np.concatenate([batches[f"data_batch_{i}"][1] for i in range(1, 6)])
    data = open_pictures(config("cifar10", tmp_path, match=match), 0)
    assert set(data.classes) == wanted and data.rows.tolist() == [
        i for i, k in enumerate(labels) if CLASSES[k] in wanted
    ]
    for row, label, texts in zip(data.rows, data.labels, data.captions, strict=True):
        assert data.classes[label] == CLASSES[labels[row]] and data.classes[label] in texts[0]
    assert all(name in prompt for name, prompt in zip(data.classes, data.prompts, strict=True))
    few = open_pictures(config("cifar10", tmp_path, match=match, limit=2), 0)
    assert len(few) == 2 and set(few.rows) <= set(data.rows) and len(few.prompts) == len(few.classes) <= 2
    assert [few.classes[k] for k in few.labels] == [CLASSES[labels[row]] for row in few.rows]


def test_the_content_of_cifar10_holds_which_pictures_are_of_a_class(tmp_path):
    """The same pixels and the same captions, but other pictures are the cats."""
    contents = set()
    for shift in (0, 1):
        batches = {stem: (planes, np.roll(labels, shift)) for stem, (planes, labels) in small_cifar().items()}
        write_binary(tmp_path / str(shift) / BINARY, batches)
        data = open_pictures(config("cifar10", tmp_path / str(shift), match="cat"), 0)
        assert data.captions == open_pictures(config("cifar10", tmp_path / "0", match="cat"), 0).captions
        contents.add(data.content)
    assert len(contents) == 2


def test_no_class_of_cifar10(tmp_path):
    write_binary(tmp_path / BINARY, small_cifar())
    for match in ("zebra", "cats", "plane"):  # whole words
        with pytest.raises(
            UserError, match=rf"data\.match: '{match}' matches none of the classes airplane, automobile"
        ):
            open_pictures(config("cifar10", tmp_path, match=match), 0)


def test_cifar10_is_read_once_until_a_file_changes(tmp_path, monkeypatch, cache):
    write_binary(tmp_path / "data" / BINARY, small_cifar())
    before = open_pictures(config("cifar10", tmp_path / "data"), 0).content
    monkeypatch.chdir(tmp_path / "data" / BINARY)
    for path in (tmp_path / "data", tmp_path / "data" / BINARY, "..", "."):
        assert open_pictures(config("cifar10", path), 0).content == before
    assert len(list(cache.iterdir())) <= 2  # ".." is a way of its own to the same files
    write_binary(tmp_path / "data" / BINARY, {**small_cifar(), "data_batch_5": small_cifar(5)["data_batch_1"]})
    again = open_pictures(config("cifar10", tmp_path / "data"), 0)
    assert again.content != before and len(again) == 21


# ---- opening folders and COCO


def test_a_folder_of_classes(tmp_path):
    write_classes(tmp_path / "data", 3)
    data = open_pictures(config("folder", tmp_path / "data"), 0)
    assert data.classes == data.prompts == ("cat", "red fox") and data.labels.tolist() == [0] * 3 + [1] * 3
    assert data.captions[5] == ("red fox",) and data.words == ("cat", "fox", "red")
    pixels = np.random.default_rng(102).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    assert (data.images[data.rows[5]] == pixels).all()
    one = open_pictures(config("folder", tmp_path / "data", match="FOX", limit=2), 0)
    assert data.summary() == "6 pictures, 2 classes" and one.summary() == "2 of 6 pictures, 1 class"
    assert one.classes == ("red fox",) and one.labels.tolist() == [0, 0] and len(one) == 2


@pytest.mark.parametrize("name, write", [("coco", write_coco), ("folder", write_captions)])
def test_captions_without_classes(tmp_path, name, write):
    write(tmp_path / "data")
    data = open_pictures(config(name, tmp_path / "data"), 0)
    assert data.labels is None and data.classes == () and data.prompts == ("a cat", "a dog", "two dogs", "a bird")
    assert data.words[0] == "a" and set(data.words) == {"a", "cat", "one", "on", "mat", "dog", "two", "dogs", "bird"}
    assert data.captions[0] == ("a cat", "one cat on a mat")
    dogs = open_pictures(config(name, tmp_path / "data", match="dogs?"), 0)
    assert [texts[0] for texts in dogs.captions] == ["a dog", "two dogs"]
    assert data.summary() == "4 pictures, 5 captions, 9 words"
    assert dogs.summary() == "2 of 4 pictures, 2 captions, 4 words"
    assert len(open_pictures(config(name, tmp_path / "data", limit=3), 0)) == 3
    short = open_pictures(config(name, tmp_path / "data", words=2), 0, longest=2)
    assert short.captions[0] == ("a cat", "one cat") and len(short.words) == 2
    with pytest.raises(UserError, match=r"data\.match: no caption of 4 pictures holds 'zebra'"):
        open_pictures(config(name, tmp_path / "data", match="zebra"), 0)


def test_coco_has_two_splits_and_many_prompts_are_few(tmp_path):
    write_coco(tmp_path, {f"{i}.png": [f"number {i}"] for i in range(30)})
    train = open_pictures(config("coco", tmp_path), 0)
    assert len(train) == 30 and len(train.prompts) == 16 == len(set(train.prompts))
    write_coco(tmp_path, CAPTIONS, "val")
    train, val = (open_pictures(config("coco", tmp_path), 0, split=split, longest=2) for split in ("train", "val"))
    assert len(train) == 30 and len(val) == 4
    assert train.prompts == tuple(texts[0] for texts in val.captions)  # unseen, and cut as the model's are
    matched = open_pictures(replace(config("coco", tmp_path), match="number"), 0)
    assert set(matched.prompts) <= {f"number {i}" for i in range(30)}  # no validation caption matches
    next(tmp_path.glob("annotations/captions_val*.json")).write_text("{")
    assert len(open_pictures(config("coco", tmp_path), 0).prompts) == 16


def test_the_content_is_that_of_pixels_captions_and_selection(tmp_path):
    write_captions(tmp_path / "data")
    plain = config("folder", tmp_path / "data")
    before = open_pictures(plain, 0)
    same = [open_pictures(plain, 5), open_pictures(replace(plain, flip=True, cache=str(tmp_path / "other")), 0)]
    others = [open_pictures(replace(plain, **c), 0) for c in ({"limit": 3}, {"match": "dog"}, {"size": 8})]
    others.append(open_pictures(plain, 0, longest=2))
    (tmp_path / "data").rename(tmp_path / "moved")
    same.append(open_pictures(replace(plain, path=str(tmp_path / "moved")), 0))
    moved = replace(plain, path=str(tmp_path / "moved"))
    write_captions(tmp_path / "moved", {**CAPTIONS, "a.png": ["a cat", "one cat on a rug"]})
    others.append(open_pictures(moved, 0))
    write_captions(tmp_path / "moved")
    paint(tmp_path / "moved" / "a.png", 99)
    others.append(open_pictures(moved, 0))
    assert [data.content for data in same] == [before.content] * 3
    contents = [before.content, *(data.content for data in others)]
    assert len(set(contents)) == len(contents) and all(len(content) == 64 for content in contents)


def test_the_same_folder_by_another_way_is_decoded_once(tmp_path, monkeypatch):
    read = []
    plain = pictures.read_image
    monkeypatch.setattr(pictures, "read_image", lambda path, size: read.append(path) or plain(path, size))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_captions(tmp_path / "data")
    contents = {open_pictures(config("folder", path), 0).content for path in (tmp_path / "data", "data", "~/data")}
    assert len(contents) == 1 and len(read) == 4


def test_broken_pictures_stop_or_are_told(tmp_path):
    write_captions(tmp_path / "data")
    (tmp_path / "data" / "b.png").write_bytes(b"no picture")
    (tmp_path / "data" / "d.png").unlink()
    with pytest.raises(UserError, match=r"b\.png is not an image"):
        open_pictures(config("folder", tmp_path / "data"), 0)
    for _ in range(2):
        data = open_pictures(config("folder", tmp_path / "data", skip_broken=True), 0)
        assert data.summary().startswith("2 of 4 pictures, 3 captions, 7 words; 2 are left out, the first: ")
        assert "b.png is not an image" in data.summary()
    assert len(data.left_out) == 2 and [texts[0] for texts in data.captions] == ["a cat", "two dogs"]
    painted = [np.asarray(Image.open(tmp_path / "data" / name)) for name in ("a.png", "c.png")]
    assert (data.images[data.rows] == painted).all()
    _, captions = data.batch(0, 2)
    assert len(data) == 2 and len(captions) == 2 and "bird" not in data.words
    (tmp_path / "data" / "b.png").unlink()
    assert "left out" not in open_pictures(config("folder", tmp_path / "data", match="two dogs"), 0).summary()


def test_captions_that_are_cut_are_counted(tmp_path):
    long = " ".join(f"w{i}" for i in range(30))
    write_captions(tmp_path / "data", {"a.png": ["a cat", long], "b.png": [long]})
    data = open_pictures(config("folder", tmp_path / "data"), 0, longest=22)
    assert "; 2 captions are cut to what the model reads (--text.context)" in data.summary()
    assert len(data.captions[1][0].split()) == 22
    assert "cut" not in open_pictures(config("folder", tmp_path / "data"), 0, longest=30).summary()
    write_binary(tmp_path / BINARY, small_cifar())
    data = open_pictures(config("cifar10", tmp_path), 0, longest=2)
    assert data.captions[0][0].startswith("a") and data.captions[0][1:] == ("a photo", "a picture")
    assert f"; {2 * len(data)} captions are cut to what the model reads" in data.summary()
    with pytest.raises(UserError, match=r"the first 1 words of two classes of .* are the same"):
        classifier.pictures_with_classes(config("cifar10", tmp_path), longest=1)
    with pytest.raises(UserError, match="leaves no room for a word; make it at least 3"):
        open_pictures(config("folder", tmp_path / "data"), 0, longest=0)


@pytest.mark.parametrize("match", ["cafe\u0301", "caf\u00e9", "(?i)CAF\u00c9", "[[c]af."])
def test_a_match_finds_accents_however_they_are_written(tmp_path, match):
    write_captions(tmp_path / "data", {"a.png": ["a cafe\u0301 here"], "b.png": ["a caf\u00e9"], "c.png": ["a cafe"]})
    if match == "[[c]af.":
        assert len(open_pictures(config("folder", tmp_path / "data", match=match), 0)) == 3
    else:
        assert len(open_pictures(config("folder", tmp_path / "data", match=match), 0)) == 2


def test_what_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    write_classes(tmp_path / "data", 2)
    plain = Path.iterdir

    def iterdir(path):
        if path.name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match=r"data/cat cannot be read \(Permission denied\); check its name"):
        open_pictures(config("folder", tmp_path / "data"), 0)


def test_a_validation_set_that_may_not_be_read_stops_no_training(tmp_path, monkeypatch):
    write_coco(tmp_path)
    write_coco(tmp_path, split="val")
    plain = Path.read_bytes

    def read_bytes(path):
        if "captions_val" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    data = open_pictures(config("coco", tmp_path), 0)
    assert len(data) == 4 and set(data.prompts) <= {texts[0] for texts in CAPTIONS.values()}


def test_a_path_that_is_not_utf_8(tmp_path, capsys):
    for flag in ("--data", "--data.cache"):
        place = str(tmp_path / "data") if flag == "--data.cache" else None
        command = ["train", "folder", "--out", tmp_path / "run", *(["--data", place] if place else []), *flags()]
        assert "is not UTF-8; rename it" in fails(capsys, *command, flag, str(tmp_path / "caf\udce9"))
    assert not (tmp_path / "run").exists()


def test_no_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UserError, match=r"no home folder to keep decoded pictures in; name a folder with"):
        cache_folder(DataConfig())


# ---- runs


STEPS = 4


def flags(**changes):
    tiny = {**TINY, "train.batch": 2, "train.steps": STEPS, "train.save_every": 2, "sample.steps": 2, **changes}
    return [f"--{name}={value}" for name, value in tiny.items()]


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """`trained` on a folder with captions of 54 words."""
    parent = tmp_path_factory.mktemp("folder")
    many = [" ".join(f"word{i + k}" for k in range(9)) for i in range(0, 45, 9)]
    write_captions(parent / "data", {**CAPTIONS, "e.png": many})
    return trained(parent, "folder", **{"data.size": SIDE, "train.sample_every": 4})


@pytest.fixture(scope="module")
def cifar_run(tmp_path_factory):
    """`trained` on a small CIFAR-10."""
    parent = tmp_path_factory.mktemp("cifar")
    write_binary(parent / "data" / BINARY, small_cifar(10))
    return trained(parent, "cifar10")


def trained(parent, preset, **changes):
    """`parent` with data/, a finished run, and step2/: the run as it was when it was half way."""
    import minidiff.train as module

    save = module.save_state

    def save_and_copy(state, path):
        save(state, path)
        if state.step == 2:
            shutil.copytree(path.parent, parent / "step2")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save_state", save_and_copy)
        patch.chdir(parent)
        where = {"data.path": "data", "data.cache": str(parent / "cache")}
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert main(["train", preset, "--out", "run", *flags(**where, **changes)]) == 0
    (parent / "said").write_text(said.getvalue())
    return parent


@pytest.fixture(scope="module")
def coco_run(tmp_path_factory):
    """`trained` on COCO captions, some of them of unseen pictures."""
    parent = tmp_path_factory.mktemp("coco")
    (parent / "data").mkdir()
    write_coco(parent / "data")
    write_coco(parent / "data", {"z.png": ["two cats on a mat"]}, split="val")
    return trained(parent, "coco", **{"data.size": SIDE})


@pytest.fixture(params=["folder_run", "cifar_run", "coco_run"])
def any_run(request, tmp_path):
    """A copy of one of them, to change; the pictures that its runs know are those of the original."""
    shutil.copytree(request.getfixturevalue(request.param), tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_is_logged_drawn_and_saved(folder_run, cifar_run, coco_run):
    found = {folder_run: "5 pictures, 10 captions, 54 words", cifar_run: "50 pictures, 10 classes"}
    for parent in (folder_run, cifar_run, coco_run):
        records = read_log(parent / "run")
        assert [r["step"] for r in records] == [1, 2, 3, 4]
        assert all(np.isfinite(r["loss"]) and r["waited"] >= 0 for r in records)
        assert f"data: {found.get(parent, '4 pictures, 5 captions, 9 words')}\n" in (parent / "said").read_text()
        state = load_state(parent / "run" / FILE)
        assert state.step == STEPS and state.config.data.path == str(parent / "data")
        assert load_state(parent / "step2" / FILE).step == 2
    assert [p.name for p in (folder_run / "run" / "samples").iterdir()] == ["step_000004.png"]


def test_a_batch_is_drawn_while_the_step_before_is_taken(folder_run):
    state = load_state(folder_run / "step2" / FILE)
    data = open_data(state.config.data, 0)
    asked = [threading.Event() for _ in range(6)]
    seen = []

    class Watched:
        def batch(self, step, size):
            asked[step].set()
            return data.batch(step, size)

    take = state.optimizer.step

    def step(*args):
        seen.append(asked[state.step + 1].wait(10))  # without prefetching it comes after this step, and never here
        take(*args)

    state.optimizer.step = step
    for _ in train(state, Watched()):
        pass
    assert seen == [True, True]


def test_a_resumed_run_is_bit_identical(any_run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", str(any_run / "step2")]) == 0
    found = capsys.readouterr().err.splitlines()[0]
    assert found.startswith("data: ") and f"{found}\n" in (any_run / "said").read_text()
    assert same_bits(load_state(any_run / "run" / FILE), load_state(any_run / "step2" / FILE))


def test_a_resumed_run_finds_pictures_that_were_moved(any_run, capsys):
    moved = any_run / "elsewhere"
    (any_run / "data").rename(moved)
    command = ["train", "--resume", any_run / "step2"]
    gone = any_run / "gone"
    told = fails(capsys, *command, "--data", gone)
    assert f"no longer in {gone}; say with --data where they are now" in told
    assert str(gone) in fails(capsys, *command, "--data", gone)
    assert main([*map(str, command), "--data", str(moved)]) == 0
    state = load_state(any_run / "step2" / FILE)
    assert same_bits(load_state(any_run / "run" / FILE), state) and state.config.data.path == str(moved)


def test_a_run_does_not_go_on_with_another_caption_or_picture(folder_run, tmp_path, capsys):
    shutil.copytree(folder_run, tmp_path / "copy")
    data, run = tmp_path / "copy" / "data", tmp_path / "copy" / "step2"
    lines = (data / "metadata.jsonl").read_text()
    before = (run / FILE).read_bytes()
    (data / "metadata.jsonl").write_text(lines.replace("a dog", "the dog"))
    command = ["train", "--resume", str(run), "--data", str(data)]
    for _ in range(2):
        capsys.readouterr()
        assert main(command) == 1
        assert f"minidiff: {run}: its data have changed since the run began" in capsys.readouterr().err
        (data / "metadata.jsonl").write_text(lines)
        paint(data / "a.png", 77)
    assert (run / FILE).read_bytes() == before
    paint(data / "a.png", 0)
    assert main(command) == 0


@pytest.mark.parametrize("flag", ["--data.match=cat", "--data.limit=2", "--data.size=32", "--data.flip=false"])
def test_the_choice_of_pictures_cannot_change_in_a_run(folder_run, capsys, flag):
    assert "cannot change in a run that has begun" in fails(capsys, "train", "--resume", folder_run / "step2", flag)


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for preset in ("cifar10", "coco", "folder"):
        command = ["train", preset, "--data", tmp_path / "data", "--out", tmp_path / "run"]
        assert str(tmp_path / "data") in fails(capsys, *command, *flags())
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_run_among_the_pictures_that_it_is_trained_on(tmp_path, capsys, monkeypatch):
    write_classes(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (".", "~/mine", tmp_path / "mine"):
        err = fails(capsys, "train", "folder", f"--data={path}", *flags())
        assert "among its training pictures; name a folder outside (--out)" in err
    assert not (tmp_path / "mine" / "runs").exists()


def test_sample_knows_the_words_of_the_captions(folder_run, tmp_path, capsys):
    out = tmp_path / "grid.png"
    command = ["sample", "--run", folder_run / "run", "--out", out, "--sample.steps=2"]
    err = fails(capsys, *command, "a zebra on word7")
    assert "does not know 'zebra'" in err and "it knows the 54 words of its training captions" in err
    assert "did you mean 'word7'" in fails(capsys, *command, "a wrod7")
    assert not out.exists()
    assert main([*map(str, command), "one cat on a mat"]) == 0
    assert Image.open(out).text["prompt"] == "one cat on a mat"


REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"reads a part of COCO, which is not here ({REAL})")
def test_real_coco_pictures_and_captions(tmp_path):
    content = json.loads((REAL / "annotations" / "captions_train2017.json").read_text())
    data = open_pictures(config("coco", REAL, cache=str(tmp_path)), 0)
    assert len(data) == len(content["images"]) and not data.left_out and len(data.prompts) == 16
    first = min(content["images"], key=lambda image: image["id"])
    texts = {" ".join(a["caption"].split()) for a in content["annotations"] if a["image_id"] == first["id"]}
    assert set(data.captions[0]) == texts and data.images[0].std() > 5


@pytest.fixture
def quick(monkeypatch):
    """A classifier that is trained for one step."""
    monkeypatch.setattr(classifier, "WIDTHS", (12, 12, 12))
    train = classifier.train_classifier
    monkeypatch.setattr(classifier, "train_classifier", lambda data: train(data, epochs=0))


def test_evaluate_asks_the_classifier(cifar_run, quick, capsys, tmp_path):
    shutil.copytree(cifar_run, tmp_path / "copy")
    run, moved = tmp_path / "copy" / "run", tmp_path / "copy" / "data"
    command = ["evaluate", str(run), "--data", str(moved)]
    assert main([*command, "--n=12", "--no-pictures"]) == 0
    out, err = capsys.readouterr()
    last = out.splitlines()[-1]
    assert "data: 50 pictures, 10 classes\n" in err and "of 10 unseen real pictures it names" in last
    assert last.startswith("the classifier names the class that was asked for: ") and "n=12; chance 10.0%" in last
    assert not (run / "evaluation.json").exists()
    assert main([*command, "--n=2"]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert report["n"] == 2 and set(report["scores"]) == {"an airplane", "an automobile", "all"}
    assert {"captions.png", "filmstrip.png", "guidance.png", "loss.png"} <= {p.name for p in run.iterdir()}


def test_a_training_grid_of_very_many_classes_is_small(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(evaluate, "averaged_weights", lambda state: contextlib.nullcontext())
    monkeypatch.setattr(evaluate, "draw", lambda model, captions, c: drawn.append(captions) or np.zeros((40, 8, 8, 3)))
    data = SimpleNamespace(prompts=[f"class {i}" for i in range(1000)])
    state = SimpleNamespace(config=Config(data=DataConfig("folder", "x")), step=1)
    evaluate.draw_training_grid(state, data, tmp_path / "x.png")
    assert drawn == [data.prompts[:40]] and (tmp_path / "x.png").exists()


def test_evaluate_refuses_classes_that_the_model_does_not_know(tmp_path, quick, capsys):
    for folder, names in (("data", ("cat", "red_fox")), ("other", ("cat", "owl")), ("one", ("cat",))):
        write_classes(tmp_path / folder, 10, names)
    where = {"data.path": tmp_path / "data", "data.size": SIDE, "train.steps": 2}
    assert main(["train", "folder", "--out", str(tmp_path / "run"), *flags(**where)]) == 0
    command = ["evaluate", tmp_path / "run", "--n=2", "--sample.steps=2", "--no-pictures"]
    main(list(map(str, [*command, "--data", tmp_path / "other"])))  # decodes, which shows a bar
    assert "does not know 'owl', a class in " in fails(capsys, *command, "--data", tmp_path / "other")
    main(list(map(str, [*command, "--data", tmp_path / "one"])))
    assert "are all of one class, 'cat'" in fails(capsys, *command, "--data", tmp_path / "one")
    assert not list((tmp_path / "cache" / "minidiff").glob("classifier-*"))
    assert main(list(map(str, command))) == 0
    assert "of 2 unseen real pictures" in capsys.readouterr().out


def test_evaluate_after_a_limit(tmp_path, quick, capsys):
    write_classes(tmp_path / "data", 11)
    unseen = min(set(range(22)) - set(pictures.some_of(22, 12)))
    sorted((tmp_path / "data").rglob("*.png"), key=Path.as_posix)[unseen].write_bytes(b"no picture")
    where = {"data.path": tmp_path / "data", "data.size": SIDE, "train.steps": 2, "data.limit": 12}
    assert main(["train", "folder", "--out", str(tmp_path / "run"), *flags(**where)]) == 0
    command = ["evaluate", tmp_path / "run", "--n=2", "--sample.steps=2", "--no-pictures"]
    assert main(list(map(str, command))) == 0
    shutil.rmtree(tmp_path / "run")
    assert main(["train", "folder", "--out", str(tmp_path / "run"), *flags(**{**where, "data.limit": 1})]) == 0
    assert "its --data.limit left that class out" in fails(capsys, *command)


def test_evaluate_needs_classes(folder_run, capsys):
    before = sorted(folder_run.rglob("*"))
    assert "not sorted into classes" in fails(capsys, "evaluate", folder_run / "run", "--n=2")
    assert sorted(folder_run.rglob("*")) == before
