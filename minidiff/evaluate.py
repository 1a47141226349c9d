"""Scoring a model on `shapes`: draw held-out captions, read the pictures without seeing the captions, compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minidiff import plotting
from minidiff.backend import to_numpy
from minidiff.config import SampleConfig
from minidiff.data import shapes
from minidiff.sample import denoise, draw
from minidiff.text_to_image import TextToImage
from minidiff.train import LOG, TrainState, averaged_weights, read_log

GUIDANCE_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)
GRID = 24  # captions in the grid of an evaluation


@dataclass(frozen=True)
class Evaluation:
    """Pictures of held-out captions, and how many of them show what was asked; no picking among samples."""

    captions: list[str]
    images: np.ndarray  # (n, H, W, 3)
    verdicts: list[bool]  # fully right, by picture
    scores: dict[str, float]  # fractions of n, by attribute
    chance: dict[str, float]  # what pictures of other captions score


def evaluate(
    model: TextToImage, settings: SampleConfig, n: int = 500, seed: int = 0, split: str = "test"
) -> Evaluation:
    """Draw n two-object captions whose pairs of objects were never trained on, and score them.

    split: "test", or "val" for choosing settings.
    """
    captions = shapes.held_out_captions(n, seed, split)
    images = draw(model, captions, settings, seed)
    verdicts = shapes.judge(images, captions)
    right = [v.all_right for v in verdicts]
    return Evaluation(captions, images, right, shapes.score(verdicts), shapes.chance(n, seed, split))


def summary(e: Evaluation) -> str:
    """The scores as a small table; its last line is the share of captions that are fully right."""
    rows = [f"{'':>12}  right   chance"]
    rows += [f"{name.replace('_', ' '):>12}  {e.scores[name]:6.1%}  {e.chance[name]:6.1%}" for name in shapes.SCORES]
    rows.append(f"held-out captions fully right: {e.scores['all_right']:.1%} (n={len(e.captions)})")
    return "\n".join(rows)


def write_report(
    model: TextToImage, settings: SampleConfig, e: Evaluation, folder: Path, about: dict[str, Any], seed: int = 0
) -> list[Path]:
    """Write evaluation.json and the pictures of a run into its folder; returns the files."""
    figures: dict[str, Callable[[], Any]] = {
        "captions.png": lambda: plotting.image_grid(
            e.images[:GRID], e.captions[:GRID], columns=6, verdicts=e.verdicts[:GRID],
            title=f"Held-out captions, the first {min(GRID, len(e.captions))} of {len(e.captions)}",
        ),
        "filmstrip.png": lambda: filmstrip(model, e.captions[0], settings, seed),
        "guidance.png": lambda: guidance_sweep(model, e.captions[:4], settings, seed),
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


def guidance_sweep(model: TextToImage, captions: list[str], settings: SampleConfig, seed: int = 0) -> Any:
    """A figure of the captions, from the same starting noise, at rising guidance scales."""
    images = np.stack([draw(model, captions, replace(settings, guidance=w), seed) for w in GUIDANCE_SCALES], axis=1)
    verdicts = [
        [v.all_right for v in shapes.judge(row, [caption] * len(row))]
        for row, caption in zip(images, captions, strict=True)
    ]
    return plotting.guidance_sweep(images, captions, GUIDANCE_SCALES, verdicts)


def draw_training_grid(state: TrainState, path: Path) -> None:
    """The averaged model's pictures of a few validation captions, during training."""
    captions = shapes.held_out_captions(16, 0, "val")
    with averaged_weights(state) as model:
        images = draw(model, captions, replace(state.config.sample, steps=min(25, state.config.sample.steps)))
    right = [v.all_right for v in shapes.judge(images, captions)]
    plotting.save(plotting.image_grid(images, captions, 4, right, title=f"Step {state.step}"), path)
