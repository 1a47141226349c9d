"""Drawings of notebook 7, and its step button."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from drawing_06 import panels
from minidiff.diffusion import DenoiseStep, predict_x0
from minidiff.plotting import COLOURS, FAINT, GREY, INK, STYLES, TEXT, Chart, _plain, to_uint8

__all__ = [
    "bells",
    "by_band",
    "normal_density",
    "panels",
    "seven_parts",
    "spread",
    "step_button",
]


def normal_density(xs: np.ndarray, mean: float, variance: float) -> np.ndarray:
    """The normal distribution's density."""
    return np.exp(-((xs - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def bells(curves: Mapping[str, tuple[float, float]], xlabel: str, alt: str) -> Chart:
    """Normal densities {name: (mean, variance)}, a dotted line at each mean; the last is filled."""
    low = min(m - 3.2 * v**0.5 for m, v in curves.values())
    high = max(m + 3.2 * v**0.5 for m, v in curves.values())
    xs = np.linspace(low, high, 500)
    chart = Chart(6.4, 3.0, alt, layout="constrained")
    axes = chart.subplots()
    _plain(axes, "y")
    for i, (name, (mean, variance)) in enumerate(curves.items()):
        ys = normal_density(xs, mean, variance)
        axes.plot(xs, ys, color=COLOURS[i], ls=STYLES[i], lw=1.8, label=name)
        axes.vlines(mean, 0, ys.max(), color=COLOURS[i], lw=0.8, ls=":")
    axes.fill_between(xs, ys, color=FAINT, zorder=0)
    axes.set_ylim(0, None)
    axes.set_xlabel(xlabel, fontsize=TEXT, color=INK)
    axes.set_ylabel("density", fontsize=TEXT, color=INK)
    chart.legend(loc="outside lower center", ncols=3, fontsize=TEXT, frameon=False)
    return chart


def seven_parts(step: DenoiseStep, t: int, t_prev: int, model: Any, caption: str) -> Chart:
    """The parts of a step of one image, numbered, and the image it foresees; large and small numbers are scaled."""
    alt = (
        f"The step from t = {t} to {t_prev} for “{caption}”: noisy image, time, caption, predicted noise, what is "
        "removed, what is added, the result, and the predicted image."
    )
    chart = Chart(7.0, 4.2, alt, layout="constrained")
    cells = [axes for row in chart.subfigures(2, 1) for axes in row.subplots(1, 4)]
    words = ["start", *model.tokenizer.split(caption), "end"]
    assert step.cond is not None and step.t_emb is not None
    x0 = np.clip(predict_x0(step.x_t, t, step.eps, model.schedule), -1, 1)
    _image(cells[0], "1  x_t", model.decode(step.x_t))
    _heat(cells[1], "2  the time as a vector", step.t_emb[0].reshape(8, -1))
    cells[1].set_xlabel(f"t = {t}: {step.t_emb.shape[1]} numbers", fontsize=TEXT - 1, color=INK)
    tokens = step.cond[0][0, : len(words)]
    _heat(cells[2], "3  the caption, a row a word", tokens)
    cells[2].set_yticks(range(len(words)), words, fontsize=TEXT - 1)
    cells[2].set_xlabel(f"{tokens.shape[1]} numbers a word", fontsize=TEXT - 1, color=INK)
    _image(cells[3], "4  predicted noise", model.decode(step.eps))
    _image(cells[4], "5  removed: a part of 4", model.decode(step.removed))
    _image(cells[5], "6  added: fresh noise", model.decode(step.added))
    _image(cells[6], f"7  x at t = {t_prev}", model.decode(step.x_prev))
    _image(cells[7], "the image it foresees", model.decode(x0))
    return chart


def _image(axes: Any, title: str, image: np.ndarray) -> None:
    size = float(np.percentile(np.abs(image), 99))
    factor = 1 / size if size > 1.02 or 0 < size < 0.5 else 1.0
    axes.imshow(to_uint8(image * factor)[0], interpolation="nearest")
    _bare(axes, title)
    if factor != 1:
        shown = f"shown × {factor:.2g}" if factor > 1 else f"shown ÷ {size:.2g}"
        axes.set_xlabel(shown, fontsize=TEXT - 1, color=INK)


def _heat(axes: Any, title: str, numbers: np.ndarray) -> None:
    limit = np.abs(numbers).max()
    axes.imshow(
        numbers, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    _bare(axes, title)


def _bare(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=TEXT, color=INK, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(GREY)
    axes.spines[:].set_linewidth(0.5)
    axes.tick_params(length=0, labelcolor=INK)


def step_button(steps: Iterator[Any], picture: Callable[[Any], Chart]) -> None:
    """A button that takes the next of `steps` and shows its picture, until there are no more."""
    import ipywidgets
    from IPython.display import display

    button, place = ipywidgets.Button(description="one step"), ipywidgets.Output()

    def press(_: Any) -> None:
        step = next(steps, None)
        if step is None:
            button.description, button.disabled = "done", True
            return
        with place:
            place.clear_output(wait=True)
            display(picture(step))

    button.on_click(press)
    display(button, place)
    press(None)


def by_band(images: np.ndarray, bands: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Of each image (B, N, N, C) the strength (B,) of its waves with low..high periods across the picture."""
    N = images.shape[1]
    k = np.fft.fftfreq(N, 1 / N)
    periods = np.rint(np.hypot(*np.meshgrid(k, k)))
    power = np.abs(np.fft.fft2(images, axes=(1, 2))) ** 2
    return {
        name: power[:, (periods >= low) & (periods <= high)].sum(axis=(1, 2))
        for name, (low, high) in bands.items()
    }


def spread(images: Sequence[np.ndarray]) -> float:
    """How much pictures of one thing differ: the root of the mean variance of a pixel."""
    return float(np.sqrt(np.var(np.stack(images), axis=0).mean()))
