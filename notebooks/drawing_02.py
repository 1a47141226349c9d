"""Drawings for notebook 2, and the matrices of notebook 3: a graph of Tensors, matrices with their numbers.

Everything is placed in inches from the top left corner of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from minidiff.plotting import COLOURS, DPI, GREY, INK, TEXT, Chart, _width
from minidiff.tensor import Tensor, topological_order

MARKED = "#cfe5f3"  # a pale blue, light grey in print
MARGIN = 0.15


def canvas(width: float, height: float, alt_text: str) -> tuple[Chart, Axes]:
    """An empty picture of so many inches and the axes that cover it."""
    chart = Chart(round(width * DPI) / DPI, round(height * DPI) / DPI, alt_text)
    axes = chart.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    return chart, axes


def write(axes: Axes, x: float, y: float, text: str, size: float = TEXT, **style: Any) -> None:
    """Text centred at (x, y), unless told otherwise."""
    style = {"ha": "center", "va": "center", "color": INK, "parse_math": False, **style}
    axes.text(x, y, text, fontsize=size, **style)


# ---- matrices


@dataclass(frozen=True)
class Matrix:
    """Numbers in a grid with a title above; cells where `marked` is true are shaded."""

    title: str
    values: Any
    marked: Any = None
    number: str = "{:.3g}"
    below: str = ""


def draw_matrix(
    axes: Axes, x: float, y: float, m: Matrix, cell: float, size: float = TEXT
) -> None:
    """The matrix with its top left corner at (x, y)."""
    values = np.atleast_2d(m.values)
    marked = np.zeros(values.shape, bool) if m.marked is None else np.atleast_2d(m.marked)
    for (i, j), value in np.ndenumerate(values):
        face = MARKED if marked[i, j] else "white"
        axes.add_patch(
            Rectangle((x + j * cell, y + i * cell), cell, cell, fc=face, ec=GREY, lw=0.6)
        )
        text = m.number.format(value)
        if not text.strip("-0."):
            text = text.lstrip("-")  # no minus before a zero
        text = text.replace("-", "−")
        write(axes, x + (j + 0.5) * cell, y + (i + 0.5) * cell, text, size)
    middle = x + values.shape[1] * cell / 2
    write(axes, middle, y - 0.07, m.title, va="bottom")
    write(axes, middle, y + values.shape[0] * cell + 0.06, m.below, va="top")


def matrices(parts: Sequence[Matrix | str], alt_text: str, cell: float = 0.36) -> Chart:
    """Matrices in a row; a plain string is a symbol that stands between two of them."""

    def width_of(part: Matrix | str) -> float:
        if isinstance(part, str):
            return _width(part, TEXT + 2) / DPI
        texts = max(_width(part.title, TEXT), _width(part.below, TEXT)) / DPI
        return max(np.atleast_2d(part.values).shape[1] * cell, texts)

    shown = [p for p in parts if isinstance(p, Matrix)]
    above = 0.12 + 0.17 * max(p.title.count("\n") + 1 for p in shown)
    below = 0.12 + max(0.17 * (p.below.count("\n") + 1) if p.below else 0 for p in shown)
    rows = max(len(np.atleast_2d(p.values)) for p in shown)
    widths, gap = [width_of(p) for p in parts], 0.2
    chart, axes = canvas(
        2 * MARGIN + sum(widths) + gap * (len(parts) - 1), above + rows * cell + below, alt_text
    )
    x, middle = MARGIN, above + rows * cell / 2
    for part, width in zip(parts, widths, strict=True):
        if isinstance(part, str):
            write(axes, x + width / 2, middle, part, TEXT + 2)
        else:
            h, w = np.atleast_2d(part.values).shape
            draw_matrix(axes, x + (width - w * cell) / 2, middle - h * cell / 2, part, cell)
        x += width + gap
    return chart


# ---- the graph

BOX, COLUMN, ROW = (1.3, 0.5), 1.75, 1.0


def graph(
    root: Tensor,
    names: Mapping[str, Tensor],
    gradients: Mapping[str, float] | None = None,
    order: bool = True,
) -> Chart:
    """What `root` remembers: a box a Tensor, an arrow from each input to what was made of it.

    order: number the boxes as backward visits them. gradients: written under the boxes, by name.
    """
    tensors = _with_constants(root)
    name = {id(t): n for n, t in names.items()}
    columns = _columns(tensors)
    visits = {id(t): i + 1 for i, t in enumerate(reversed(topological_order(root)))}
    by_column: dict[int, list[Tensor]] = {}
    for t in tensors:
        by_column.setdefault(columns[id(t)], []).append(t)
    tallest = max(map(len, by_column.values()))
    skips = [
        (x, t, k)
        for t in tensors
        for k, x in enumerate(_inputs(t))
        if tallest == 1 and columns[id(t)] - columns[id(x)] > 1
    ]
    above = 0.4 if any(k == 0 for *_, k in skips) else 0.0
    below = max(0.2 if gradients else 0.0, 0.4 if any(k > 0 for *_, k in skips) else 0.0)
    width = 2 * MARGIN + (len(by_column) - 1) * COLUMN + BOX[0]
    height = 2 * MARGIN + (tallest - 1) * ROW + BOX[1] + above + below
    steps = "; ".join(
        f"{name.get(id(t), 'a number')} from {t.node.name}" for t in tensors if t.node
    )
    chart, axes = canvas(width, height, f"The graph of {name[id(root)]}: {steps}.")
    places = {}
    for column, stack in by_column.items():
        top = MARGIN + above + (tallest - len(stack)) * ROW / 2
        for i, t in enumerate(stack):
            places[id(t)] = (MARGIN + column * COLUMN, top + i * ROW)
    for t in tensors:
        for k, x in enumerate(_inputs(t)):
            _arrow(axes, places[id(x)], places[id(t)], k, (x, t, k) in skips, len(_inputs(t)))
    for t in tensors:
        label = name.get(id(t))
        value = f"{t.item():.4g}".replace("-", "−")
        told = f"{label} = {value}" if label else value
        made = (
            f"made by {t.node.name}" if t.node else ("leaf" if t.requires_grad else "constant")
        )
        _box(axes, places[id(t)], told, made, dashed=not t.requires_grad)
        if order and id(t) in visits:
            x, y = places[id(t)]
            x += 0.16  # where no arrow arrives
            axes.add_patch(Circle((x, y), 0.125, fc=INK, ec="white", zorder=4))
            write(axes, x, y, str(visits[id(t)]), TEXT, color="white", zorder=5)
        if gradients and label in gradients:
            x, y = places[id(t)]
            text = f"gradient {gradients[label]:.4g}".replace("-", "−")
            middle = x + BOX[0] / 2
            write(axes, middle, y + BOX[1] + 0.12, text, color=COLOURS[1], weight="bold")
    return chart


def _inputs(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.node.inputs if tensor.node else ()


def _with_constants(root: Tensor) -> list[Tensor]:
    """Inputs before results, as in `topological_order`, with what needs no gradient."""
    found: list[Tensor] = []
    for t in topological_order(root):
        found += [x for x in _inputs(t) if not any(x is f for f in found)]
        found += [] if any(t is f for f in found) else [t]
    return found


def _columns(tensors: Sequence[Tensor]) -> dict[int, int]:
    """A result stands right of all its inputs; a leaf right before what first uses it."""
    column: dict[int, int] = {}
    for t in tensors:
        column[id(t)] = max((column.get(id(x), 0) + 1 for x in _inputs(t)), default=0)
    for t in tensors:
        if t.node is None:
            users = [column[id(u)] for u in tensors if any(t is x for x in _inputs(u))]
            column[id(t)] = min(users) - 1
    return column


def _box(
    axes: Axes, place: tuple[float, float], text: str, small: str, dashed: bool = False
) -> None:
    style = {
        "fc": "white",
        "ec": GREY if dashed else INK,
        "lw": 1.1,
        "ls": "--" if dashed else "-",
    }
    axes.add_patch(
        FancyBboxPatch(
            place, *BOX, boxstyle="round,pad=0,rounding_size=0.07", zorder=2, **style
        )
    )
    x, y = place[0] + BOX[0] / 2, place[1] + BOX[1] / 2
    write(axes, x, y - 0.09, text, TEXT + 1, zorder=3)
    write(axes, x, y + 0.11, small, TEXT - 1, color=GREY, zorder=3)


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    number: int,
    skip: bool,
    count: int,
) -> None:
    """From the right side of one box to the left side of another; around what stands between."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": GREY, "lw": 1.2, "zorder": 1}
    if skip:
        above = number == 0
        y = 0.0 if above else BOX[1]
        tail, head = (start[0] + 1.0, start[1] + y), (end[0] + 0.5, end[1] + y)
        bent = f"arc3,rad={-0.25 if above else 0.25}"
        axes.add_patch(FancyArrowPatch(tail, head, connectionstyle=bent, **style))
        return
    spread = (number - (count - 1) / 2) * 0.16
    tail = (start[0] + BOX[0], start[1] + BOX[1] / 2)
    head = (end[0], end[1] + BOX[1] / 2 + spread)
    axes.add_patch(FancyArrowPatch(tail, head, shrinkA=0, shrinkB=0, **style))
