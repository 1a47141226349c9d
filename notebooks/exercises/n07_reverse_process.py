"""Checkers for notebook 7."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from course import Verdict, answer_of, close, told_of
from minidiff import schedule


def mean_of_step(
    mean: Callable[[np.ndarray, np.ndarray, float, float, float], np.ndarray],
) -> Verdict:
    """7.1: mu_theta, at alpha = 0.64, beta = 0.36, alpha_bar = 0.19: the roots are 0.8, 0.6 and, of 1 - alpha_bar, 0.9."""
    x, e = np.random.default_rng(1).standard_normal((2, 5, 3))
    got = answer_of(mean, x, e, 0.64, 0.36, 0.19, shape=x.shape)
    if isinstance(got, Verdict):
        return got
    if close(got, (x - 0.4 * e) / 0.8):
        return Verdict(
            True, "A part of the noise away, then the forward step's shrinking undone."
        )
    return told_of(
        got,
        {
            "You remove beta times the noise. Beta is compared with all the noise there is: something is "
            "missing under it.": (x - 0.36 * e) / 0.8,
            "The noise is right; the forward step's shrinking is not undone.": x - 0.4 * e,
            "The forward step multiplied by the root of alpha; divide by the root.": (
                x - 0.4 * e
            )
            / 0.64,
            "Under beta stands the root of 1 - alpha_bar: eps is in x_t with that factor.": (
                (x - 0.36 / 0.81 * e) / 0.8
            ),
            "You remove all the noise that is in x_t. One step removes only a part of it.": (
                x - 0.9 * e
            )
            / 0.8,
            "That is the predicted x_0: the leap to the end, not one step.": (x - 0.9 * e)
            / np.sqrt(0.19),
            "The sign: noise is taken away.": (x + 0.4 * e) / 0.8,
            "Divide all that is left by the root of alpha, the noise too.": x / 0.8 - 0.4 * e,
            "In this formula beta has no root.": (x - 0.6 / 0.9 * e) / 0.8,
            "The forward step shrinks, so the reverse step must make larger: divide by the root of alpha.": (
                (x - 0.4 * e) * 0.8
            ),
            "Under beta stands 1 - alpha_bar, the noise's share, not alpha_bar, the image's.": (
                (x - 0.36 / np.sqrt(0.19) * e) / 0.8
            ),
        },
    ) or Verdict(
        False,
        f"For eps = 0 only x_t / sqrt(alpha) is left, {1 / 0.8:.3g} times x_t at alpha = 0.64. Then the noise: "
        "beta over a root.",
    )


def finish(step: Callable[[np.ndarray, float, np.ndarray, int], np.ndarray]) -> Verdict:
    """7.2: x_{t-1} from mu, sigma and z; the last step adds nothing."""
    mu, z = np.random.default_rng(2).standard_normal((2, 5, 3))
    ends = []
    for t_prev in (480, 1, 0):
        got = answer_of(step, mu, 0.5, z, t_prev, shape=mu.shape)
        if isinstance(got, Verdict):
            return got
        ends.append(got)
    middle, first, last = ends
    if close(middle, mu):
        return Verdict(
            False,
            "You never add noise. Only the last step, to t_prev = 0, ends at the mean; the others draw around it.",
        )
    if verdict := told_of(
        middle,
        {
            "sigma_t is the deviation already: no square.": mu + 0.25 * z,
            "sigma_t is the deviation already: no root.": mu + np.sqrt(0.5) * z,
            "z has variance 1. Scale it, by the deviation.": mu + z,
        },
    ):
        return verdict
    if not close(middle, mu + 0.5 * z):
        return Verdict(
            False, "To draw from a normal distribution: its mean, plus its deviation times z."
        )
    if close(last, mu + 0.5 * z):
        return Verdict(
            False,
            "Right in the middle of the walk. But the step to t_prev = 0 ends at the image, and nobody takes noise away "
            "after that.",
        )
    if not close(last, mu):
        return Verdict(False, "The step to t_prev = 0 should end at the mean itself.")
    if close(first, mu):
        return Verdict(
            False,
            "At t_prev = 1 one step is still to come, so noise is added there. The image is t = 0.",
        )
    if not close(first, mu + 0.5 * z):
        return Verdict(
            False, "At t_prev = 1 you treat the step unlike the others; only 0 is special."
        )
    return Verdict(True, "Noise at every step but the last.")


def beta_of_stride(beta: Callable[[np.ndarray, int, int], float]) -> Verdict:
    """7.3: one minus the quotient of the alpha_bars."""
    s = schedule.linear()
    table = s.alpha_bar
    pairs = ((600, 400), (1000, 980), (20, 0))
    got = []
    for t, t_prev in pairs:
        answer = answer_of(beta, table, t, t_prev, shape=())
        if isinstance(answer, Verdict):
            return answer
        got.append(float(answer))

    def each(f: Callable[[int, int], float]) -> list[float]:
        return [f(t, p) for t, p in pairs]

    if close(got, each(lambda t, p: 1 - table[t] / table[p])):
        return Verdict(
            True,
            f"From 600 to 400 that is {got[0]:.2f}, where the table's beta at 600 is {s.beta[600]:.3f}: many steps in one.",
        )
    return told_of(
        np.array(got),
        {
            "That is the beta of the single step to t. Between t_prev and t lie many steps.": (
                each(lambda t, p: s.beta[t])
            ),
            "That is alpha, what is kept; beta is the rest.": each(
                lambda t, p: table[t] / table[p]
            ),
            "The shrinkings of the steps are multiplied, so their betas do not add up; the quotient of two alpha_bars "
            "is their product.": each(lambda t, p: s.beta[p + 1 : t + 1].sum()),
            "The noise added on the way shrinks too, so a difference is too little. Which quotient takes x at t_prev "
            "to x at t?": each(lambda t, p: table[p] - table[t]),
            "The quotient is upside down: alpha_bar is smaller at t than at t_prev, and beta must lie between 0 and 1.": (
                each(lambda t, p: 1 - table[p] / table[t])
            ),
            "That is all the noise since t = 0; the step begins at t_prev.": each(
                lambda t, p: 1 - table[t]
            ),
        },
    ) or Verdict(
        False,
        "alpha_bar at t is the product of all alphas up to t. Which of them lie between t_prev and t, and what is "
        "their product?",
    )
