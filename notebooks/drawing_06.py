"""Drawings of notebook 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from minidiff.plotting import COLOURS, FAINT, GREY, INK, STYLES, TEXT, Chart, _plain

Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def panels(
    charts: Mapping[str, Lines],
    xlabel: str,
    ylabel: str | Sequence[str],
    alt: str,
    ylim: tuple[float, float] | None = None,
    height: float = 2.9,
    logy: bool = False,
) -> Chart:
    """Small line charts side by side, {title: {line: (xs, ys)}}; lines of one name look alike in all of them."""
    names = list(dict.fromkeys(name for lines in charts.values() for name in lines))
    ylabels = [ylabel] * len(charts) if isinstance(ylabel, str) else list(ylabel)
    chart = Chart(8.0 if len(charts) > 1 else 6.4, height, alt, layout="constrained")
    row = chart.subplots(1, len(charts), squeeze=False)[0]
    for axes, (title, lines), label in zip(row, charts.items(), ylabels, strict=True):
        _plain(axes, "y")
        for name, (xs, ys) in lines.items():
            i = names.index(name)
            axes.plot(xs, ys, label=name, color=COLOURS[i % 7], ls=STYLES[i % 7], lw=1.8)
        axes.set_title(title, fontsize=TEXT, color=INK, parse_math=False)
        axes.set_xlabel(xlabel, fontsize=TEXT, color=INK)
        if axes is row[0] or not isinstance(ylabel, str):
            axes.set_ylabel(label, fontsize=TEXT, color=INK)
        if ylim:
            axes.set_ylim(*ylim)
        if logy:
            axes.set_yscale("log")
    handles = {
        h.get_label(): h
        for axes in row
        for h in axes.lines
        if not h.get_label().startswith("_")
    }
    if len(names) > 1:
        chart.legend(
            handles=[handles[name] for name in names], loc="outside lower center",
            ncols=4 if len(charts) > 1 else 2 if len(names) > 3 else 3, fontsize=TEXT, frameon=False,
        )  # fmt: skip
    return chart


def score_arrows(
    xs: np.ndarray, density: np.ndarray, at: np.ndarray, score: np.ndarray, alt: str
) -> Chart:
    """A density, and under it arrows, as long as the score is large, from the places `at`."""
    chart = Chart(6.4, 3.0, alt, layout="constrained")
    axes = chart.subplots()
    _plain(axes, "y")
    axes.fill_between(xs, density, color=FAINT, zorder=1)
    axes.plot(xs, density, color=COLOURS[0], lw=1.8)
    low = -0.16 * density.max()
    longest = 0.9 * float(np.min(np.diff(at))) / np.abs(score).max()
    for x, s in zip(at, score, strict=True):
        axes.annotate(
            "", (x + longest * s, low), (x, low),
            arrowprops={
                "arrowstyle": "-|>", "color": COLOURS[1], "lw": 1.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 5
            },
        )  # fmt: skip
    axes.plot(at, np.full(len(at), low), "o", color=COLOURS[1], ms=2.5)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_ylim(2 * low, None)
    axes.set_yticks([y for y in axes.get_yticks() if 0 <= y <= density.max()])
    axes.set_xlabel("x_t", fontsize=TEXT, color=INK)
    axes.set_ylabel("density q(x_t)", fontsize=TEXT, color=INK)
    return chart


def fitted(images: np.ndarray) -> np.ndarray:
    """Each image (B, H, W, 3) divided by the 99th percentile of its size, where that is beyond 1."""
    spread = np.maximum(1, np.percentile(np.abs(images), 99, axis=(1, 2, 3), keepdims=True))
    return images / spread
