"""Drawings and measurements for notebook 4."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from minidiff import plotting
from minidiff.plotting import COLOURS, GREY, INK, TEXT, TITLE, Chart

SHADE = LinearSegmentedColormap.from_list("shade", ["#ffffff", COLOURS[0]])
TINTS = ("#ffffff", "#cfe3f1", "#f6d9c4", "#c9e8dc", "#f0dbe6", "#e3e3e3", "#fbe6bf", "#d9effa")


def shared_statistics(
    images: int = 2, positions: int = 4, channels: int = 6, groups: int = 2
) -> Chart:
    """Which numbers share one mean and one deviation in BatchNorm, LayerNorm and GroupNorm."""
    b, n, c = np.meshgrid(
        np.arange(images), np.arange(positions), np.arange(channels), indexing="ij"
    )
    kinds = {
        "BatchNorm": c,
        "LayerNorm (over channels)": b * positions + n,
        f"GroupNorm, {groups} groups": b * groups + c // (channels // groups),
    }
    chart = Chart(
        8.2,
        1.66,
        "Two images of four positions by six channels, three times. Numbers in the cells tell which cells share a mean: in "
        "BatchNorm each channel of both images, in LayerNorm each position, in GroupNorm half the channels of one image.",
    )
    axes = chart.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_axis_off()
    apart = images * (channels + 0.7) + 1.2
    for i, (name, sets) in enumerate(kinds.items()):
        left = i * apart
        axes.text(left, 1.75, name, fontsize=TITLE - 1, color=INK)
        axes.text(left, -positions - 1.75, f"{sets.max() + 1} means", fontsize=TEXT, color=INK)
        for image in range(images):
            x0 = left + image * (channels + 0.7)
            axes.text(x0, 0.55, f"image {image + 1}", fontsize=TEXT, color=INK)
            for row in range(positions):
                for column in range(channels):
                    number = int(sets[image, row, column])
                    cell = Rectangle(
                        (x0 + column, -row - 1),
                        1,
                        1,
                        fc=TINTS[number % len(TINTS)],
                        ec=GREY,
                        lw=0.5,
                    )
                    axes.add_patch(cell)
                    axes.text(
                        x0 + column + 0.5,
                        -row - 0.53,
                        str(number + 1),
                        ha="center",
                        va="center",
                        fontsize=8,
                        color=INK,
                    )
    axes.text(
        -0.5,
        -positions / 2,
        "positions",
        rotation=90,
        ha="center",
        va="center",
        fontsize=TEXT,
        color=INK,
    )
    axes.text(
        channels / 2,
        -positions - 0.42,
        "channels",
        ha="center",
        va="center",
        fontsize=TEXT,
        color=INK,
    )
    axes.set_xlim(-0.9, 3 * apart - 1.2)
    axes.set_ylim(-positions - 2.1, 2.7)
    axes.set_aspect("equal")
    return chart


def equation(items: Sequence[Any], alt_text: str, number: str = "{:.2f}") -> Chart:
    """Matrices with their numbers: items are (name, array, row labels, column labels), or a sign between two."""
    cell, high, gap = 0.56, 0.3, 0.1
    widths = [
        0.24 + 0.1 * len(i)
        if isinstance(i, str)
        else i[1].shape[1] * cell + (0.62 if i[2] else 0) + gap
        for i in items
    ]
    tall = max(i[1].shape[0] for i in items if not isinstance(i, str)) * high
    width, height = min(8.4, sum(widths) + 0.1), tall + 0.72
    chart = Chart(width, height, alt_text)
    axes = chart.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(-0.12, height - 0.12)
    x = 0.05
    for item, taken in zip(items, widths, strict=True):
        if isinstance(item, str):
            axes.text(
                x + taken / 2,
                tall / 2,
                item,
                ha="center",
                va="center",
                fontsize=TITLE + 1,
                color=INK,
            )
            x += taken
            continue
        name, array, rows, columns = item
        left = x + (0.62 if rows else 0)
        (R, C), low = array.shape, (tall - array.shape[0] * high) / 2
        strongest = max(np.abs(array[np.isfinite(array)]).max(initial=0), 1e-9)
        for r in range(R):
            y = low + (R - 1 - r) * high
            if rows:
                axes.text(
                    left - 0.07,
                    y + high / 2,
                    rows[r],
                    ha="right",
                    va="center",
                    fontsize=8,
                    color=INK,
                )
            for c in range(C):
                value = array[r, c]
                share = 0.0 if not np.isfinite(value) else abs(value) / strongest
                place = (left + c * cell, y)
                axes.add_patch(
                    Rectangle(place, cell, high, fc=SHADE(0.55 * share), ec=GREY, lw=0.5)
                )
                text = number.format(value) if np.isfinite(value) else "−∞"
                axes.text(
                    place[0] + cell / 2,
                    y + high / 2 - 0.01,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color=INK,
                )
        top = low + R * high
        if columns:
            for c in range(C):
                axes.text(
                    left + (c + 0.5) * cell,
                    top + 0.09,
                    columns[c],
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=INK,
                )
        axes.text(
            left + C * cell / 2,
            top + (0.3 if columns else 0.14),
            name,
            ha="center",
            va="center",
            fontsize=TEXT + 1,
            color=INK,
        )
        x += taken
    return chart


def memory_plot(lengths: Sequence[int], memory: Mapping[str, Sequence[float]]) -> Chart:
    """Memory in MiB against the number of tokens, both axes logarithmic."""
    chart = plotting.line_plot(
        {name: (lengths, mib) for name, mib in memory.items()},
        "tokens L (as many queries as keys)",
        "memory at its peak (MiB)",
        marker="o",
        log="xy",
    )
    axes = chart.axes[0]
    axes.set_xticks(lengths, [str(L) for L in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    return chart


def medians(
    calls: Mapping[str, Callable[..., Any]], *inputs: Any, repeats: int = 7
) -> dict[str, float]:
    """Median seconds of each call on the same inputs, taken in turns after one warm-up each."""
    for call in calls.values():
        call(*inputs)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            since = time.perf_counter()
            call(*inputs)
            times[name].append(time.perf_counter() - since)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def peak_bytes(call: Callable[..., Any], *inputs: Any) -> int:
    """The most bytes that NumPy arrays made during the call took together."""
    tracemalloc.start()
    try:
        call(*inputs)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
