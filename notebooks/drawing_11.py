"""Drawings for notebook 11: the machine, the roofline, single timings, rivals; and what it measures with."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from drawing_02 import MARKED, canvas, write
from minidiff import backend, plotting
from minidiff.plotting import COLOURS, FAINT, GREY, INK, STYLES, TEXT, Chart, _plain

# ---- the machine


def machine() -> Chart:
    """Where numbers live: registers, caches, memory; and where the two ceilings stand."""
    chart, axes = canvas(
        8.0,
        1.95,
        "A core calculates on registers; caches lie between it and the main memory. The arithmetic ceiling belongs to the "
        "core, the memory ceiling to the way between caches and memory.",
    )
    boxes = [
        (0.15, 1.75, "a core", "calculates on its\nregisters, a few\ndozen vectors"),
        (2.95, 1.75, "caches", "hold copies of what\nwas used last:\nsmall, near, fast"),
        (5.95, 1.9, "main memory", "holds all arrays:\nlarge, far, slow"),
    ]
    for x, w, title, text in boxes:
        axes.add_patch(Rectangle((x, 0.35), w, 1.05, fc=MARKED, ec=GREY, lw=0.8))
        write(axes, x + w / 2, 0.53, title, TEXT + 1, weight="bold")
        write(axes, x + w / 2, 0.98, text, TEXT - 0.5)
    for left, right, lw in ((1.97, 2.88, 5), (4.77, 5.88, 1.6)):
        axes.add_patch(
            FancyArrowPatch(
                (left, 0.88), (right, 0.88), arrowstyle="<|-|>", mutation_scale=14, color=GREY,
                lw=lw, shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip
    write(axes, 1.02, 1.62, "arithmetic ceiling:\noperations a second", color=COLOURS[1])
    write(axes, 5.32, 1.62, "memory ceiling:\nbytes a second", color=COLOURS[1])
    return chart


def copies(sizes: Sequence[int], rates: Sequence[float]) -> Chart:
    """GB/s of a copy against the array's size in bytes."""
    chart = plotting.line_plot(
        {"one core copies": (sizes, rates)},
        "size of the array",
        "read and written (GB/s)",
        marker="o",
        log="x",
    )
    (axes,) = chart.axes
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes[::2], [_bytes(s) for s in sizes[::2]])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    return chart


def _bytes(n: float) -> str:
    return f"{n / 2**20:g} MiB" if n >= 2**20 else f"{n / 2**10:g} KiB"


# ---- the roofline


def roofline(
    arithmetic: float,
    memory: float,
    intensity: Mapping[str, float],
    rates: Mapping[str, Mapping[str, float]],
) -> Chart:
    """The roof of a machine (operations and bytes a second) and on it ops, lettered in the order of `intensity`.

    intensity: operations a byte by op; rates: series -> op -> operations a second, joined by a line an op.
    """
    reached = [r for series in rates.values() for r in series.values()]
    low, high = min([*reached, memory * min(intensity.values())]), max([*reached, arithmetic])
    told = "; ".join(
        f"{op}: {intensity[op]:.3g} operations a byte, "
        + ", ".join(f"{name} {_giga(series[op])}" for name, series in rates.items())
        for op in intensity
    )
    chart = Chart(8.0, 4.4, f"Roofline, GFLOP/s against operations a byte. {told}")
    axes = chart.add_axes((0.085, 0.125, 0.55, 0.8))
    _plain(axes, "both")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(0.25, 512)
    axes.set_ylim(low / 2 / 1e9, high * 2.2 / 1e9)
    ridge = arithmetic / memory
    axes.plot(
        [0.25, ridge, 512],
        [0.25 * memory / 1e9, arithmetic / 1e9, arithmetic / 1e9],
        color=INK,
        lw=2,
        zorder=2,
        label=f"the roof:\n{_giga(memory)} GB/s, {_giga(arithmetic)} GFLOP/s",
    )
    axes.axvline(ridge, color=GREY, lw=0.8, ls=STYLES[1], zorder=1)
    bottom = low / 2 / 1e9 * 1.12
    axes.text(ridge / 1.12, bottom, "memory-bound", ha="right", fontsize=TEXT - 1, color=GREY)
    axes.text(ridge * 1.12, bottom, "compute-bound", ha="left", fontsize=TEXT - 1, color=GREY)
    marks = {"face": (COLOURS[0], "white", COLOURS[1]), "shape": ("o", "^", "s")}
    for op, x in intensity.items():
        of_op = [series[op] / 1e9 for series in rates.values()]
        axes.plot([x, x], [min(of_op), max(of_op)], color=GREY, lw=0.8, zorder=2)
    for i, (name, series) in enumerate(rates.items()):
        axes.plot(
            list(intensity.values()), [series[op] / 1e9 for op in intensity], marks["shape"][i],
            ms=7, mfc=marks["face"][i], mec=INK, mew=0.9, ls="none", label=name, zorder=3,
        )  # fmt: skip
    for letter, (op, x) in zip("ABCDEFGHIJ", intensity.items(), strict=False):
        top = max(series[op] for series in rates.values()) / 1e9
        axes.annotate(
            letter, (x, top), (0, 6), textcoords="offset points", ha="center", va="bottom",
            fontsize=TEXT, color=INK, weight="bold",
            bbox={"fc": "white", "ec": "none", "pad": 0.6}, zorder=4,
        )  # fmt: skip
    axes.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(-2, 10)]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:g}" if v >= 1 else f"1/{1 / v:g}")
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("operations a byte (operational intensity)", fontsize=TEXT + 1, color=INK)
    axes.set_ylabel("GFLOP/s", fontsize=TEXT + 1, color=INK)
    key = "\n".join(
        f"{letter}  {op}" for letter, op in zip("ABCDEFGHIJ", intensity, strict=False)
    )
    chart.text(
        0.655, 0.9, key, fontsize=TEXT, color=INK, va="top", linespacing=1.6, parse_math=False
    )
    chart.legend(
        loc="lower left", bbox_to_anchor=(0.64, 0.1), fontsize=TEXT, frameon=False, ncols=1
    )
    return chart


def _giga(value: float) -> str:
    return f"{value / 1e9:.0f}" if value >= 1e11 else f"{value / 1e9:.3g}"


# ---- timings


def timings(milliseconds: Sequence[float]) -> Chart:
    """Single timings in the order in which they were taken, their median and their quartiles."""
    low, median, high = np.percentile(milliseconds[1:], [25, 50, 75])
    chart = Chart(
        8.0,
        3.2,
        f"{len(milliseconds)} timings of one call: the first {milliseconds[0]:.3g} ms, then median "
        f"{median:.3g} ms, quartiles {low:.3g} and {high:.3g} ms",
        layout="constrained",
    )
    axes = chart.subplots()
    _plain(axes, "y")
    axes.axhspan(low, high, color=COLOURS[6], alpha=0.35, lw=0, label="half of them lie here")
    axes.axhline(median, color=INK, lw=1.2, label="median")
    axes.plot(
        range(2, len(milliseconds) + 1),
        milliseconds[1:],
        "o",
        ms=3.2,
        color=COLOURS[0],
        mec="none",
        label="a later call",
    )
    axes.plot([1], milliseconds[:1], "D", ms=6, color=COLOURS[1], label="the first call")
    axes.set_yscale("log")
    _few_ticks(axes, milliseconds)
    axes.set_xlabel("call", fontsize=TEXT + 1, color=INK)
    axes.set_ylabel("milliseconds (logarithmic)", fontsize=TEXT + 1, color=INK)
    chart.legend(loc="outside lower center", ncols=4, fontsize=TEXT, frameon=False)
    return chart


def two_orders(measured: Mapping[str, tuple[str, Sequence[float]]], begins: int) -> Chart:
    """Panels title -> (letter of each call, seconds); from call `begins` on a neighbour computed too (shaded)."""
    everything = [1e3 * s for _, seconds in measured.values() for s in seconds]
    chart = Chart(
        9.2,
        3.3,
        "Timings of two functions, one after the other and in turns, while the machine becomes slower",
        layout="constrained",
    )
    panels = chart.subplots(1, len(measured), sharey=True)
    for axes, (title, (order, seconds)) in zip(panels, measured.items(), strict=True):
        _plain(axes, "y")
        axes.axvspan(begins + 0.5, len(order) + 0.5, color=FAINT, alpha=0.6, lw=0)
        for i, name in enumerate("AB"):
            where = [n for n, letter in enumerate(order) if letter == name]
            times = [1e3 * seconds[n] for n in where]
            axes.plot(
                [n + 1 for n in where], times, "o^"[i], ms=(4, 3)[i], color=COLOURS[i], mfc=(COLOURS[0], "white")[i],
                label=name if axes is panels[0] else None,
            )  # fmt: skip
            axes.axhline(
                np.median(times), color=COLOURS[i], lw=1.2, ls=STYLES[i],
                label=f"median of {name}" if axes is panels[0] else None,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=TEXT + 1, color=INK)
        axes.set_xlabel("call", fontsize=TEXT + 1, color=INK)
        axes.set_xlim(0, len(order) + 1)
    _few_ticks(panels[0], everything)
    panels[0].set_ylabel("milliseconds (logarithmic)", fontsize=TEXT + 1, color=INK)
    chart.legend(loc="outside lower center", ncols=4, fontsize=TEXT, frameon=False)
    return chart


def _few_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Labels at 1, 2 and 5 times powers of ten on a logarithmic y axis, or at more numbers where it spans little."""
    low, high = min(values) / 1.2, max(values) * 1.2
    axes.set_ylim(low, high)
    inside: list[float] = []
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        places = [m * 10.0**k for k in range(-6, 7) for m in steps]
        inside = inside if len(inside) > 2 else [v for v in places if low <= v <= high]
    axes.yaxis.set_major_locator(FixedLocator(inside))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


class Neighbour:
    """Somebody else's work on this machine, from `begin()` until the block ends: as many threads as cores, copying."""

    def __init__(self, threads: int):
        self.stop = threading.Event()
        self.threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(threads)
        ]

    def __enter__(self) -> Neighbour:
        return self

    def begin(self) -> None:
        """Start."""
        for thread in self.threads:
            thread.start()

    def _work(self) -> None:
        x = np.ones(1 << 20, np.float32)
        y = np.ones_like(x)
        while not self.stop.is_set():
            np.copyto(y, x)

    def __exit__(self, *error: Any) -> None:
        self.stop.set()
        for thread in self.threads:
            if thread.ident:
                thread.join()


# ---- where a step's time goes


def seconds_by_kind(
    kind: str, step: Callable[[], Any], kind_of: Callable[[str], str], other: str
) -> dict[str, float]:
    """Seconds of one step, by the kind of work that each kernel's name speaks of; `other`: what no kernel took."""
    seconds: dict[str, float] = defaultdict(float)
    inside = [False]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                return function(*args, **kwargs)
            inside[0] = True
            since = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[kind_of(name)] += time.perf_counter() - since
                inside[0] = False

        return call

    module = backend.MODULES[kind]
    functions = {
        **backend.REFERENCE,
        **({} if module is None else {k: f for k, f in vars(module).items() if callable(f)}),
    }
    watched = {k: f if k == "activate" else timed(k, f) for k, f in functions.items()}
    backend.MODULES["watched"] = SimpleNamespace(**watched)
    try:
        with backend.kernels("watched"):
            since = time.perf_counter()
            step()
            total = time.perf_counter() - since
    finally:
        del backend.MODULES["watched"]
    seconds[other] += total - sum(seconds.values())
    return dict(seconds)


# ---- rivals


def rivals(ratios: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str) -> Chart:
    """For each op a row of dots, one a shape: how many times as long the rival takes; left of 1 we lose."""
    passes = list(dict.fromkeys(name for of_op in ratios.values() for name in of_op))
    values = [v for of_op in ratios.values() for series in of_op.values() for v in series]
    lost = sum(v < 1 for v in values)
    chart = Chart(
        8.0,
        1.4 + 0.42 * len(ratios),
        f"{xlabel}, by op and shape: {min(values):.3g} to {max(values):.3g}; {lost} of {len(values)} below 1",
        layout="constrained",
    )
    axes = chart.subplots()
    _plain(axes, "x")
    axes.set_xscale("log")
    axes.axvspan(0.01, 1, color=FAINT, alpha=0.5, lw=0)
    axes.axvline(1, color=INK, lw=1)
    for i, name in enumerate(passes):
        where = [
            (v, row + (i - (len(passes) - 1) / 2) * 0.24)
            for row, of_op in enumerate(ratios.values())
            for v in of_op.get(name, [])
        ]
        axes.plot(
            *zip(*where, strict=True), "o^s"[i], ms=5.5, mfc=COLOURS[i] if i != 1 else "white",
            mec=COLOURS[i], mew=1.1, ls="none", label=name, alpha=0.85,
        )  # fmt: skip
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.set_ylim(len(ratios) - 0.45, -0.95)
    low, high = min(min(values) / 1.3, 0.4), max(max(values) * 1.3, 2.5)
    axes.set_xlim(low, high)
    axes.text(1 / 1.04, -0.68, "PyTorch is faster", ha="right", fontsize=TEXT - 1, color=GREY)
    axes.text(1.04, -0.68, "minidiff is faster", ha="left", fontsize=TEXT - 1, color=GREY)
    ticks = [m * 10.0**k for k in (-2, -1, 0, 1, 2) for m in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(xlabel, fontsize=TEXT + 1, color=INK)
    chart.legend(loc="outside lower center", ncols=3, fontsize=TEXT, frameon=False)
    return chart
