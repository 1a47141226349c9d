"""Checkers for notebook 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from course import Verdict, close, unanswered
from minidiff.schedule import Schedule


def one_step(noisier: Callable[[np.ndarray, float, np.ndarray], np.ndarray]) -> Verdict:
    """1.1: x_t from x_{t-1}, beta and eps."""
    x, eps = np.random.default_rng(1).standard_normal((2, 5, 3))
    beta = 0.36
    got = noisier(x, beta, eps)
    if verdict := unanswered(got):
        return verdict
    if close(got, 0.8 * x + 0.6 * eps):
        return Verdict(
            True, "The variance stays 1: the image keeps 1 - beta of it, the noise brings beta."
        )
    for wrong, told in {
        "You shrink the image by 1 - beta; its *variance* must shrink by that, so the image by the root.": (
            (1 - beta) * x + 0.6 * eps
        ),
        "beta is the noise's variance; multiply eps by its standard deviation, the root.": 0.8
        * x
        + beta * eps,
        "Both factors lack their root: beta is a variance.": (1 - beta) * x + beta * eps,
        "The image is not shrunk: the numbers would grow from step to step.": x + 0.6 * eps,
        "Image and noise have each other's factor.": 0.6 * x + 0.8 * eps,
    }.items():
        if close(got, told):
            return Verdict(False, wrong)
    return Verdict(
        False,
        f"The mean of q(x_t | x_t-1) is sqrt(1 - beta) x_t-1; for eps = 0 you give {_ratio(noisier, x)}.",
    )


def _ratio(noisier: Callable[..., Any], x: np.ndarray) -> str:
    got = np.asarray(noisier(x, 0.36, np.zeros_like(x)), float)
    return (
        f"{(got / x).mean():.3g} times x at beta = 0.36"
        if got.shape == x.shape
        else f"an array of shape {got.shape}"
    )


def crossing(answers: Mapping[str, Any], schedules: Mapping[str, Schedule]) -> Verdict:
    """1.2: the first t at which the noise is stronger than the image."""
    for name, s in schedules.items():
        got = answers.get(name)
        if verdict := unanswered(got):
            return verdict
        below = s.alpha_bar < 0.5
        first = int(np.argmax(below))
        if got == first:
            continue
        if got == first - 1:
            return Verdict(
                False,
                f"{name}: at t = {got} the image is still the stronger one; one step more.",
            )
        if got == first + 1:
            return Verdict(
                False,
                f"{name}: at t = {got - 1} the noise is already stronger. The array's index is t itself.",
            )
        if not isinstance(got, int | np.integer) or not 0 <= got <= s.T:
            return Verdict(
                False, f"{name}: a whole number from 0 to {s.T} is wanted, not {got!r}."
            )
        where = "above" if s.alpha_bar[got] >= 0.5 else "below"
        return Verdict(
            False,
            f"{name}: alpha_bar at t = {got} is {s.alpha_bar[got]:.3f}, {where} one half, but not the first.",
        )
    return Verdict(
        True,
        "The linear schedule gets there in about a quarter of its steps, the cosine in half of them.",
    )


def jump_between(jump: Callable[[np.ndarray, float, float, np.ndarray], np.ndarray]) -> Verdict:
    """1.3: x_t from x_s."""
    x, eps = np.random.default_rng(2).standard_normal((2, 5, 3))
    s, t = 0.8, 0.8 * 0.64
    got = jump(x, s, t, eps)
    if verdict := unanswered(got):
        return verdict
    if close(got, 0.8 * x + 0.6 * eps):
        return Verdict(
            True,
            "alpha_bar_t / alpha_bar_s is the product of the alphas in between: a step with a stride.",
        )
    if close(got, np.sqrt(t) * x + np.sqrt(1 - t) * eps):
        return Verdict(
            False,
            "That is the jump from 0; x_s is not x_0: part of the shrinking is already done.",
        )
    if close(got, 0.8 * x + np.sqrt(1 - t) * eps):
        return Verdict(
            False,
            "The image is right; the noise is not: x_s already holds noise of its own, add only the rest.",
        )
    if close(got, 0.8 * x + np.sqrt(s - t) * eps):
        return Verdict(
            False,
            "The noise in x_s shrinks too, so the variance to add is more than alpha_bar_s - alpha_bar_t.",
        )
    return Verdict(
        False,
        "The product of the alphas between s and t is alpha_bar_t / alpha_bar_s; use it as 1 - beta.",
    )
