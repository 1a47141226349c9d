"""The scores of `evaluate`, with models that draw what they should, something else, or nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import config

from minidiff import evaluate as module
from minidiff.config import SampleConfig
from minidiff.data import shapes
from minidiff.data.pictures import Pictures, scaled
from minidiff.evaluate import (
    evaluate,
    evaluate_classes,
    fully_right,
    guidance_sweep,
    nearest_pictures,
    summary,
    write_report,
)
from minidiff.train import averaged_weights, new_state


@pytest.fixture
def drawn(monkeypatch):
    """Every call of `draw` that evaluate makes; the pictures are those of what `picture_of` makes of the captions."""
    calls = SimpleNamespace(made=[], pictures={}, picture_of=lambda captions: captions)

    def draw(model, captions, settings, seed=0):
        calls.made.append((list(captions), settings, seed))
        blank = np.zeros((32, 32, 3), np.float32)
        return np.stack([calls.pictures.get(caption, blank) for caption in calls.picture_of(list(captions))])

    monkeypatch.setattr(module, "draw", draw)
    return calls


@pytest.mark.parametrize("split", ["val", "test"])
def test_true_pictures_are_right_and_those_of_other_captions_are_not(drawn, split):
    images, captions = shapes.batch(60, np.random.default_rng(0), split, objects=2)
    drawn.pictures = dict(zip(captions, images, strict=True))
    result = evaluate(None, SampleConfig(), 60, 0, split)
    assert result.scores["all_right"] >= 0.98 and summary(result).endswith("(n=60)")
    drawn.picture_of = lambda captions: captions[1:] + captions[:1]
    wrong = evaluate(None, SampleConfig(), 60, 0, split)
    assert wrong.scores["all_right"] <= 0.05 and wrong.scores["colours"] < 0.5
    assert wrong.captions == result.captions == drawn.made[0][0]


def test_classes_are_counted_as_they_are_named(drawn, monkeypatch):
    """Pictures of one flat colour each, and a classifier that knows the colours."""
    n, colours = 23, np.linspace(-1, 1, 5)
    images = np.broadcast_to(colours[:, None, None, None], (5, 32, 32, 3)).astype(np.float32)
    data = SimpleNamespace(prompts=tuple(f"a {name}" for name in "ebadc"))
    monkeypatch.setattr(module, "classify", lambda judge, images: np.abs(colours - images[:, :1, 0, 0]).argmin(axis=1))
    drawn.pictures = dict(zip(data.prompts, images, strict=True))
    result = evaluate_classes(None, SampleConfig(), None, 0.9, 7, data, n)
    assert result.scores == {**dict.fromkeys(data.prompts, 1.0), "all": 1.0} and set(result.chance.values()) == {0.2}
    assert [result.captions.count(p) for p in data.prompts] == [5, 5, 5, 4, 4]
    assert "100.0% (n=23; chance 20.0%; of 7 unseen real pictures it names 90.0%" in summary(result)
    drawn.pictures[data.prompts[1]] = images[2]  # one class is drawn as the next one
    wrong = evaluate_classes(None, SampleConfig(), None, 0.9, 7, data, n)
    assert wrong.scores == {**result.scores, data.prompts[1]: 0.0, "all": 18 / 23}
    assert wrong.verdicts == [caption != data.prompts[1] for caption in wrong.captions]


def types_of(caption):
    return tuple(shapes.TYPES.index((p.colour, p.shape)) for p in shapes.parse(caption).phrases)


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_captions_are_of_the_split_that_is_asked_for(drawn, split):
    result = evaluate(None, SampleConfig(), 80, 3, split)
    pairs = {tuple(pair) for pair in shapes.PAIRS[split].tolist()}
    assert all(types_of(caption) in pairs for caption in result.captions)


def test_the_seed_chooses_captions_and_noise(drawn):
    a, b, again = (evaluate(None, SampleConfig(), 20, seed) for seed in (0, 1, 0))
    assert a.captions == again.captions != b.captions
    assert [seed for _, _, seed in drawn.made] == [0, 1, 0]


def test_the_sweep_is_at_each_guidance_scale(drawn):
    captions = shapes.held_out_captions(2, 0, "test")
    guidance_sweep(None, captions, SampleConfig(steps=7), fully_right, seed=5)
    assert [settings.guidance for _, settings, _ in drawn.made] == list(module.GUIDANCE_SCALES)
    assert all(settings.steps == 7 and seed == 5 for _, settings, seed in drawn.made)


def test_a_report_of_a_real_model(tmp_path):
    state = new_state(config())
    before = {name: array.copy() for name, array in state.model.state().items()}
    for array in state.optimizer.ema.values():
        array += 0.01
    settings = SampleConfig(steps=3)
    with averaged_weights(state) as model:
        assert all((array == state.optimizer.ema[name]).all() for name, array in model.state().items())
        result = evaluate(model, settings, 5)
        paths = write_report(model, settings, result, tmp_path, {"split": "test"})
    assert all((array == before[name]).all() for name, array in state.model.state().items())
    assert {p.name for p in paths} == {"captions.png", "filmstrip.png", "guidance.png", "evaluation.json"}
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["n"] == 5 and report["scores"] == result.scores


@pytest.mark.parametrize("flip", [False, True])
def test_the_nearest_picture_is_the_nearest_of_all(rng, flip):
    pixels = rng.integers(0, 256, (1500, 4, 6, 3), np.uint8)
    rows = rng.permutation(1500)[:1300]  # more than are compared at once
    data = Pictures(pixels, rows, [("a",)] * 1300, (), (), "", 0, flip)
    images = scaled(pixels[rows[[3, 1290, 700, 5]]])
    images[1] = images[1, :, ::-1]
    images[2] += 0.1
    images[3] = rng.uniform(-1, 1, images[3].shape)
    best, far = nearest_pictures(images, data)
    each = scaled(pixels[rows])
    ways = [each, each[:, :, ::-1]] if flip else [each]
    squares = np.stack([((images[:, None].astype(float) - way) ** 2).mean(axis=(2, 3, 4)) for way in ways]).min(axis=0)
    assert (best == squares.argmin(axis=1)).all()
    np.testing.assert_allclose(far, np.sqrt(squares.min(axis=1)), rtol=1e-5)
    assert far[0] == 0 and far[2] == pytest.approx(0.1, rel=1e-4) and (far[1] == 0) == flip
    second, farther = nearest_pictures(images, data, but=best)
    squares[np.arange(4), best] = np.inf
    assert (second == squares.argmin(axis=1)).all() and (farther > far).all()
