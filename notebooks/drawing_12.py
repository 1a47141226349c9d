"""What notebook 12 trains on in a fresh clone, crops of a photograph in files of every kind; and the committed runs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw

from minidiff.plotting import COLOURS, FAINT, INK, TEXT, Chart

PARTS = {
    "the_cap": (140, 15, 230, 165),
    "the_face": (160, 135, 220, 195),
    "the_flag": (0, 0, 150, 330),
    "the_ribbons": (310, 475, 160, 65),
}
"""Regions of the photograph: left, top, width, height."""


def hopper() -> Image.Image:
    """Commodore Grace Hopper, by the US Navy, in the public domain: 512 wide, 600 high. Matplotlib ships it."""
    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return image.convert("RGB")


def write_crops(folder: Path, each: int = 60, seed: int = 12) -> None:
    """A subfolder for every part of the photograph, with crops of it as JPEG files: here and there, nearer and farther."""
    if folder.exists():
        return
    photo, rng = hopper(), np.random.default_rng(seed)
    for name, (left, top, width, height) in PARTS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            side = rng.uniform(0.75, 1.1) * min(max(width, height), 160)
            x = left + rng.uniform(0, 1) * (width - side)
            y = top + rng.uniform(0, 1) * (height - side)
            x, y = np.clip([x, y], 0, [photo.width - side, photo.height - side])
            crop = photo.resize((96, 96), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
            crop.save(folder / name / f"{i:03}.jpg", quality=92)


def write_kinds(folder: Path) -> list[Path]:
    """The same photograph in files as people have them."""
    folder.mkdir(parents=True, exist_ok=True)
    photo = hopper().resize((256, 300))
    upright = Image.Exif()
    upright[0x0112] = 6  # the camera was held on its side
    hole = Image.new("L", photo.size, 255)
    ImageDraw.Draw(hole).ellipse((-40, -40, 60, 60), fill=0)
    see_through = photo.copy()
    see_through.putalpha(hole)
    grey = np.asarray(photo.convert("L"), np.uint16) * 257
    photo.save(folder / "colour.jpg")
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=upright)
    photo.convert("CMYK").save(folder / "print.jpg")
    photo.quantize(64).save(folder / "palette.png")
    see_through.save(folder / "transparent.png")
    Image.fromarray(grey).save(folder / "grey16.png")
    return [
        folder / name
        for name in (
            "colour.jpg", "turned.jpg", "print.jpg", "palette.png", "transparent.png", "grey16.png",
        )
    ]  # fmt: skip


def visits_drawn(epochs: Sequence[np.ndarray], mirrored: Sequence[np.ndarray]) -> Chart:
    """One row an epoch: the pictures' numbers in the order in which they are visited; orange ones are mirrored."""
    n = len(epochs[0])
    figure = Chart(
        8.0,
        0.5 + 0.42 * len(epochs),
        f"The order of {n} pictures in {len(epochs)} epochs.",
        layout="constrained",
    )
    axes = figure.subplots()
    for row, (order, flips) in enumerate(zip(epochs, mirrored, strict=True)):
        for place, (number, flip) in enumerate(zip(order, flips, strict=True)):
            axes.text(
                place,
                row,
                str(number),
                ha="center",
                va="center",
                fontsize=TEXT,
                color="white" if not flip else INK,
                bbox={
                    "boxstyle": "square,pad=0.25",
                    "facecolor": COLOURS[0] if not flip else COLOURS[5],
                    "edgecolor": "none",
                },
            )
    axes.set(xlim=(-0.7, n - 0.3), ylim=(len(epochs) - 0.4, -0.6))
    axes.set_yticks(range(len(epochs)), [f"epoch {i}" for i in range(len(epochs))])
    axes.set_xticks([])
    axes.set_xlabel("visits, one after the other", fontsize=TEXT + 1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, labelsize=TEXT)
    return figure


class Committed:
    """Photographs of benchmarks/results, with the sentence about themselves that is in the file.

    They are shown as a JPEG, and no larger than the page: as PNG they would make a large notebook.
    """

    def __init__(self, path: Path):
        with Image.open(path) as image:
            self.alt_text = image.info.get("Description", path.stem)
            width = min(960, image.width * 96 // 160)
            self.size = width, width * image.height // image.width
            data = io.BytesIO()
            shown = image.convert("RGB").resize(self.size, Image.Resampling.LANCZOS)
            shown.save(data, "jpeg", quality=80, optimize=True)
        self.data = data.getvalue()

    def __repr__(self) -> str:
        return self.alt_text

    def _repr_jpeg_(self) -> tuple[bytes, dict[str, Any]]:
        width, height = self.size
        return self.data, {"width": width, "height": height, "alt": self.alt_text}


def committed_runs(root: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """By preset, the record of its first committed run, and the first part of the names of that run's pictures."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for path in sorted((root / "benchmarks" / "results").glob("images_*.json")):
        preset = path.stem.removeprefix("images_").split("-")[0]
        found.setdefault(preset, (json.loads(path.read_text()), str(path.with_suffix(""))))
    return found
