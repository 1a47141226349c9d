"""Checkers for notebook 8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from course import Verdict, close, unanswered


def other_convention(scale_of: Callable[[float], Any]) -> Verdict:
    """8.1: the s of (1 + s) cond - s uncond that is our w."""
    if verdict := unanswered(scale_of(3.0)):
        return verdict
    w = np.array([0.0, 1.0, 3.0, 7.5])
    got = np.array([scale_of(v) for v in w], float)
    if close(got, w - 1):
        return Verdict(
            True,
            "No guidance is w = 1 in the one and s = 0 in the other: a common source of mistakes.",
        )
    if close(got, w):
        return Verdict(False, "Compare the factors of eps_cond: it is w here, and 1 + s there.")
    if close(got, w + 1):
        return Verdict(False, "The wrong way round: 1 + s = w.")
    if close(got, 1 - w):
        return Verdict(
            False, "The sign is wrong: the factor of eps_uncond is 1 - w here and -s there."
        )
    return Verdict(
        False, f"For w = 1, where guidance does nothing, s must be 0; you give {got[1]:g}."
    )


def attention_maps(maps_by_word: Callable[[np.ndarray, np.ndarray], Any]) -> Verdict:
    """8.2: softmax over the tokens of q k^T / sqrt(d), words first."""
    rng = np.random.default_rng(3)
    q, k = 3 * rng.standard_normal((16, 8)), rng.standard_normal((5, 8))
    got = maps_by_word(q, k)
    if verdict := unanswered(got):
        return verdict
    got = np.asarray(got, float)

    def weights(scores: np.ndarray, axis: int) -> np.ndarray:
        e = np.exp(scores - scores.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    scores = q @ k.T / np.sqrt(8)
    right = weights(scores, 1)
    if close(got, right.T):
        return Verdict(
            True, "Each column sums to 1: a position divides its attention among the words."
        )
    if got.shape == right.shape and close(got, right):
        return Verdict(
            False,
            "These are the weights with positions first; a map of each word needs them transposed.",
        )
    if got.shape != (5, 16):
        return Verdict(
            False, f"The result must be (tokens, positions) = (5, 16), not {got.shape}."
        )
    if close(got, weights(scores, 0).T):
        return Verdict(
            False,
            "The softmax runs over the wrong axis: it is each *position* whose weights sum to 1, over words.",
        )
    if close(got, weights(q @ k.T, 1).T):
        return Verdict(False, "The root of d is missing: without it the weights are too sharp.")
    if close(got, scores.T):
        return Verdict(
            False, "Those are the scores; the softmax that turns them into weights is missing."
        )
    if not np.isfinite(got).all():
        return Verdict(
            False,
            "There are NaN or infinite numbers: subtract each row's maximum before the exponential.",
        )
    return Verdict(
        False,
        f"Each position's weights must sum to 1 over the words; yours sum to {got[:, 0].sum():.3g}.",
    )


def cost(with_guidance: Any, without: Any) -> Verdict:
    """8.3: images through the network in 50 steps for 4 captions."""
    for got in (with_guidance, without):
        if verdict := unanswered(got):
            return verdict
    if (with_guidance, without) == (400, 200):
        return Verdict(
            True,
            "Guidance doubles the cost; at w = 1 the unconditional half would have the factor 0.",
        )
    if (with_guidance, without) == (200, 400):
        return Verdict(False, "The two are swapped.")
    if without == 50 or with_guidance == 100:
        return Verdict(
            False, "That counts calls; each call holds the images of all 4 captions."
        )
    if with_guidance == 200:
        return Verdict(
            False, "With guidance every image is predicted twice, with its caption and without."
        )
    if without == 400:
        return Verdict(
            False,
            "At w = 1 the unconditional prediction has the factor 1 - w = 0: nobody needs it.",
        )
    return Verdict(
        False,
        "steps x captions x predictions for each image: how many predictions are there at w = 7.5, and at 1?",
    )
