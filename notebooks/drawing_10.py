"""Drawings for notebook 10, and the table of what GPUs measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from emulator_10 import Traffic
from minidiff import plotting
from minidiff.plotting import COLOURS, FAINT, GREY, INK, TEXT, TITLE, Chart

TINT = "#cfe3f1"
WARM = "#f6d9c4"


def hierarchy() -> Chart:
    """What a launch is made of, and which memory belongs to which part of it."""
    alt = (
        "On the left a grid of twelve blocks, in the middle one block of eight warps beside "
        "its shared memory of 32 banks, on the right one warp of 32 threads. Below all of "
        "them global memory, in sectors of 32 bytes."
    )
    chart, axes = _empty(8.3, 3.55, alt)
    _text(axes, 0.1, 3.38, "a grid: all blocks of a launch", TITLE - 1)
    for i in range(12):
        x, y = 0.1 + i % 4 * 0.56, 2.62 - i // 4 * 0.5
        _box(axes, x, y, 0.5, 0.44, WARM if i == 7 else "white")
        _text(axes, x + 0.25, y + 0.22, f"block {i}", 8, "center")
    _text(axes, 2.75, 3.38, "a block: on one multiprocessor", TITLE - 1)
    _box(axes, 2.75, 1.62, 2.45, 1.44, WARM)
    for i in range(8):
        x, y = 2.85 + i % 4 * 0.57, 2.7 - i // 4 * 0.36
        _box(axes, x, y, 0.53, 0.29, TINT if i == 3 else "white")
        _text(axes, x + 0.265, y + 0.145, f"warp {i}", 8, "center")
    for i in range(32):
        _box(axes, 2.85 + i * 0.07, 1.93, 0.07, 0.24, "white")
    _text(axes, 2.85, 1.78, "shared memory: 32 banks", TEXT)
    _text(axes, 5.55, 3.38, "a warp: 32 threads, in step", TITLE - 1)
    _box(axes, 5.55, 1.62, 2.6, 1.44, TINT)
    for i in range(32):
        x, y = 5.65 + i % 8 * 0.302, 2.74 - i // 8 * 0.22
        _box(axes, x, y, 0.28, 0.19, "white")
        _text(axes, x + 0.14, y + 0.095, str(i), 8, "center")
    _text(axes, 5.65, 1.78, "each thread: its registers", TEXT)
    for (x0, y0), (x1, y1) in [
        ((2.28, 2.56), (2.75, 3.06)),
        ((2.28, 2.12), (2.75, 1.62)),
        ((5.09, 2.99), (5.55, 3.06)),
        ((5.09, 2.7), (5.55, 1.62)),
    ]:
        axes.plot([x0, x1], [y0, y1], color=GREY, lw=0.7, ls=":")
    _box(axes, 0.1, 0.96, 8.05, 0.36, "#eeeeee")
    _text(axes, 4.12, 1.14, "L2 cache: one for the whole chip", TEXT, "center")
    _box(axes, 0.1, 0.12, 8.05, 0.66, "white")
    for i in range(28):
        _box(axes, 0.2 + i * 0.28, 0.18, 0.28, 0.25, TINT if i in (5, 6) else "white")
    _text(
        axes,
        0.2,
        0.6,
        "global memory: arrays, which move in sectors of 32 bytes (8 floats)",
        TEXT,
    )
    return chart


def butterfly(lanes: int = 8) -> Chart:
    """How a warp adds up by exchanging numbers: after each step a lane has heard of twice as many."""
    steps = int(np.log2(lanes))
    alt = f"{lanes} lanes in {steps} steps; in each, lanes that differ in one binary digit exchange their sums."
    chart, axes = _empty(7.2, 2.75, alt)
    xs = np.linspace(1.6, 6.9, lanes)
    values = np.arange(1, lanes + 1)
    ys = np.linspace(2.2, 0.3, steps + 1)
    for lane, x in enumerate(xs):
        _text(axes, x, 2.55, f"lane {lane}", TEXT, "center")
    for step in range(steps + 1):
        d = lanes >> step
        label = "its own number" if step == 0 else f"+ that of lane ^ {d}"
        _text(axes, 0.05, ys[step], label, TEXT)
        if step:
            before = values
            values = before + before[np.arange(lanes) ^ d]
            for lane in range(lanes):
                for other, width in ((lane, 0.8), (lane ^ d, 1.3)):
                    axes.plot(
                        [xs[other], xs[lane]], [ys[step - 1] - 0.14, ys[step] + 0.14],
                        color=COLOURS[0] if other != lane else GREY, lw=width, zorder=1,
                    )  # fmt: skip
        for lane, x in enumerate(xs):
            _box(
                axes, x - 0.18, ys[step] - 0.13, 0.36, 0.26, TINT if step == steps else "white"
            )
            _text(axes, x, ys[step], str(values[lane]), TEXT, "center")
    return chart


def tiles() -> Chart:
    """A tile of the product, and what of the factors it needs in one step of k."""
    alt = "y = x W: a block's tile of y of R rows and C columns needs R rows of x and C columns of W, a strip of k at a time."
    chart, axes = _empty(5.6, 3.1, alt)
    _box(axes, 0.5, 0.2, 1.5, 1.5, "white")  # x
    _box(axes, 2.3, 1.9, 2.1, 1.0, "white")  # W
    _box(axes, 2.3, 0.2, 2.1, 1.5, "white")  # y
    _box(axes, 0.5, 0.6, 1.5, 0.5, "#eeeeee")
    _box(axes, 3.0, 1.9, 0.7, 1.0, "#eeeeee")
    _box(axes, 0.9, 0.6, 0.3, 0.5, COLOURS[0])
    _box(axes, 3.0, 2.4, 0.7, 0.24, COLOURS[0])
    _box(axes, 3.0, 0.6, 0.7, 0.5, COLOURS[1])
    _text(axes, 1.25, 1.84, "x (M, K)", TEXT, "center")
    _text(axes, 4.5, 2.4, "W (K, N)", TEXT)
    _text(axes, 4.5, 0.95, "y (M, N)", TEXT)
    _text(axes, 0.4, 0.85, "R", TEXT, "right")
    _text(axes, 3.35, 3.0, "C", TEXT, "center")
    _text(axes, 1.05, 0.47, "a step of k", 8, "center")
    _text(axes, 3.35, 0.47, "a block's tile", 8, "center")
    return chart


def fragments(parts: Mapping[str, np.ndarray], lane: int) -> Chart:
    """Which lane holds which element: {name: lanes (rows, columns)}; one lane's elements stand out."""
    cell, gap = 0.228, 0.42
    width = sum(p.shape[1] for p in parts.values()) * cell + gap * len(parts) + 0.1
    tall = max(p.shape[0] for p in parts.values())
    alt = (
        f"The matrices {', '.join(parts)} of one mma instruction; every element shows the lane "
        f"that holds it, and those of lane {lane} stand out: "
        + "; ".join(f"{n} {np.argwhere(p == lane).tolist()}" for n, p in parts.items())
    )
    chart, axes = _empty(width, tall * cell + 0.62, alt)
    x0 = gap
    for name, lanes in parts.items():
        rows, columns = lanes.shape
        top = tall * cell + 0.08
        _text(axes, x0, top + 0.4, name, TEXT)
        for column in range(0, columns):
            _text(axes, x0 + (column + 0.5) * cell, top + 0.12, str(column), 7, "center", GREY)
        for row in range(rows):
            y = top - (row + 1) * cell
            _text(axes, x0 - 0.06, y + cell / 2, str(row), 7, "right", GREY)
            for column in range(columns):
                mine = lanes[row, column] == lane
                shade = (
                    COLOURS[0]
                    if mine
                    else (TINT if lanes[row, column] % 4 == lane % 4 else "white")
                )
                _box(axes, x0 + column * cell, y, cell, cell, shade, FAINT if not mine else INK)
                _text(
                    axes, x0 + (column + 0.5) * cell, y + cell / 2, str(lanes[row, column]), 7.5, "center",
                    "white" if mine else INK,
                )  # fmt: skip
        x0 += columns * cell + gap
    return chart


def banks(ways: Mapping[str, Traffic]) -> Chart:
    """Where the 32 threads of a warp read shared memory at once, a panel a way: banks across, 128 bytes a row."""
    costs = {}
    for name, traffic in ways.items():
        (load,) = traffic.of(shared=True, store=False)
        words = [offset // 4 for request, _, offset in load.records if request == 0][:32]
        costs[name] = (words, int(np.bincount(np.array(words) % 32).max()))
    told = "; ".join(f"{name}: {passes} passes" for name, (_, passes) in costs.items())
    chart = Chart(
        3.4 * len(ways),
        4.0,
        f"Words and banks that a warp reads: {told}.",
        layout="constrained",
    )
    for i, (axes, (name, (words, passes))) in enumerate(
        zip(chart.subplots(1, len(ways)), costs.items(), strict=True)
    ):
        axes.vlines(range(33), 0, 33, color=FAINT, lw=0.5, zorder=0)
        axes.hlines(range(34), 0, 32, color=FAINT, lw=0.5, zorder=0)
        for word in words:
            _box(axes, word % 32, word // 32, 1, 1, COLOURS[0], "white")
        axes.set(xlim=(-0.2, 32.2), ylim=(33.2, -0.2), aspect="equal")
        axes.set_title(
            f"{name}: {passes} pass{'es' * (passes > 1)}", fontsize=TEXT + 1, color=INK
        )
        axes.set_xlabel("bank", fontsize=TEXT, color=INK)
        axes.set_ylabel("" if i else "row of 128 bytes", fontsize=TEXT, color=INK)
        ticks = range(0, 32, 8)
        axes.set_xticks([t + 0.5 for t in ticks], ticks)
        axes.set_yticks([t + 0.5 for t in ticks], ticks)
        axes.tick_params(length=0, labelsize=TEXT - 1)
        axes.spines[:].set_visible(False)
    return chart


def by_length(
    lengths: Sequence[int], series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str
) -> Chart:
    """A line a way on logarithmic axes, a marker a measurement."""
    chart = plotting.line_plot(
        {name: (lengths, values) for name, values in series.items()},
        xlabel,
        ylabel,
        marker="o",
        log="xy",
    )
    axes = chart.axes[0]
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,g}")
    return chart


# ---- results


def gpu_results(root: Path, ops: Sequence[str]) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Header, and by device the measured times of every rung of these ops: benchmarks/results/DEVICE/ops.json."""
    header = ["op", "shape", "way", "ms (20th to 80th percentile)", "share of the ceiling"]
    found = {}
    for path in sorted((root / "benchmarks" / "results").glob("*/ops.json")):
        record: dict[str, Any] = json.loads(path.read_text())
        rows = [
            [
                r["op"].removesuffix("_forward"),
                r["shape"],
                r["way"],
                f"{r['ms']:.3g} ({r['p20']:.3g} to {r['p80']:.3g})",
                f"{r['share']:.0%}",
            ]
            for r in record["rows"]
            if r["op"] in ops and "ms" in r and "compiled" not in r["way"]
        ]
        if rows:
            found[record.get("device", path.parent.name)] = rows
    return header, found


def _empty(width: float, height: float, alt: str) -> tuple[Chart, Axes]:
    chart = Chart(width, height, alt)
    axes = chart.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    return chart, axes


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, edge: str = GREY
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, fc=colour, ec=edge, lw=0.7, zorder=2))


def _text(
    axes: Axes, x: float, y: float, text: str, size: float, ha: str = "left", colour: str = INK
) -> None:
    axes.text(x, y, text, fontsize=size, ha=ha, va="center", color=colour, zorder=3)
