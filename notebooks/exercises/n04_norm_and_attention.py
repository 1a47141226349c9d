"""Checkers for notebook 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from course import Verdict, called, close, unanswered

State = tuple[np.ndarray, np.ndarray, np.ndarray]


def safe(answer: Callable[[np.ndarray], Any]) -> Verdict:
    """4.1: a softmax over the last axis that does not overflow."""
    x = np.random.default_rng(1).standard_normal((3, 3))
    got = _called(answer, x.copy())
    if isinstance(got, Verdict):
        return got
    e = np.exp(x)
    if got.shape != x.shape:
        return Verdict(
            False,
            f"For scores of shape {x.shape} you give {got.shape}; the weights have the shape of the scores. Without "
            "keepdims=True a sum loses its axis.",
        )
    if close(got, e / e.sum(axis=0, keepdims=True)):
        return Verdict(
            False,
            "The columns add up to 1, the rows do not: each query (a row) shares its weight among the keys.",
        )
    if close(got, e / e.sum()):
        return Verdict(
            False, "All numbers together add up to 1; every row must do so by itself."
        )
    if close(got, e / e.sum(axis=-1)):
        return Verdict(
            False,
            "Row i is divided by another row's sum: without keepdims=True the sums (3,) line up with the columns.",
        )
    if not np.isfinite(got).all():
        return Verdict(False, "NaN or infinity appears even for scores of size 1.")
    sums = got.sum(axis=-1)
    if not close(sums, np.ones(len(x))):
        return Verdict(
            False, f"The rows add up to {np.array2string(sums, precision=3)}, not to 1."
        )
    if not close(got, e / e.sum(axis=-1, keepdims=True)):
        return Verdict(
            False, "The rows add up to 1, but the weights are not in the ratio of e^score."
        )
    large = x * 10 + np.array([[1000.0], [0.0], [-1000.0]])
    with np.errstate(all="ignore"):
        got = _called(answer, large.copy())
    if isinstance(got, Verdict):
        return got
    if not np.isfinite(got).all():
        row = int(np.argmin(np.isfinite(got).all(axis=-1)))
        why = (
            "e^1000 is more than a float can hold"
            if row == 0
            else "all its exponentials became 0, and 0 / 0 is NaN; is the maximum taken for each row?"
        )
        return Verdict(
            False, f"Right for small scores. With scores near {large[row].mean():.0f} {why}."
        )
    shifted = np.exp(large - large.max(axis=-1, keepdims=True))
    if close(got, shifted / shifted.sum(axis=-1, keepdims=True)):
        return Verdict(
            True,
            "The largest exponent is 0 now, so nothing overflows, and at least one exponential is 1, so the sum is "
            "never 0. What is taken off every score of a row cancels in the quotient.",
        )
    return Verdict(
        False,
        "Right for small scores; for large ones the numbers are finite but wrong. Clipping the scores changes their "
        "differences; taking one number off a whole row does not.",
    )


def merging(merge: Callable[[State, State], Any]) -> Verdict:
    """4.2: (m, l, o) of all keys from those of two halves."""
    scores = np.array([[1.0, 3.0, 0.5, 2.0], [4.0, 0.0, 6.0, 5.0], [9.0, 8.0, 1.0, 2.0]])
    v = np.random.default_rng(2).standard_normal((4, 2))
    a, b = _state(scores[:, :2], v[:2]), _state(scores[:, 2:], v[2:])
    m, total, o = _state(scores, v)
    try:
        got = merge(tuple(x.copy() for x in a), tuple(x.copy() for x in b))
    except Exception as e:
        return _raised(e)
    if verdict := unanswered(got):
        return verdict
    if isinstance(got, tuple | list) and any(x is ... or x is None for x in got):
        return unanswered(...) or Verdict(False, "")
    try:
        gm, gl, go = (np.asarray(x, float) for x in got)
    except (TypeError, ValueError):
        return Verdict(False, "Return three arrays, (m, l, o).")
    for name, x, wanted in (("m", gm, m), ("l", gl, total), ("o", go, o)):
        if x.shape != wanted.shape:
            return Verdict(False, f"{name} has shape {x.shape}; wanted {wanted.shape}.")
        if not np.isfinite(x).all():
            return Verdict(False, f"{name} holds NaN or infinity.")
    (ma, la, oa), (mb, lb, ob) = a, b
    if not close(gm, m):
        if close(gm, ma + mb):
            return Verdict(
                False, "m is a maximum, not a sum: what is the largest of all the scores?"
            )
        return Verdict(
            False,
            "m is wrong: it must be the largest score of either half, query by query (np.maximum).",
        )
    if not close(gl, total):
        if close(gl, la + lb):
            return Verdict(
                False,
                "The two sums l were made with different maxima taken off; bring both to the new m before adding.",
            )
        if close(gl, la * np.exp(m - ma) + lb * np.exp(m - mb)):
            return Verdict(
                False,
                "The factor of l is upside down: from e^(s - m_old) to e^(s - m_new) the exponent *falls* by "
                "m_new - m_old.",
            )
        if close(gl, la * np.exp(ma - m) + lb):
            return Verdict(
                False,
                "Only the first half's l is rescaled; the second half's m may be the smaller one too.",
            )
        if close(gl, la + lb * np.exp(mb - m)):
            return Verdict(
                False,
                "Only the second half's l is rescaled; the first half's m may be the smaller one too.",
            )
        return Verdict(
            False,
            "m is right, l is not: by what must a sum of e^(s - m_old) be multiplied to hold e^(s - m_new)?",
        )
    if close(go, o):
        return Verdict(
            True,
            "So the keys can be split among blocks, threads or machines, in any order: the three numbers are all "
            "that must travel.",
        )
    if close(go, oa + ob):
        return Verdict(
            False,
            "m and l are right; o is a sum over e^(s - m) too and needs the same factors as l.",
        )
    if close(go, o / total):
        return Verdict(
            False,
            "o is divided by l already: keep it a plain sum, and divide once at the very end.",
        )
    return Verdict(False, "m and l are right, o is not: it takes the same factors as l.")


def hiding(hide: Callable[[np.ndarray, np.ndarray], Any]) -> Verdict:
    """4.3: scores (Lq, Lk) in which the masked keys get weight 0."""
    scores = np.array([[2.0, -1.0, 0.5, 3.0], [-2.0, 1.0, -4.0, 0.0]])
    mask = np.array([True, True, False, False])
    with np.errstate(all="ignore"):
        got = _called(hide, scores.copy(), mask.copy())
    if isinstance(got, Verdict):
        return got
    if got.shape != scores.shape:
        return Verdict(
            False,
            f"You give shape {got.shape}; the scores keep their shape {scores.shape}: hidden keys stay in their place.",
        )
    if np.isposinf(got).any():
        return Verdict(
            False,
            "A score became +infinity: -inf times a negative score. Choose with np.where in place of multiplying.",
        )
    if np.isnan(got).any():
        return Verdict(
            False,
            "There is NaN among the scores: infinity times 0 is not a number. Choose with np.where in place of multiplying.",
        )
    weights = _softmax(got)
    right = _softmax(np.where(mask, scores, -np.inf))
    if close(weights, right, 1e-12):
        return Verdict(
            True,
            "e^(-inf) is exactly 0, so the words' weights add up to 1 as if the padding were not there.",
        )
    if close(got, scores * mask):
        return Verdict(
            False,
            "A score of 0 does not hide a key: e^0 = 1, more than a key with a negative score gets. Which score has e^score = 0?",
        )
    if close(weights, _softmax(np.where(mask, -np.inf, scores)), 1e-12):
        return Verdict(
            False, "It is the other way round: True marks the words that may be seen."
        )
    if close(got, scores):
        return Verdict(False, "The scores are as they were; nothing is hidden.")
    if close(weights, _softmax(scores) * mask, 1e-12) or close(got, _softmax(scores) * mask):
        return Verdict(
            False,
            "Those are weights with some set to 0: the rest no longer adds up to 1. Change the scores, before the softmax.",
        )
    hidden = weights[:, ~mask].sum(axis=1).max()
    if hidden > 0:
        return Verdict(
            False,
            f"Hidden keys still get up to {hidden:.2g} of a query's weight; it must be exactly 0.",
        )
    return Verdict(
        False, "The padding is hidden, but the scores of the words have changed too."
    )


def _called(answer: Callable[..., Any], *inputs: np.ndarray) -> Any:
    """The answer as an array, or the verdict on one that cannot be."""
    got = called(answer, *inputs)
    if isinstance(got, Verdict):
        return got
    try:
        return np.asarray(got, np.float64)
    except (TypeError, ValueError):
        return Verdict(False, f"An array is wanted, not {type(got).__name__}.")


def _raised(e: Exception) -> Verdict:
    return Verdict(False, f"Your code raises {type(e).__name__}: {e}")


def _softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)


def _state(scores: np.ndarray, v: np.ndarray) -> State:
    m = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - m)
    return m, p.sum(axis=-1, keepdims=True), p @ v
