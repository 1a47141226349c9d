"""Figures in one plain style: image grids, filmstrips and line charts.

Images are float arrays in [-1, 1], channels last. Every function returns a `Chart`, a matplotlib Figure that
carries a sentence describing itself; write it with `save`. pyplot and its global state are never touched, so
everything works without a display.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, NullFormatter

from minidiff.data.shapes import SCORES
from minidiff.files import whole_file

DPI = 160
INK, GREY, FAINT = "#222222", "#666666", "#dddddd"
# Okabe and Ito's colour-blind-safe set without yellow; the line styles tell curves apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", INK, "#E69F00", "#56B4E9")
STYLES = ("-", (0, (5, 1.5)), (0, (7, 1.5, 1.5, 1.5)), (0, (3, 1)), "-", (0, (9, 2)), (0, (4, 1, 1, 1, 1, 1)))
TEXT, TITLE = 9, 11  # font sizes, points
LONGEST = 200  # characters of a caption that stand under its image
LINE = 1.3  # line height, font sizes
X_LABELS = {"step": "training step", "images": "training images seen", "minutes": "training time (minutes)"}


class Chart(Figure):
    """A Figure with `alt_text`, one sentence on what it shows; notebooks display it without pyplot."""

    def __init__(self, width: float, height: float, alt_text: str, layout: str | None = None):
        super().__init__(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
        self.alt_text = alt_text

    def __repr__(self):
        return self.alt_text  # what a notebook shows where it cannot show the picture

    def _repr_png_(self):
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=DPI, facecolor="white")
        width, height = self.get_size_inches() * 96
        return data.getvalue(), {"width": int(width), "height": int(height), "alt": self.alt_text}


def save(figure: Figure, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write `figure` as a PNG at `path`, whole or not at all, and return the path.

    `metadata` goes into PNG text chunks, and the figure's `alt_text` into `Description`.
    Raises ValueError if `path` does not end in .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"figures are saved as PNG: give a path that ends in .png, not {str(path)!r}")
    texts = {"Description": getattr(figure, "alt_text", ""), **(metadata or {})}
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata=texts)
    return path


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Bytes (..., H, W, 3) of float images (..., H, W, 3 or 1) in [-1, 1]: clipped, rounded, grey made RGB.

    Raises ValueError for another shape, for integers (they are not in [-1, 1]) and for NaN or infinity.
    """
    images = np.asarray(images)
    if images.ndim < 3 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must have shape (..., H, W, 3) or (..., H, W, 1), not {images.shape}")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be floats in [-1, 1], not {images.dtype}")
    if not np.isfinite(images).all():
        raise ValueError(f"images of shape {images.shape} are not finite: they hold NaN or infinity")
    pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    return pixels.repeat(3 // images.shape[-1], axis=-1)


def image_grid(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    verdicts: Sequence[bool] | None = None,
    title: str | None = None,
) -> Chart:
    """Images (B, H, W, 3) in rows of `columns`, each with its caption and a tick or cross for its verdict.

    Raises ValueError if B or columns is 0, or if B differs from the number of captions or verdicts.
    """
    pixels = to_uint8(images)
    if pixels.ndim != 4 or not len(pixels):
        raise ValueError(f"image_grid needs images of shape (B, H, W, 3) with B >= 1, not {np.shape(images)}")
    n = len(pixels)
    if columns is None:
        most = max(4, math.ceil(math.sqrt(n)))
        columns = math.ceil(n / math.ceil(n / most))  # evens out the rows
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    for name, values in (("captions", captions), ("verdicts", verdicts)):
        if values is not None and len(values) != n:
            raise ValueError(f"{name} must be one for each of the {n} images, not {len(values)}")
    alt = f"A grid of {n} images" if n > 1 else "One image"
    if verdicts is not None:
        alt += f", {sum(map(bool, verdicts))} judged right"
    if captions is not None:
        alt += ": " + "; ".join(captions)
    marks = [""] * n if verdicts is None else map(_mark, verdicts)
    labels = [f"{m} {_cut(c)}".strip() for m, c in zip(marks, captions or [""] * n, strict=True)]
    rows = [slice(i, i + columns) for i in range(0, n, columns)]
    return _tiles([pixels[r] for r in rows], [labels[r] for r in rows], alt + ".", title=title)


def filmstrip(x_ts: Sequence[np.ndarray], x0s: Sequence[np.ndarray], ts: Sequence[float], caption: str) -> Chart:
    """Sampling as two rows of images (H, W, 3), from x_T on the left to x_0: x_t above, predicted x0 below.

    Where x_t leaves [-1, 1] it is divided by the 99th percentile of |x_t|, which is written under it: clipped
    noise would be mostly pure red, green and blue. Predicted x0 is clipped, as the row label says.
    Raises ValueError if the three lengths differ or are 0.
    """
    if not len(x_ts) == len(x0s) == len(ts) or not len(ts):
        raise ValueError(f"filmstrip needs as many x_ts as x0s and ts: {len(x_ts)}, {len(x0s)}, {len(ts)}")
    x_ts = np.stack(x_ts)  # (frames, H, W, 3)
    spreads = np.maximum(1, np.percentile(np.abs(x_ts), 99, axis=(1, 2, 3)))
    rows = [to_uint8(x_ts / spreads[:, None, None, None]), to_uint8(np.stack(x0s))]
    below = [[f"÷ {s:.1f}" if s > 1.05 else "" for s in spreads], [""] * len(ts)]
    left = ["x_t\n(noise leaves ±1: shown\ndivided, as noted below)", "predicted x0\n(clipped to ±1)"]
    alt = (
        f"Sampling “{caption}” in {len(ts)} frames from t = {ts[0]:g} to t = {ts[-1]:g}: "
        "noise x_t turns into an image above, the predicted x0 below."
    )
    return _tiles(rows, below, alt, left=left, above=[f"t = {t:g}" for t in ts], title=caption)


def guidance_sweep(
    images: np.ndarray,
    captions: Sequence[str],
    scales: Sequence[float],
    verdicts: Sequence[Sequence[bool]] | None = None,
) -> Chart:
    """Images (rows, columns, H, W, 3): one row for each caption, one column for each guidance scale w.

    `verdicts` (rows, columns) put a tick or cross under each. Raises ValueError if the shapes disagree.
    """
    pixels = to_uint8(images)
    grid = (len(captions), len(scales))
    if pixels.ndim != 5 or pixels.shape[:2] != grid or 0 in grid:
        raise ValueError(f"guidance_sweep needs images of shape {grid} + (H, W, 3), not {np.shape(images)}")
    if verdicts is not None and np.shape(verdicts) != grid:
        raise ValueError(f"guidance_sweep needs verdicts of shape {grid}, not {np.shape(verdicts)}")
    marks = [[""] * grid[1]] * grid[0] if verdicts is None else [list(map(_mark, row)) for row in verdicts]
    above = [f"w = {w:g}" for w in scales]
    alt = f"Samples with guidance {', '.join(above)} (columns) for: {'; '.join(captions)}."
    return _tiles(pixels, marks, alt, left=captions, above=above)


def progress(images: np.ndarray, captions: Sequence[str], labels: Sequence[str], title: str | None = None) -> Chart:
    """Images (rows, columns, H, W, 3): one row for each label, such as a time, one column for each caption.

    Raises ValueError if the shapes disagree.
    """
    pixels, grid = to_uint8(images), (len(labels), len(captions))
    if pixels.ndim != 5 or pixels.shape[:2] != grid or 0 in grid:
        raise ValueError(f"progress needs images of shape {grid} + (H, W, 3), not {np.shape(images)}")
    below = [*[[""] * grid[1]] * (grid[0] - 1), [_cut(caption) for caption in captions]]
    alt = f"Samples after {', '.join(labels)} (rows) for: {'; '.join(captions)}."
    return _tiles(pixels, below, alt, left=labels, title=title)


def loss_curve(logs: Mapping[str, Sequence[Mapping]], title: str | None = None, x: str = "step") -> Chart:
    """Training loss of each named run against x ("step", "images", "minutes"): faint points, running median.

    The median is taken over 1/25 of the run. The loss axis is logarithmic where losses are positive and span
    more than a factor of 10. Losses that are not finite are left out and counted in the label.
    Raises ValueError for an unknown x, a run without a finite loss, or records without x.
    """
    raw, series = [], {}
    for name, records in logs.items():
        xs, ys = _columns(records, x, "loss", name)
        good = np.isfinite(ys)
        if not good.any():
            raise ValueError(f"the log {name!r} holds no finite loss to plot")
        label = name if good.all() else f"{name} ({(~good).sum()} not finite)"
        raw.append((xs[good], ys[good]))
        series[label] = _running_median(*raw[-1])
    alt = f"Training loss against {X_LABELS[x]}; at the end: {_ends(series, '{:.3g}')}."
    figure, (axes,) = _charts(alt, [(X_LABELS[x], "loss (line: running median)")], title)
    for i, (xs, ys) in enumerate(raw):
        some = slice(None, None, -(-len(xs) // 4000))  # more of them would hide the line
        axes.plot(xs[some], ys[some], ".", color=COLOURS[i % len(COLOURS)], ms=2.5, alpha=0.25, mec="none", zorder=1)
    values = np.concatenate([ys for _, ys in raw])
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if max(xs[-1] for xs, _ in raw) >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _lines(axes, series)
    _label_ends(axes)
    return figure


def score_curve(
    records: Sequence[Mapping],
    chance: Mapping[str, float] | None = None,
    x: str = "minutes",
    title: str | None = None,
    names: Sequence[str] = SCORES,
) -> Chart:
    """Scores in percent against x, from records such as {"minutes": 2.0, "colours": 0.9, "all_right": 0.4}.

    Scores and `chance` (name -> level, dotted) are fractions 0..1; a record may lack some `names`.
    Raises ValueError if no record has any of the names, or for a score outside 0..1.
    """
    series, levels = {}, {}
    for name in names:
        if having := [r for r in records if r.get(name) is not None]:
            xs, ys = _columns(having, x, name, "scores")
            if not (ys.min() >= 0 and ys.max() <= 1):
                raise ValueError(f"the score {name!r} must be in 0..1, not {ys.min():g}..{ys.max():g}")
            label = name.replace("_", " ")
            series[label] = (xs, 100 * ys)
            if name in (chance or {}):
                levels[label] = 100 * chance[name]
    if not series:
        raise ValueError(f"no record holds any of the scores {', '.join(names)}")
    alt = f"Samples judged right against {X_LABELS[x]}; at the end: {_ends(series, '{:.0f}%')}."
    ylabel = "samples right (%)" + (", dotted: chance" if levels else "")
    figure, (axes,) = _charts(alt, [(X_LABELS[x], ylabel)], title)
    axes.set_ylim(-2, 102)
    for i, name in enumerate(series):
        if name in levels:
            same = [n for n in levels if levels[n] == levels[name]]  # equal levels share the line dot by dot
            dots = (4 * same.index(name), (1.2, 4 * len(same) - 1.2))
            axes.axhline(levels[name], color=COLOURS[i % len(COLOURS)], lw=1.2, ls=dots, zorder=1)
    _lines(axes, series, marker="o")
    _label_ends(axes)
    return figure


def schedule_plot(schedules: Mapping[str, np.ndarray]) -> Chart:
    """Each alpha_bar (T+1 values in 0..1) against t/T; beside it log SNR = ln(alpha_bar / (1 - alpha_bar)).

    A log SNR beyond +-20 nats is left out: it is noise or an image to every digit that counts.
    Raises ValueError for another shape or range.
    """
    signal, snr = {}, {}
    for name, alpha_bar in schedules.items():
        a = np.asarray(alpha_bar, dtype=np.float64)
        if a.ndim != 1 or len(a) < 2 or not ((a >= 0) & (a <= 1)).all():
            raise ValueError(f"the schedule {name!r} must be T+1 values in 0..1, in one dimension: {a.shape}")
        t = np.linspace(0, 1, len(a))
        with np.errstate(divide="ignore"):
            log_snr = np.log(a) - np.log1p(-a)
        signal[name] = (t, a)
        snr[name] = (t, np.where(np.abs(log_snr) <= 20, log_snr, np.nan))
    alt = f"alpha_bar and log signal-to-noise ratio against t/T for the schedules {', '.join(schedules)}."
    figure, panels = _charts(alt, [("t / T", "alpha_bar"), ("t / T", "log SNR (nats)")])
    _lines(panels[0], signal)
    _lines(panels[1], snr)
    _label_ends(panels[1])  # in the left panel all lines end at 0
    return figure


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    marker: str | None = None,
    log: str = "",
) -> Chart:
    """Lines name -> (xs, ys), each named at its right end; log: "x", "y" or "xy" for logarithmic axes.

    Raises ValueError if a line has no finite value.
    """
    alt = f"{title or ylabel} against {xlabel}; at the end: {_ends(series, '{:.3g}')}."
    figure, (axes,) = _charts(alt, [(xlabel, ylabel)], title)
    for axis in log:
        getattr(axes, f"set_{axis}scale")("log")
    _lines(axes, series, marker)
    _label_ends(axes)
    return figure


def bars(
    rows: Sequence[str],
    values: Mapping[str, Sequence[float]],
    xlabel: str,
    ceiling: tuple[str, float] | None = None,
    title: str | None = None,
    log: bool = False,
) -> Chart:
    """Horizontal bars: for each row one bar a series of `values` (0: none), and a line at ceiling = (name, value).

    log: a logarithmic axis. The legend is left out where there is nothing to tell apart.
    """
    n = len(values)
    width, height = 8.0, _whole_pixels(1.1 + 0.17 * len(rows) * (n + 0.8))
    told = "; ".join(f"{name} {min(v):.3g} to {max(v):.3g}" for name, v in values.items())
    figure = Chart(width, height, f"{title or xlabel}. {xlabel}: {told}", layout="constrained")
    axes = figure.subplots()
    _plain(axes, "x")
    for i, (name, numbers) in enumerate(values.items()):
        if len(numbers) != len(rows):
            raise ValueError(f"{name!r} has {len(numbers)} values for {len(rows)} rows")
        places = np.arange(len(rows)) + (i - (n - 1) / 2) * 0.8 / n
        drawn = axes.barh(places, numbers, 0.8 / n * 0.9, label=name, color=COLOURS[i], hatch=("", "///", "...")[i % 3])
        axes.bar_label(drawn, [_short(v) if v else "" for v in numbers], padding=2, fontsize=TEXT - 2, color=INK)
    if ceiling:
        axes.axvline(ceiling[1], color=INK, lw=1, ls=STYLES[1], label=f"{ceiling[0]}, {_short(ceiling[1])}")
    axes.set_yticks(np.arange(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(xlabel, fontsize=TEXT + 1, color=INK)
    if log:
        axes.set_xscale("log")
    if n > 1 or ceiling:
        figure.legend(loc="outside lower center", ncols=2, fontsize=TEXT, frameon=False)
    if title:
        axes.set_title(title, loc="left", fontsize=TITLE, color=INK, parse_math=False)
    return figure


def memory_accesses(
    records: Sequence[tuple[int, int, int]], width: int, shared: bool, request: int = 0, title: str | None = None
) -> Chart:
    """What the 32 threads of a warp touch at once: a square for each 4-byte word, with the thread's number in its warp.

    records: (request, thread, offset in bytes), as the emulator's `access_records` gives them; `width`: bytes a thread.
    A row is 128 bytes in a line: for shared memory the 32 banks, of which each serves one row at a time; for global
    memory four sectors of 32 bytes, each of which is fetched whole. Rows that nobody touches are left out. Raises
    ValueError if there is no such request.
    """
    first = min((thread for r, thread, _ in records if r == request), default=0) // 32 * 32  # of one warp
    touched = [(t - first, o) for r, t, o in records if r == request and first <= t < first + 32]
    if not touched:
        raise ValueError(f"no record of request {request}")
    words: dict[int, list[int]] = {}
    for thread, offset in touched:
        for word in range(offset // 4, (offset + width - 1) // 4 + 1):
            words.setdefault(word, []).append(thread)
    rows = sorted({word // 32 for word in words})
    most = max(sum(word % 32 == bank for word in words) for bank in range(32))
    sectors, fewest = len({word // 8 for word in words}), math.ceil(len(words) / 8)
    cost = (
        f"{most} passes over the banks; the least would be {math.ceil(len(words) / 32)}"
        if shared
        else f"{sectors} sectors of 32 bytes; the least would be {fewest}"
    )
    height = _whole_pixels(1.05 + 0.24 * len(rows))
    figure = Chart(8.0, height, f"{title or 'One request of a warp'}: {cost}.", layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        for x in range(32):
            threads = words.get(32 * row + x, [])
            colour = "white" if not threads else COLOURS[0] if len(set(threads)) == 1 else COLOURS[1]
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=FAINT, lw=0.6))
            label = str(threads[0]) if len(set(threads)) == 1 else f"{len(set(threads))}x" if threads else ""
            axes.text(x + 0.5, y + 0.5, label, ha="center", va="center", fontsize=TEXT - 2.5, color="white")
    if not shared:
        for x in range(0, 33, 8):
            axes.plot([x, x], [0, len(rows)], color=INK, lw=1.2)
    axes.set(xlim=(-0.1, 32.1), ylim=(len(rows) + 0.05, -0.05))
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [f"{128 * row}" for row in rows], fontsize=TEXT - 1)
    ticks = range(32) if shared else range(0, 32, 8)
    axes.set_xticks([x + (0.5 if shared else 0) for x in ticks], [str(x if shared else 4 * x) for x in ticks])
    axes.tick_params(length=0, labelsize=TEXT - 1, colors=GREY, labelcolor=INK)
    axes.set_ylabel("byte", fontsize=TEXT, color=INK)
    axes.set_xlabel(f"{'bank' if shared else 'byte within the line'}: {cost}", fontsize=TEXT + 1, color=INK)
    if title:
        axes.set_title(title, loc="left", fontsize=TITLE, color=INK, parse_math=False)
    return figure


def stacked_shares(
    rows: Mapping[str, Mapping[str, float]], xlabel: str, title: str | None = None, number: str = "{:.0f}"
) -> Chart:
    """One horizontal bar a row, cut into the row's named parts; parts have one colour in all rows."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    told = "; ".join(
        f"{row}: " + ", ".join(f"{k} {number.format(v)}" for k, v in parts.items()) for row, parts in rows.items()
    )
    figure = Chart(8.0, _whole_pixels(1.5 + 0.55 * len(rows)), f"{title or xlabel}. {told}", layout="constrained")
    axes = figure.subplots()
    _plain(axes, "x")
    for i, name in enumerate(names):
        lefts = [sum(list(parts.get(k, 0.0) for k in names[:i])) for parts in rows.values()]
        widths = [parts.get(name, 0.0) for parts in rows.values()]
        colour = (*COLOURS, FAINT, GREY)[i % 9]
        drawn = axes.barh(list(rows), widths, 0.6, left=lefts, label=name, color=colour, edgecolor="white", lw=0.8)
        widest = max(sum(parts.values()) for parts in rows.values())
        texts = [number.format(w) if w > 0.03 * widest else "" for w in widths]
        axes.bar_label(drawn, texts, label_type="center", fontsize=TEXT - 1, color="white" if i < 5 else INK)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel, fontsize=TEXT + 1, color=INK)
    figure.legend(loc="outside lower center", ncols=4, fontsize=TEXT, frameon=False)
    if title:
        axes.set_title(title, loc="left", fontsize=TITLE, color=INK, parse_math=False)
    return figure


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _whole_pixels(inches: float) -> float:
    return round(inches * DPI) / DPI


def _plain(axes: Axes, grid: str) -> None:
    """The project's axes: no box, grey lines, a faint grid behind."""
    axes.set_facecolor("white")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", colors=GREY, labelcolor=INK, labelsize=TEXT)
    axes.grid(True, axis=grid, color=FAINT, lw=0.6)
    axes.set_axisbelow(True)


def _mark(verdict: bool) -> str:
    return "✓" if verdict else "✗"


def _pixels(points: float) -> int:
    return round(points * DPI / 72)


def _width(text: str, size: float) -> int:
    """Pixels across the widest line of `text` in the default font at `size` points."""
    font = FontProperties(size=size)
    return max(
        _pixels(text_to_path.get_text_width_height_descent(line, font, ismath=False)[0]) for line in text.split("\n")
    )


def _height(texts: Sequence[str], size: float) -> int:
    """Pixels down the tallest of these texts; an empty text needs none."""
    return _pixels(LINE * size) * max((t.count("\n") + 1 if t else 0 for t in texts), default=0)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _wrap(text: str, width: float, size: float) -> str:
    """`text` broken into lines at most `width` pixels wide, inside words if it must be."""
    lines = []
    for paragraph in text.split("\n"):
        columns = max(1, min(len(paragraph), int(width / _pixels(0.4 * size))))
        while columns > 1 and _width("\n".join(textwrap.wrap(paragraph, columns)), size) > width:
            columns -= 1
        lines += textwrap.wrap(paragraph, columns)
    return "\n".join(lines)


def _tiles(rows, below, alt_text: str, left=(), above=(), title: str | None = None) -> Chart:
    """Rows of byte images on a white canvas, with texts under each, left of each row and above each column.

    Everything is placed in whole pixels, so that an image pixel stays a crisp square.
    """
    columns, (h, w) = len(rows[0]), rows[0][0].shape[:2]
    side, wanted = max(h, w), min(320, max(128, 1280 // columns))
    scale = max(1, (wanted + side // 2) // side)
    h, w, gap, margin = h * scale, w * scale, 18, 24
    below = [[_wrap(text, w, TEXT) for text in row] for row in below]
    left = [_wrap(text, 280, TEXT) for text in left]
    x0 = margin + (max(_width(text, TEXT) for text in left) + gap if left else 0)
    width = max(x0 + columns * (w + gap) - gap + margin, 400 if title else 0)
    title = _wrap(title or "", width - 2 * margin, TITLE)
    header = margin + _height([title], TITLE) + (gap // 2 if title else 0)
    tops = [header + _height(above, TEXT) + (gap // 3 if above else 0)]
    for r, row in enumerate(below):
        tops.append(tops[-1] + max(h + _height(row, TEXT), _height(left[r : r + 1], TEXT)) + gap)
    canvas = np.full((tops[-1] - gap + margin, width, 3), 255, np.uint8)
    texts = [(margin, margin, title, "left", TITLE)]
    texts += [(x0 + c * (w + gap) + w / 2, header, text, "center", TEXT) for c, text in enumerate(above)]
    texts += [
        (margin, y + max(0, h - _height([text], TEXT)) / 2, text, "left", TEXT)
        for y, text in zip(tops, left, strict=False)
    ]
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            x, y = x0 + c * (w + gap), tops[r]
            canvas[y - 1 : y + h + 1, x - 1 : x + w + 1] = 0xDD
            canvas[y : y + h, x : x + w] = image.repeat(scale, axis=0).repeat(scale, axis=1)
            texts.append((x + w / 2, y + h + gap / 3, below[r][c], "center", TEXT))
    return _painted(canvas, texts, alt_text)


def _painted(canvas: np.ndarray, texts, alt_text: str) -> Chart:
    """The canvas with texts (x, top, text, alignment, size); lines are set singly, to share one baseline."""
    height, width, _ = canvas.shape
    figure = Chart(width / DPI, height / DPI, alt_text)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(canvas, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    for x, top, text, align, size in texts:
        for i, line in enumerate(text.split("\n") if text else []):
            axes.text(
                x,
                top + (i + 0.78) * _pixels(LINE * size),
                line,
                color=INK,
                fontsize=size,
                ha=align,
                va="baseline",
                parse_math=False,
            )
    return figure


def _columns(records: Sequence[Mapping], x: str, y: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    if x not in X_LABELS:
        raise ValueError(f"x must be one of {', '.join(X_LABELS)}, not {x!r}")
    for key in (x, y):
        if any(key not in r for r in records):
            raise ValueError(f"a record of {name!r} has no {key!r}")
    return np.array([r[x] for r in records], float), np.array([r[y] for r in records], float)


def _running_median(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The centred median over 1/25 of the points, at no more than 2000 to 4000 of them."""
    n = len(ys)
    half = min(n // 50, 2000)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(ys, half, mode="reflect"), 2 * half + 1)
    step = max(1, n // 2000)
    return xs[::step], np.median(windows[::step], axis=-1)


def _ends(series, number: str) -> str:
    return ", ".join(f"{name} {number.format(ys[-1])}" for name, (_, ys) in series.items() if len(ys))


def _charts(alt_text: str, labels: Sequence[tuple[str, str]], title: str | None = None):
    """A figure with one plain panel for each (xlabel, ylabel)."""
    width = 6.4 if len(labels) == 1 else 9.6
    figure = Chart(width, 3.8, alt_text, layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for axes, (xlabel, ylabel) in zip(panels, labels, strict=True):
        _plain(axes, "y")
        axes.set_xlabel(xlabel, fontsize=TEXT + 1, color=INK)
        axes.set_ylabel(ylabel, fontsize=TEXT + 1, color=INK)
    if title:
        panels[0].set_title(
            _wrap(title, 0.8 * width * DPI, TITLE), loc="left", fontsize=TITLE, color=INK, parse_math=False
        )
    return figure, panels


def _lines(axes: Axes, series, marker: str | None = None):
    for i, (name, (xs, ys)) in enumerate(series.items()):
        if not np.isfinite(ys).any():
            raise ValueError(f"the line {name!r} has no finite value to plot")
        axes.plot(
            xs,
            ys,
            label=name,
            color=COLOURS[i % len(COLOURS)],
            ls=STYLES[i % len(STYLES)],
            lw=1.6,
            marker=marker or ("o" if len(xs) == 1 else None),
            ms=3.5,
        )


def _label_ends(axes: Axes):
    """Write each line's name in the right margin, as near the height of its last point as there is room."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    ends = [line.get_xydata()[np.isfinite(line.get_ydata())][-1] for line in lines]
    labels = []
    for line, end in zip(lines, ends, strict=True):
        leader = {
            "arrowstyle": "-",
            "lw": 0.5,
            "color": line.get_color(),
            "shrinkA": 1,
            "shrinkB": 3,
            "relpos": (0, 0.5),
        }
        labels.append(
            axes.annotate(
                line.get_label(),
                end,
                (1.03, 0.5),
                textcoords="axes fraction",
                va="center",
                fontsize=TEXT,
                color=_darker(line.get_color()),
                arrowprops=leader,
                parse_math=False,
                annotation_clip=False,
            )
        )
    axes.figure.draw_without_rendering()  # the layout decides how high the axes are
    heights = (axes.transData + axes.transAxes.inverted()).transform(ends)[:, 1]
    order = np.argsort(heights, kind="stable")
    places = _spread(heights[order], _pixels(LINE * TEXT) / axes.bbox.height)
    for i, place in zip(order, places, strict=True):
        labels[i].set_position((1.03, place))


def _spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Sorted heights moved apart to at least `gap`, kept in 0..1, with the smallest largest move.

    h_i + gap <= h_(i+1) says that z_i = h_i - i gap does not fall; the mean of the running maximum and of the
    running minimum from the right is the nearest such z.
    """
    steps = gap * np.arange(len(heights))
    z = heights - steps
    z = (np.maximum.accumulate(z) + np.minimum.accumulate(z[::-1])[::-1]) / 2
    return np.clip(z, 0, max(0, 1 - steps[-1])) + steps


def _darker(colour: str) -> tuple[float, ...]:
    """The line's colour dark enough for small letters on white."""
    return tuple(0.7 * int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
