"""The yardstick: its loss against a formula, that it learns, and that it never judges by what it has seen."""

from functools import partial

import numpy as np
import pytest
from helpers import assert_close, forward_backward
from PIL import Image
from test_cifar10 import PYTHON, small_cifar, write_python

from minidiff import classifier as module
from minidiff.classifier import Classifier, accuracy, classify, cross_entropy, hold_out, open_classifier
from minidiff.data import DataConfig
from minidiff.data.pictures import Pictures
from minidiff.errors import UserError, UserNotice
from minidiff.gradcheck import gradcheck


def formula(logits, labels):
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(labels)), labels]
    return np.mean(np.log(np.exp(shifted).sum(axis=1)) - chosen)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 3), (7, 10)])
def test_cross_entropy_is_its_formula_and_its_gradient_right(rng, kernels_kind, shape):
    logits, labels = rng.normal(size=shape) * 3, rng.integers(0, shape[1], shape[0])
    gradcheck(lambda x: cross_entropy(x, labels), logits)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    dlogits = (softmax - np.eye(shape[1])[labels]) / shape[0]
    for dtype in ("float64", "float32"):
        exact = logits.astype(dtype)
        loss, (d,) = forward_backward(lambda x: cross_entropy(x, labels), [exact], np.ones((), dtype))
        assert loss.dtype == d.dtype == dtype
        assert_close(loss, formula(exact, labels), scale=1)
        assert_close(d, dlogits, condition=4, scale=1)


def test_cross_entropy_of_large_logits(rng):
    logits = np.array([[1e4, 0, -1e4], [-1e4, 1e4, 0]], np.float32)
    for labels in ([0, 1], [1, 0], [2, 2]):
        loss, (d,) = forward_backward(partial(cross_entropy, labels=np.array(labels)), [logits], np.float32(1))
        assert_close(loss, formula(logits, labels), scale=1)
        assert np.isfinite(d).all()
    assert_close(cross_entropy(module.Tensor(np.full((4, 10), 7.0)), np.arange(4)).data, np.log(10))


# ---- learning


@pytest.fixture
def quick(monkeypatch):
    """A network of few channels, small batches."""
    monkeypatch.setattr(module, "WIDTHS", (12, 24, 24))
    monkeypatch.setattr(module, "BATCH", 16)


def colours(rng, n=80, side=8):
    """Reddish and bluish noise, by turns of two: labels 0, 0, 1, 1, ..."""
    labels = np.arange(n) // 2 % 2
    images = rng.integers(0, 120, (n, side, side, 3))
    images[np.arange(n), :, :, 2 * labels] += 60
    captions = [("red",) if label == 0 else ("blue",) for label in labels]
    return Pictures(
        images.astype(np.uint8), np.arange(n), captions, ("red", "blue"), ("red", "blue"), "0123456789abcdef0123", 0,
        labels=labels, classes=("red", "blue"),
    )  # fmt: skip


def test_it_learns_two_colours_and_its_accuracy_is_the_share_that_is_right(rng, quick):
    data = colours(rng)
    train, test = hold_out(data, 4)
    untrained = Classifier(2)
    assert accuracy(untrained, test) == np.mean(test.labels == 0)  # its head is zero, so it names the first class
    model = module.train_classifier(train, epochs=5)
    assert accuracy(model, test) >= 0.95
    images = test.images[test.rows].astype(np.float32) / 127.5 - 1
    named = classify(model, images)
    assert named.shape == (len(test),) and np.mean(named == test.labels) == accuracy(model, test)
    again = module.train_classifier(train, epochs=5)
    assert all((a == b).all() for a, b in zip(model.state().values(), again.state().values(), strict=True))
    assert all(np.isfinite(a).all() for a in model.state().values())
    large = np.concatenate([images] * 30)  # more than goes through the network at once
    assert len(large) > 512 and (classify(model, large) == np.tile(named, 30)).all()


def test_the_two_parts_are_disjoint_and_complete(rng):
    data = colours(rng, 47)
    shifted = module.dataclasses.replace(data, rows=data.rows[::-1])
    for n, every in ((data, 10), (shifted, 10), (data, 3)):
        train, test = hold_out(n, every)
        assert len(test) == 47 // every and len(train) == 47 - len(test)
        assert sorted([*train.rows, *test.rows]) == list(range(47))
        for part in (train, test):
            assert part.classes == data.classes and len(part.labels) == len(part.captions) == len(part)
            for row, label, texts in zip(part.rows, part.labels, part.captions, strict=True):
                place = int(np.flatnonzero(n.rows == row)[0])
                assert n.labels[place] == label and n.captions[place] == texts


# ---- opening


@pytest.fixture
def trained(monkeypatch, quick):
    """The sets that a classifier was trained on, one optimizer step each."""
    sets = []
    plain = module.train_classifier
    monkeypatch.setattr(module, "train_classifier", lambda data: sets.append(data) or plain(data, epochs=0))
    return sets


def folder_of_classes(path, n=20, names=("cat", "dog")):
    rng = np.random.default_rng(0)
    for name in names:
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path / name / f"{i:02d}.png")
    return path


def settings(tmp_path, name="folder", size=8, **changes):
    return DataConfig(name=name, path=str(tmp_path / "data"), size=size, cache=str(tmp_path / "cache"), **changes)


def test_it_is_trained_once_and_kept(tmp_path, trained):
    folder_of_classes(tmp_path / "data")
    config = settings(tmp_path, limit=5)
    model, right, judged, data = open_classifier(config)
    assert len(data) == 40 and data.prompts == data.classes == ("cat", "dog") and 0 <= right <= 1
    again, same, *_ = open_classifier(config)
    assert len(trained) == 1 and len(trained[0]) == 36 and judged == 4 and same == right
    assert all((a == b).all() for a, b in zip(model.state().values(), again.state().values(), strict=True))
    folder_of_classes(tmp_path / "data", 22)
    open_classifier(config)
    assert len(trained) == 2  # other pictures, another classifier
    assert len(list((tmp_path / "cache").glob("classifier-*.safetensors"))) == 2


def test_one_that_was_trained_in_another_way_is_another(tmp_path, trained, monkeypatch):
    folder_of_classes(tmp_path / "data")
    open_classifier(settings(tmp_path))
    monkeypatch.setattr(module, "EPOCHS", module.EPOCHS + 1)
    open_classifier(settings(tmp_path))
    assert len(trained) == 2


def test_one_that_cannot_be_kept_judges_all_the_same(tmp_path, trained, monkeypatch):
    folder_of_classes(tmp_path / "data")

    def full(*_):
        raise UserError("cannot write x (No space left on device)")

    monkeypatch.setattr(module, "save_checkpoint", full)
    with pytest.warns(UserNotice, match=r"is not kept, and trained anew the next time: cannot write x"):
        _, right, judged, _ = open_classifier(settings(tmp_path))
    assert judged == 4 and 0 <= right <= 1


def test_that_of_cifar10_is_judged_by_the_test_batch(tmp_path, trained, monkeypatch):
    write_python(tmp_path / "data" / PYTHON, small_cifar(10))
    judged = []
    plain = module.accuracy
    monkeypatch.setattr(module, "accuracy", lambda model, data: judged.append(data) or plain(model, data))
    _, _, count, data = open_classifier(settings(tmp_path, "cifar10", 32, limit=3))
    assert count == 10 and len(data) == len(trained[0]) == 50 and len(judged[0]) == 10 and len(data.prompts) == 10
    planes = small_cifar(10)["test_batch"][0]
    assert (judged[0].images.transpose(0, 3, 1, 2).reshape(10, -1) == planes).all()


@pytest.mark.parametrize("change", ["truncated", "other classes", "no accuracy", "no checkpoint"])
def test_a_kept_classifier_that_does_not_fit_is_named(tmp_path, trained, change):
    from minidiff.checkpoint import save_checkpoint

    folder_of_classes(tmp_path / "data")
    model, *_ = open_classifier(settings(tmp_path))
    (file,) = (tmp_path / "cache").glob("classifier-*.safetensors")
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif change == "other classes":
        save_checkpoint(file, {"model": Classifier(3).state()}, {"accuracy": 1.0})
    elif change == "no accuracy":
        save_checkpoint(file, {"model": model.state()}, {})
    else:
        file.write_bytes(b"no checkpoint")
    before = file.read_bytes()
    with pytest.raises(UserError, match=f"{file} is damaged or of other pictures; remove it"):
        open_classifier(settings(tmp_path))
    assert file.read_bytes() == before and len(trained) == 1


def test_pictures_that_no_classifier_can_be_made_of(tmp_path, trained):
    folder_of_classes(tmp_path / "data", names=("cat",))
    with pytest.raises(UserError, match="are all of one class, 'cat'; a classifier needs two"):
        open_classifier(settings(tmp_path))
    folder_of_classes(tmp_path / "few" / "data", n=4)
    with pytest.raises(UserError, match="has too few pictures"):
        open_classifier(settings(tmp_path / "few"))
    folder_of_classes(tmp_path / "one" / "data", names=("cat",))
    folder_of_classes(tmp_path / "one" / "data", n=5, names=("dog",))  # none of which is kept for judging
    with pytest.raises(UserError, match="has too few pictures: some of each class"):
        open_classifier(settings(tmp_path / "one"))
    folder_of_classes(tmp_path / "data", names=("dog",))
    for file in (tmp_path / "data").rglob("*.png"):
        file.with_suffix(".txt").write_text("a caption")
    with pytest.raises(UserError, match="not sorted into classes"):
        open_classifier(settings(tmp_path))
    assert not trained


def test_a_split_of_cifar10_that_lacks_classes_is_no_judge(tmp_path, trained):
    write_python(tmp_path / "data" / PYTHON, small_cifar(4))
    with pytest.raises(UserError, match="too few pictures"):
        open_classifier(settings(tmp_path, "cifar10", 32))
    assert not trained
