"""What notebook 9 counts and draws: shapes and multiply-adds of networks, latents as pictures."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

import drawing_06
from minidiff import ops
from minidiff.models import VAE
from minidiff.plotting import COLOURS, GREY, INK, TEXT, Chart, _tiles, to_uint8
from minidiff.tensor import Tensor, as_tensor, no_grad

__all__ = ["counting", "hourglass", "maps", "panels", "stages", "strips"]


# ---- counted, not computed


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Inside the block no network computes anything: it hands on shapes, and its multiply-adds are noted by kind.

    So a network may be far too large to run, and its parameters need no values. Every array is one zero, seen in the
    shape that it would have.
    """
    counts: Counter[str] = Counter()

    def conv2d(
        x: Any, weight: Any, bias: Any = None, stride: int = 1, padding: Any = 0,
        beside: Any = None, upsample: int = 1, **around: Any,
    ) -> Tensor:  # fmt: skip
        B, H, W, C = as_tensor(x).shape
        kh, kw, C_in, C_out = weight.wanted_shape
        C += 0 if beside is None else beside.shape[-1]
        assert C == C_in, f"{C} channels for a kernel of {C_in}"
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        H, W = (
            (side * upsample + sum(around) - k) // stride + 1
            for side, around, k in zip((H, W), padding, (kh, kw), strict=True)
        )
        counts["convolutions"] += B * H * W * kh * kw * C_in * C_out
        return _zeros(B, H, W, C_out)

    def linear(
        x: Any,
        weight: Any,
        bias: Any = None,
        residual: Any = None,
        activation: str | None = None,
    ) -> Tensor:
        (*rows, _), (D_in, D_out) = as_tensor(x).shape, weight.wanted_shape
        counts["linear layers"] += math.prod(rows) * D_in * D_out
        return _zeros(*rows, D_out // 2 if activation == "geglu" else D_out)

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Tensor:
        (B, L_q, D), (_, L_k, D_v) = q.shape, v.shape
        counts["attention"] += B * L_q * L_k * (D + D_v)
        return _zeros(B, L_q, D_v)

    def group_norm(x: Any, *_: Any, beside: Any = None, **__: Any) -> Tensor:
        C = 0 if beside is None else beside.shape[-1]
        return _zeros(*x.shape[:-1], x.shape[-1] + C)

    def alike(x: Any, *_: Any, **__: Any) -> Tensor:
        return _zeros(*x.shape)

    stand_ins = {
        "conv2d": conv2d, "linear": linear, "attention": attention, "group_norm": group_norm,
        "layer_norm": alike, "silu": alike,
    }  # fmt: skip
    real = {name: getattr(ops, name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            setattr(ops, name, stand_in)
        with no_grad():
            yield counts
    finally:
        for name, op in real.items():
            setattr(ops, name, op)


def _zeros(*shape: int) -> Tensor:
    return Tensor(np.broadcast_to(np.float32(0), shape))


# ---- charts


def panels(
    charts: Mapping[str, drawing_06.Lines],
    xlabels: str | Sequence[str],
    *rest: Any,
    **more: Any,
) -> Chart:
    """`panels` of notebook 6, where each panel may have a label of its own below."""
    labels = [xlabels] * len(charts) if isinstance(xlabels, str) else list(xlabels)
    chart = drawing_06.panels(charts, labels[0], *rest, **more)
    for axes, label in zip(chart.axes, labels, strict=True):
        axes.set_xlabel(label, fontsize=TEXT, color=INK)
    return chart


# ---- the network's shapes


def stages(vae: VAE, images: np.ndarray) -> list[tuple[str, tuple[int, ...]]]:
    """(what, shape) of the images, of every layer's result where it has another shape, and of z in the middle."""
    found = [("image", images.shape)]

    def through(layers: Any, x: Tensor) -> Tensor:
        for layer in layers:
            before, x = x.shape, layer(x)
            if x.shape != before:
                found.append((type(layer).__name__, x.shape))
        return x

    with no_grad():
        moments = through([*vae.encoder.layers(), vae.quant_conv], Tensor(images))
        z = Tensor(moments.data[..., : moments.shape[-1] // 2])
        found[-1] = ("mean, log-variance", moments.shape)
        found.append(("z", z.shape))
        through([vae.post_quant_conv, *vae.decoder.layers()], z)
    found[-1] = ("image", found[-1][1])
    return found


def hourglass(found: Sequence[tuple[str, tuple[int, ...]]]) -> Chart:
    """Each of the stages as a box, as high as the grid and, by the root, as wide as there are channels."""
    told = "; ".join(f"{what} {' × '.join(map(str, shape[1:]))}" for what, shape in found)
    chart = Chart(8.0, 3.0, f"Shapes through the VAE, from the image to z and back: {told}.")
    axes = chart.add_axes((0.01, 0, 0.98, 1))
    axes.set_axis_off()
    tallest, gap, x = max(shape[1] for _, shape in found), 5.0, 0.0
    for i, (what, (_, H, W, C)) in enumerate(found):
        wide, high = 1.3 * math.sqrt(C), H
        colour = COLOURS[1] if what == "z" else COLOURS[2] if "image" in what else COLOURS[0]
        if i:
            axes.annotate(
                "", (x - 0.4, 0), (x - gap + 0.4, 0),
                arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.0, "shrinkA": 0, "shrinkB": 0,
                            "mutation_scale": 7},
            )  # fmt: skip
        axes.add_patch(Rectangle((x, -high / 2), wide, high, fc=colour, ec="white", alpha=0.85))
        axes.text(
            x + wide / 2, high / 2 + 1.2, f"{H}×{W}\n×{C}", ha="center", va="bottom", fontsize=TEXT,
            color=INK, linespacing=1.1,
        )  # fmt: skip
        if what in ("image", "z", "mean, log-variance"):
            label = what.replace(", ", ",\n")
            axes.text(
                x + wide / 2, -high / 2 - 1.2, label, ha="center", va="top", fontsize=TEXT, color=INK
            )  # fmt: skip
        x += wide + gap
    axes.set_xlim(-3, x - gap + 3)
    axes.set_ylim(-tallest / 2 - 5, tallest / 2 + 9)
    return chart


# ---- pictures


def strips(
    rows: Mapping[str, np.ndarray],
    above: Sequence[str] = (),
    below: Mapping[str, Sequence[str]] | None = None,
) -> Chart:
    """Rows of images (B, H, W, 3), {what stands left of the row: images}; texts above the columns, and under a row."""
    told = f"Rows of pictures: {'; '.join(rows)}"
    columns = f"; columns: {', '.join(above)}" if above else ""
    texts = [list((below or {}).get(name, [""] * len(images))) for name, images in rows.items()]
    return _tiles(
        [to_uint8(np.asarray(images)) for images in rows.values()],
        texts, f"{told}{columns}.".replace("\n", " "), left=list(rows), above=list(above),
    )  # fmt: skip


def maps(
    pictures: np.ndarray, grids: Mapping[str, np.ndarray], paid: np.ndarray, unit: str
) -> Chart:
    """A row for each picture: the picture, its grids {name: (B, h, w)} as colours around 0, and `paid` (B, h, w)."""
    B, n = len(pictures), len(grids)
    side, gap, top, bottom = 1.2, 0.12, 0.32, 0.62  # inches
    width, height = gap + (n + 2) * (side + gap), top + B * (side + gap) + bottom
    chart = Chart(
        width, height,
        f"{B} pictures, each with {n} maps of its latents ({', '.join(grids)}) and a map of {unit}.",
    )  # fmt: skip

    def place(column: int, row: float, across: float, down: float) -> Any:
        x, y = gap + column * (side + gap), top + row * (side + gap)
        return chart.add_axes(
            (x / width, 1 - (y + down) / height, across / width, down / height)
        )

    limit = max(np.abs(grid).max() for grid in grids.values())
    signed = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
    positive = {
        "cmap": "cividis",
        "vmin": 0,
        "vmax": np.percentile(paid, 98),
    }  # a few are far above
    for b in range(B):
        columns = [(to_uint8(pictures)[b], {})]
        columns += [(grid[b], signed) for grid in grids.values()] + [(paid[b], positive)]
        for c, (values, colours) in enumerate(columns):
            axes = place(c, b, side, side)
            shown = axes.imshow(values, interpolation="nearest", **colours)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(GREY)
            axes.spines[:].set_linewidth(0.5)
            if b == 0:
                axes.set_title(["picture", *grids, unit][c], fontsize=TEXT, color=INK)
            if b == B - 1 and c in (n, n + 1):
                first, across = (1, n * (side + gap) - gap) if c == n else (c, side)
                bar = chart.colorbar(
                    shown,
                    cax=place(first, B + 0.06, across, 0.12),
                    orientation="horizontal",
                    extend="max" if c > n else "neither",
                )
                bar.ax.tick_params(labelsize=TEXT - 1, colors=GREY, labelcolor=INK)
                bar.outline.set_visible(False)
    return chart
