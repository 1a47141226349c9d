"""Drawings for notebook 5, and the trace of a U-Net that they are made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.patches import FancyBboxPatch

from minidiff import plotting
from minidiff.models.unet import (
    CrossAttentionBlock,
    Downsample,
    ResBlock,
    SelfAttentionBlock,
    UNet,
    Upsample,
)
from minidiff.nn import Conv2d, Module
from minidiff.plotting import COLOURS, GREY, INK, TEXT, Chart
from minidiff.tensor import Tensor

KINDS = {
    Conv2d: "conv",
    ResBlock: "res",
    SelfAttentionBlock: "attn",
    CrossAttentionBlock: "attn",
    Downsample: "down",
    Upsample: "up",
}
FILL = {
    "conv": "#eeeeee",
    "res": "#cfe3f1",
    "attn": "#f6d9c4",
    "down": "#c9e8dc",
    "up": "#c9e8dc",
}


@dataclass
class Call:
    """One block of a U-Net as it was called in a run."""

    path: str  # such as down_blocks.0.resnets.0
    kind: str
    features: np.ndarray  # the result, (B, H, W, C)
    wide: int  # channels that went in, those of a skip included
    time: bool  # whether it was given the timestep
    text: bool  # whether it was given the words
    skip_from: int | None  # the number of the call whose result came in as a skip


def trace(unet: UNet, x_t: Any, t: Any, cond: Any = None) -> list[Call]:
    """Run the U-Net once and note every block that is called, in order: shapes and links are those of the run."""
    paths = dict(_walk(unet, ""))
    calls: list[Call] = []
    made_by: dict[int, int] = {}
    kept = []  # results stay alive, so that no two have the same id
    plain = Module.__call__

    def noted(module: Module, *args: Any, **kwargs: Any) -> Any:
        y = plain(module, *args, **kwargs)
        path = paths.get(id(module), "")
        outermost = not isinstance(module, Conv2d) or path in ("conv_in", "conv_out")
        if type(module) in KINDS and outermost:
            block = isinstance(module, ResBlock)
            skip = args[2] if block and len(args) > 2 else None
            wide = args[0].shape[-1] + (skip.shape[-1] if skip is not None else 0)
            text = isinstance(module, CrossAttentionBlock) and args[1] is not None
            calls.append(
                Call(
                    path,
                    KINDS[type(module)],
                    y.data,
                    wide,
                    block,
                    text,
                    None if skip is None else made_by[id(skip)],
                )
            )
            made_by[id(y)] = len(calls) - 1
            kept.append(y)
        return y

    Module.__call__ = noted  # type: ignore[method-assign]
    try:
        unet(x_t, t, cond)
    finally:
        Module.__call__ = plain  # type: ignore[method-assign]
    return calls


def _walk(value: Any, path: str) -> Iterator[tuple[int, str]]:
    if isinstance(value, Module):
        yield id(value), path
        for name, part in vars(value).items():
            yield from _walk(part, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _walk(part, f"{path}.{i}")


def u_shape(calls: Sequence[Call]) -> Chart:
    """The traced U-Net as a U: a row for each size of the features, blocks from left to right in the order of the run."""
    sizes = list(dict.fromkeys(call.features.shape[1:3] for call in calls))
    bottom = len(sizes)  # the middle block gets a row of its own below the smallest
    rows, columns, column = [], [], 0
    for i, call in enumerate(calls):
        rows.append(
            bottom if call.path.startswith("mid") else sizes.index(call.features.shape[1:3])
        )
        if i and rows[-1] == rows[-2]:
            column += 1
        columns.append(column)
    pitch, left, high, apart = 0.515, 0.62, 0.42, 1.02
    width, height = left + pitch * (column + 1) + 0.05, apart * (bottom + 1) + 0.2
    told = "; ".join(f"{H} x {W}: " + _told(calls, (H, W)) for H, W in sizes)
    chart = Chart(
        width,
        height,
        f"The blocks of a U-Net, drawn as a U, with skips from the way down to the way up. {told}.",
    )
    axes = chart.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(-height, 0)

    def middle(i: int) -> tuple[float, float]:
        return left + pitch * (columns[i] + 0.5), -apart * rows[i] - 0.68

    for row in range(bottom + 1):
        H, W = sizes[min(row, bottom - 1)]
        axes.text(
            0.05, -apart * row - 0.68, f"{H} × {W}", va="center", fontsize=TEXT, color=INK
        )
    skips = [(call.skip_from, i) for i, call in enumerate(calls) if call.skip_from is not None]
    for start, end in skips:
        inner = sum(rows[s] == rows[start] and start < s for s, _ in skips)
        (x0, y0), (x1, _) = middle(start), middle(end)
        top = y0 + high / 2 + 0.1 + 0.11 * inner
        x0, x1 = x0 - 0.1, x1 - 0.1  # beside the arrows of the features
        axes.plot(
            [x0, x0, x1], [y0 + high / 2, top, top], color=COLOURS[1], lw=1.3, ls=(0, (4, 1.5))
        )
        _arrow(axes, (x1, top), (x1, y0 + high / 2), COLOURS[1])
    for i, call in enumerate(calls):
        x, y = middle(i)
        if i:
            px, py = middle(i - 1)
            if py == y:
                _arrow(axes, (px + pitch / 2 - 0.045, y), (x - pitch / 2 + 0.045, y), INK)
            else:
                down = -1 if y < py else 1
                _arrow(axes, (x, py + down * high / 2), (x, y - down * high / 2), INK)
        box = FancyBboxPatch(
            (x - pitch / 2 + 0.045, y - high / 2),
            pitch - 0.09,
            high,
            boxstyle="round,pad=0,rounding_size=0.04",
            fc=FILL[call.kind],
            ec=GREY,
            lw=0.8,
        )
        axes.add_patch(box)
        axes.text(x, y + 0.085, call.kind, ha="center", va="center", fontsize=8, color=INK)
        axes.text(
            x,
            y - 0.1,
            str(call.features.shape[-1]),
            ha="center",
            va="center",
            fontsize=TEXT,
            color=INK,
            weight="bold",
        )
        if call.time or call.text:
            below, told = y - high / 2 - 0.12, "text" if call.text else "t"
            axes.text(
                x + 0.05, below, told, ha="left", va="center", fontsize=8, color=COLOURS[0]
            )
    return chart


def _told(calls: Sequence[Call], size: tuple[int, int]) -> str:
    return ", ".join(
        f"{c.kind} {c.features.shape[-1]}" for c in calls if c.features.shape[1:3] == size
    )


def _arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str
) -> None:
    style = {
        "arrowstyle": "-|>",
        "lw": 1.1,
        "color": colour,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 7,
    }
    axes.annotate("", end, start, arrowprops=style)


def heat_map(values: np.ndarray, xlabel: str, ylabel: str, alt_text: str) -> Chart:
    """Numbers in [-1, 1], (rows, columns), as colours: purple below 0, white 0, orange above."""
    chart = Chart(7.2, 2.6, alt_text, layout="constrained")
    axes = chart.subplots()
    image = axes.imshow(
        values, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=TEXT)
    axes.set_xlabel(xlabel, fontsize=TEXT + 1, color=INK)
    axes.set_ylabel(ylabel, fontsize=TEXT + 1, color=INK)
    bar = chart.colorbar(image, ax=axes, ticks=[-1, 0, 1], label="value")
    bar.ax.tick_params(labelsize=TEXT)
    bar.outline.set_visible(False)
    return chart


def feature_maps(pictures: Sequence[np.ndarray], names: Sequence[str], columns: int) -> Chart:
    """Grey maps (H, W) of different sizes, each stretched to its own range and to the size of the largest."""
    side = max(len(p) for p in pictures)
    shown = []
    for p in pictures:
        low, high = p.min(), p.max()
        grey = 2 * (p - low) / (high - low) - 1 if high > low else 0 * p
        factor = side // len(p)
        shown.append(
            grey.repeat(factor, axis=0).repeat(factor, axis=1)[..., None].astype(float)
        )
    return plotting.image_grid(np.stack(shown), names, columns=columns)


class WithoutSkips(Module):
    """An up block of a U-Net whose skips are replaced by zeros; everything else is as it was."""

    def __init__(self, block: Module):
        self.block = block

    def forward(self, x: Tensor, skips: list[Tensor], *rest: Any) -> Tensor:
        """The block's result, with zeros in place of its skips."""
        own = [skips.pop() for _ in self.block.resnets][::-1]
        return self.block(x, [Tensor(np.zeros_like(skip.data)) for skip in own], *rest)
