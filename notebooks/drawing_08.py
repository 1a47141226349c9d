"""What notebook 8 watches and draws: the weights of cross-attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minidiff import ops, plotting
from minidiff.ops.attention import attention_scores
from minidiff.ops.softmax import softmax_forward


@contextlib.contextmanager
def watched_attention() -> Iterator[list[np.ndarray]]:
    """Inside the block every cross-attention also notes its weights (B, heads, positions, tokens) in the list."""
    seen: list[np.ndarray] = []
    attention = ops.attention

    def watching(q: Any, k: Any, v: Any, heads: int, **rest: Any) -> Any:
        if k.shape[1] != q.shape[1]:  # in self-attention there are as many keys as queries
            scale = 1 / np.sqrt(q.shape[-1] // heads)
            scores = attention_scores(q.data, k.data, heads, scale, None, False)
            hidden = np.where(rest["mask"], 0, -np.inf)[:, None, None, :]
            seen.append(softmax_forward(scores + hidden))
        return attention(q, k, v, heads, **rest)

    ops.attention = watching
    try:
        yield seen
    finally:
        ops.attention = attention


def word_maps(
    image: np.ndarray, maps: np.ndarray, words: Sequence[str], title: str
) -> plotting.Chart:
    """The image, then under each word its weights (words, h, w) laid over the image: bright where the word is looked at."""
    side = len(image) // maps.shape[1]
    light = maps.repeat(side, axis=1).repeat(side, axis=2)[..., None]
    light = light / light.max()
    # dark colours must not hide the light
    tiles = (0.3 * (image * 0.5 + 0.5) + 0.7 * light) * 2 - 1
    shares = [f"{word}\n{100 * m.mean():.0f}%" for word, m in zip(words, maps, strict=True)]
    return plotting.image_grid(
        np.concatenate([image[None], tiles]), ["picture", *shares], len(words) + 1, title=title
    )


def matrix(
    values: np.ndarray, names: Sequence[str], label: str, low: float = -1
) -> plotting.Chart:
    """A square matrix of similarities, from `low` to 1, as a heat map with the numbers' names on both sides."""
    side = 1.6 + 0.27 * len(names)
    chart = plotting.Chart(
        side + 1.4,
        side,
        f"Heat map of {label} between {', '.join(names)}.",
        layout="constrained",
    )
    axes = chart.subplots()
    shown = axes.imshow(values, cmap="cividis", vmin=low, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=plotting.TEXT)
    axes.set_yticks(range(len(names)), names, fontsize=plotting.TEXT)
    axes.spines[:].set_visible(False)
    bar = chart.colorbar(shown, ax=axes, shrink=0.8)
    bar.set_label(label, fontsize=plotting.TEXT)
    bar.ax.tick_params(labelsize=plotting.TEXT)
    return chart
