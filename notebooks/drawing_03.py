"""Drawings for notebook 3: the kernel on an image, windows with padding and stride, patches as rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

from drawing_02 import MARGIN, Matrix, canvas, draw_matrix, write
from minidiff.plotting import COLOURS, FAINT, GREY, INK, STYLES, TEXT, Chart

CELL = 0.48


def sliding(image: np.ndarray, kernel: np.ndarray, places: Sequence[tuple[int, int]]) -> Chart:
    """The grey image (H, W) with the window at each place (its top left pixel), and beside it what is computed there."""
    kh, kw = kernel.shape
    rows, block, side = len(places), CELL * kw, 2.25
    step = CELL * kh + 0.42
    width = 2 * MARGIN + side + 0.4 + 3 * (block + 0.3) + 0.85
    height = 0.45 + rows * step
    sums = [
        round(float((image[i : i + kh, j : j + kw] * kernel).sum()), 2) + 0.0 for i, j in places
    ]
    chart, axes = canvas(
        width,
        height,
        "A kernel at three places of a photograph: pixels times weights, added up, give "
        + ", ".join(f"{s:.2f}" for s in sums),
    )
    top = (height - side) / 2
    pixel = side / len(image)
    axes.imshow(
        image,
        cmap="gray",
        vmin=-1,
        vmax=1,
        extent=(MARGIN, MARGIN + side, top + side, top),
        interpolation="nearest",
    )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    x0 = MARGIN + side + 0.4
    titles = ("the pixels under it", "the kernel", "products")
    for n, ((i, j), total) in enumerate(zip(places, sums, strict=True)):
        colour, letter = COLOURS[n + (n > 1)], "ABC"[n]
        place = (MARGIN + j * pixel, top + i * pixel)
        for edge, lw in (("white", 3.2), (colour, 1.8)):
            axes.add_patch(Rectangle(place, kw * pixel, kh * pixel, fill=False, ec=edge, lw=lw))
        write(
            axes,
            place[0] + kw * pixel + 0.1,
            place[1] - 0.08,
            letter,
            TEXT + 1,
            weight="bold",
            color=colour,
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )
        y, x = 0.4 + n * step, x0
        window = image[i : i + kh, j : j + kw]
        write(axes, x - 0.16, y + block / 2, letter, TEXT + 2, weight="bold", color=colour)
        for k, (values, sign) in enumerate(
            [(window, "×"), (kernel, "="), (window * kernel, "sum")]
        ):
            title = titles[k] if n == 0 else ""
            draw_matrix(
                axes,
                x,
                y,
                Matrix(title, values, number="{:.3g}" if k == 1 else "{:.2f}"),
                CELL,
                TEXT - 1,
            )
            x += block + 0.3
            write(axes, x - 0.15, y + block / 2, sign if k < 2 else "", TEXT + 2)
        write(
            axes,
            x - 0.2,
            y + block / 2,
            f"sum: {total:.2f}".replace("-", "−"),
            ha="left",
        )
    return chart


def windows(H: int, k: int, cases: Sequence[tuple[int, int]]) -> Chart:
    """For each (padding, stride) the image with its border of zeros, the first two windows, and every window's middle."""
    cell, gap = 0.24, 0.45
    sides = [(H + 2 * padding) * cell for padding, _ in cases]
    width, height = 2 * MARGIN + sum(sides) + gap * (len(cases) - 1), max(sides) + 0.62
    told = "; ".join(f"padding {p}, stride {s}" for p, s in cases)
    chart, axes = canvas(
        max(width, 6.4), height, f"Where a {k} by {k} kernel can stand: {told}."
    )
    x0 = MARGIN
    for (padding, stride), side in zip(cases, sides, strict=True):
        n = H + 2 * padding
        y0 = 0.28 + (max(sides) - side) / 2
        for i, j in np.ndindex(n, n):
            zero = not (padding <= i < n - padding and padding <= j < n - padding)
            axes.add_patch(
                Rectangle(
                    (x0 + j * cell, y0 + i * cell),
                    cell,
                    cell,
                    fc=FAINT if zero else "white",
                    ec=GREY,
                    lw=0.5,
                    hatch="////" if zero else None,
                )
            )
        starts = range(0, n - k + 1, stride)
        for i in starts:
            for j in starts:
                middle = (x0 + (j + k / 2) * cell, y0 + (i + k / 2) * cell)
                axes.plot(*middle, "o", color=INK, ms=4.5)
        for m, colour in zip((0, 1), (COLOURS[0], COLOURS[1]), strict=True):
            place = (x0 + starts[m] * cell, y0)
            axes.add_patch(
                Rectangle(
                    place, k * cell, k * cell, fill=False, ec=colour, lw=2.4, ls=STYLES[m]
                )
            )
        middle = x0 + side / 2
        write(axes, middle, 0.14, f"padding {padding}, stride {stride}")
        text = f"{H} × {H} → {len(starts)} × {len(starts)}"
        write(axes, middle, y0 + side + 0.18, text)
        x0 += side + gap
    return chart


def patches_as_rows(
    image: np.ndarray, columns: np.ndarray, kernel: np.ndarray, result: np.ndarray, marked: int
) -> Chart:
    """im2col on one image (H, W): its window number `marked`, the same numbers as a row, and the product."""
    cell = 0.33
    k, (h, w), n = len(kernel), image.shape, len(columns)
    i, j = divmod(marked, w - k + 1)
    under = np.zeros(image.shape, bool)
    under[i : i + k, j : j + k] = True
    row = np.zeros(columns.shape, bool)
    row[marked] = True
    out = np.zeros((n, 1), bool)
    out[marked] = True
    chart, axes = canvas(
        8.2,
        3.5,
        f"im2col: each {k} by {k} window of an image of {h} by {w} is a row of a matrix of {n} by {k * k}; "
        "times the kernel as a column it gives one output for each row.",
    )
    middle = 0.38 + k * k * cell / 2
    x = MARGIN
    top = middle - h * cell / 2
    draw_matrix(axes, x, top, Matrix("image", image, under), cell)
    x += w * cell + 0.55
    arrow = {"arrowstyle": "-|>", "mutation_scale": 12, "color": GREY, "lw": 1.2}
    axes.add_patch(FancyArrowPatch((x - 0.45, middle), (x - 0.08, middle), **arrow))
    draw_matrix(
        axes, x, middle - n * cell / 2, Matrix("one row for each window", columns, row), cell
    )
    x += k * k * cell + 0.3
    write(axes, x - 0.15, middle, "@", TEXT + 2)
    draw_matrix(
        axes, x, middle - k * k * cell / 2, Matrix("kernel", kernel.reshape(-1, 1)), cell
    )
    x += cell + 0.3
    write(axes, x - 0.15, middle, "=", TEXT + 2)
    draw_matrix(
        axes, x, middle - n * cell / 2, Matrix("outputs", result.reshape(-1, 1), out), cell
    )
    x += cell + 0.55
    axes.add_patch(FancyArrowPatch((x - 0.45, middle), (x - 0.08, middle), **arrow))
    shape = (h - k + 1, w - k + 1)
    place = middle - shape[0] * cell / 2
    draw_matrix(
        axes, x, place, Matrix("result", result.reshape(shape), out.reshape(shape)), cell
    )
    return chart


def reach(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Chart:
    """Maps (N, N) of how much each pixel counts for the middle output, dark is much, with a frame around what counts."""
    side, gap = 1.44, 0.22
    width, height = 2 * MARGIN + len(pictures) * (side + gap) - gap, side + 0.75
    chart, axes = canvas(
        width, height, "How far one output sees: " + "; ".join(captions).replace("\n", " ")
    )
    for n, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y, size = MARGIN + n * (side + gap), 0.12, len(picture)
        shown = np.sqrt(np.abs(picture) / np.abs(picture).max())
        axes.imshow(
            shown,
            cmap="Greys",
            vmin=0,
            vmax=1.15,
            extent=(x, x + side, y + side, y),
            interpolation="nearest",
        )
        axes.add_patch(Rectangle((x, y), side, side, fill=False, ec=GREY, lw=0.6))
        rows, cols = np.nonzero(picture)
        pixel = side / size
        corner = (x + cols.min() * pixel, y + rows.min() * pixel)
        axes.add_patch(
            Rectangle(
                corner,
                (np.ptp(cols) + 1) * pixel,
                (np.ptp(rows) + 1) * pixel,
                fill=False,
                ec=COLOURS[1],
                lw=1.6,
            )
        )
        write(axes, x + side / 2, y + side + 0.08, caption, va="top")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return chart
