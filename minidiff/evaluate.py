"""Scoring a model: draw what was asked for, have it judged by something that does not see the caption, compare.

Pictures of `shapes` are read exactly; those of real classes are named by a small classifier of real pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minidiff import plotting
from minidiff.backend import to_numpy
from minidiff.classifier import Classifier, classify
from minidiff.config import SampleConfig
from minidiff.data import Dataset, shapes
from minidiff.data.pictures import Pictures, scaled
from minidiff.sample import denoise, draw
from minidiff.text_to_image import TextToImage
from minidiff.train import LOG, TrainState, averaged_weights, read_log

GUIDANCE_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)
GRID = 24  # captions in the grid of an evaluation
MOST = 40  # captions in a grid of training: pictures may be of hundreds of classes


Judge = Callable[[np.ndarray, Sequence[str]], list[bool]]
"""Images (n, H, W, 3) and their n captions -> which of them are right."""


@dataclass(frozen=True)
class Evaluation:
    """Pictures of captions, and how many of them show what was asked; no picking among samples."""

    captions: list[str]
    images: np.ndarray  # (n, H, W, 3)
    verdicts: list[bool]  # fully right, by picture
    scores: dict[str, float]  # fractions of n, by attribute or by class
    chance: dict[str, float]  # what pictures of other captions score
    judge: Judge
    title: str  # of the grid of pictures
    headline: str  # the result in a line


def evaluate(
    model: TextToImage, settings: SampleConfig, n: int = 500, seed: int = 0, split: str = "test"
) -> Evaluation:
    """Draw n two-object captions of `shapes` whose pairs of objects were never trained on, and score them.

    split: "test", or "val" for choosing settings.
    """
    captions = shapes.held_out_captions(n, seed, split)
    images = draw(model, captions, settings, seed)
    verdicts = shapes.judge(images, captions)
    right = [v.all_right for v in verdicts]
    scores = shapes.score(verdicts)
    headline = f"held-out captions fully right: {scores['all_right']:.1%} (n={n})"
    title = f"Held-out captions, the first {min(GRID, n)} of {n}"
    return Evaluation(captions, images, right, scores, shapes.chance(n, seed, split), fully_right, title, headline)


def fully_right(images: np.ndarray, captions: Sequence[str]) -> list[bool]:
    """Whether pictures of `shapes` show all that their captions say."""
    return [v.all_right for v in shapes.judge(images, captions)]


def evaluate_classes(
    model: TextToImage, settings: SampleConfig, classifier: Classifier, accuracy: float, judged: int,
    data: Pictures, n: int = 500, seed: int = 0,
) -> Evaluation:  # fmt: skip
    """Draw each class of a labelled set about equally often, n pictures in all, and have the classifier name them.

    accuracy: the classifier's on `judged` real pictures that it did not see.
    """
    prompts = list(data.prompts)
    captions = [prompts[i % len(prompts)] for i in range(n)]

    def judge(images: np.ndarray, captions: Sequence[str]) -> list[bool]:
        return [prompts[k] == caption for k, caption in zip(classify(classifier, images), captions, strict=True)]

    images = draw(model, captions, settings, seed)
    right = judge(images, captions)
    scores = {p: float(np.mean([r for r, c in zip(right, captions, strict=True) if c == p])) for p in prompts[:n]}
    share, chance = float(np.mean(right)), 1 / len(prompts)
    headline = (
        f"the classifier names the class that was asked for: {share:.1%} "
        f"(n={n}; chance {chance:.1%}; of {judged} unseen real pictures it names {accuracy:.1%} rightly)"
    )
    title = f"The first {min(GRID, n)} of {n} pictures"
    chances = dict.fromkeys([*scores, "all"], chance)
    return Evaluation(captions, images, right, {**scores, "all": share}, chances, judge, title, headline)


def nearest_pictures(
    images: np.ndarray, data: Pictures, but: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The set's picture (n,) nearest to each image (n, H, W, 3), and how far it is: root mean square, in -1..1.

    Where training mirrors its pictures, they count as mirrored too. but: a picture (n,) that is not compared with each
    image, such as itself. A sample much nearer to a picture than the set's pictures are to each other is a copy.
    """
    flat = images.reshape(len(images), -1)
    best, least = np.zeros(len(images), int), np.full(len(images), np.inf)
    for start in range(0, len(data), 1024):
        pixels = scaled(data.images[data.rows[start : start + 1024]])
        for shown in (pixels, pixels[:, :, ::-1]) if data.flip else (pixels,):
            other = shown.reshape(len(shown), -1)
            squares = (other**2).sum(axis=1) - 2 * flat @ other.T  # |a - b|^2 without |a|^2, which all have
            if but is not None:
                here = (but >= start) & (but < start + len(other))
                squares[here, but[here] - start] = np.inf
            found = squares.argmin(axis=1)
            nearer = squares[np.arange(len(flat)), found] < least
            best[nearer], least[nearer] = start + found[nearer], squares[nearer, found[nearer]]
    twins = scaled(data.images[data.rows[best]])
    far = ((images - twins) ** 2).mean(axis=(1, 2, 3))
    if data.flip:
        far = np.minimum(far, ((images - twins[:, :, ::-1]) ** 2).mean(axis=(1, 2, 3)))
    return best, np.sqrt(far)


def summary(e: Evaluation) -> str:
    """The scores as a small table; its last line is the result."""
    width = max(12, *(len(name) for name in e.scores))
    rows = [f"{'':>{width}}  right   chance"]
    rows += [f"{name.replace('_', ' '):>{width}}  {e.scores[name]:6.1%}  {e.chance[name]:6.1%}" for name in e.scores]
    return "\n".join([*rows, e.headline])


def write_report(
    model: TextToImage, settings: SampleConfig, e: Evaluation, folder: Path, about: dict[str, Any], seed: int = 0
) -> list[Path]:
    """Write evaluation.json and the pictures of a run into its folder; returns the files."""
    figures: dict[str, Callable[[], Any]] = {
        "captions.png": lambda: plotting.image_grid(
            e.images[:GRID], e.captions[:GRID], columns=6, verdicts=e.verdicts[:GRID],
            title=e.title,
        ),
        "filmstrip.png": lambda: filmstrip(model, e.captions[0], settings, seed),
        "guidance.png": lambda: guidance_sweep(model, e.captions[:4], settings, e.judge, seed),
    }  # fmt: skip
    if (folder / LOG).exists():
        figures["loss.png"] = lambda: plotting.loss_curve({"training loss": read_log(folder)}, x="minutes")
    paths = [plotting.save(make(), folder / name) for name, make in figures.items()]
    report = {"n": len(e.captions), "scores": e.scores, "chance": e.chance, **about}
    path = folder / "evaluation.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    return [*paths, path]


def filmstrip(model: TextToImage, caption: str, settings: SampleConfig, seed: int = 0, frames: int = 9) -> Any:
    """A figure of one caption's way from x_T to x_0, with the predicted x0 under each x_t."""
    steps = list(denoise(model, [caption], settings, seed))
    shown = [steps[i] for i in np.unique(np.round(np.linspace(0, len(steps) - 1, frames - 1)).astype(int))]
    last = steps[-1]
    result = to_numpy(model.decode(last.x_prev)[0])
    x_ts = [to_numpy(model.decode(s.x_t)[0]) for s in shown] + [result]
    x0s = [to_numpy(model.decode(s.x0)[0]) for s in shown] + [result]
    return plotting.filmstrip(x_ts, x0s, [*(s.t for s in shown), last.t_prev], caption)


def guidance_sweep(model: TextToImage, captions: list[str], settings: SampleConfig, judge: Judge, seed: int = 0) -> Any:
    """A figure of the captions, from the same starting noise, at rising guidance scales."""
    images = np.stack([draw(model, captions, replace(settings, guidance=w), seed) for w in GUIDANCE_SCALES], axis=1)
    verdicts = [judge(row, [caption] * len(row)) for row, caption in zip(images, captions, strict=True)]
    return plotting.guidance_sweep(images, captions, GUIDANCE_SCALES, verdicts)


def draw_training_grid(state: TrainState, data: Dataset, path: Path) -> None:
    """The averaged model's pictures of the data's prompts; of `shapes`, with the checker's verdicts."""
    prompts = list(data.prompts)[:MOST]
    n = len(prompts)
    captions = prompts * max(1, 20 // n)
    with averaged_weights(state) as model:
        images = draw(model, captions, replace(state.config.sample, steps=min(25, state.config.sample.steps)))
    right = fully_right(images, captions) if state.config.data.name == "shapes" else None
    plotting.save(
        plotting.image_grid(images, captions, n if 5 <= n <= 10 else 4, right, title=f"Step {state.step}"), path
    )
