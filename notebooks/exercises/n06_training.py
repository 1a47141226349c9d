"""Checkers for notebook 6."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from course import Verdict, answer_of, close, told_of


def image_from_noise(clean: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> Verdict:
    """6.1: x_0 from x_t and eps, at alpha_bar = 0.64: the roots are 0.8 and 0.6."""
    x, e = np.random.default_rng(1).standard_normal((2, 5, 3))
    got = answer_of(clean, x, e, 0.64, shape=x.shape)
    if isinstance(got, Verdict):
        return got
    if close(got, (x - 0.6 * e) / 0.8):
        return Verdict(
            True,
            "Solved for x_0: take the noise away as it was put in, then undo the shrinking.",
        )
    return told_of(
        got,
        {
            "Both roots are missing: alpha_bar is a share of the variance, and x_0 and eps are multiplied by "
            "roots of such shares.": (x - 0.36 * e) / 0.64,
            "The noise is right, its factor not: q_sample multiplied eps by a root.": (
                x - 0.36 * e
            )
            / 0.8,
            "The noise is taken away rightly; but x_0 was multiplied by a root, so divide by that root.": (
                (x - 0.6 * e) / 0.64
            ),
            "You divide by the noise's factor. Which one did x_0 get?": (x - 0.6 * e) / 0.6,
            "Image and noise have each other's factor.": (x - 0.8 * e) / 0.6,
            "The noise is gone, but the image is still as small as it is in x_t: undo the shrinking.": (
                x - 0.6 * e
            ),
            "The sign: noise was added, so it must be taken away.": (x + 0.6 * e) / 0.8,
            "eps has variance 1; only a part of it is in x_t. How large a part?": (x - e) / 0.8,
            "First take the noise away, then divide all that is left.": x / 0.8 - 0.6 * e,
        },
    ) or Verdict(
        False,
        "Write down x_t = ... as in q_sample, and solve for x_0. For eps = 0 it must be "
        f"{1 / 0.8:.3g} times x_t at alpha_bar = 0.64.",
    )


def v_target(target: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> Verdict:
    """6.2: v from x_0 and eps."""
    x, e = np.random.default_rng(2).standard_normal((2, 5, 3))
    got = answer_of(target, x, e, 0.64, shape=x.shape)
    if isinstance(got, Verdict):
        return got
    if close(got, 0.8 * e - 0.6 * x):
        return Verdict(
            True,
            "At t = 0 this is the noise, at t = T the image with its sign turned: never a trivial question.",
        )
    return told_of(
        got,
        {
            "Everything has the wrong sign: the noise counts as positive.": 0.6 * x - 0.8 * e,
            "That is x_t, which the network is shown already. v is at right angles to it.": 0.8
            * x
            + 0.6 * e,
            "Image and noise are exchanged.": 0.8 * x - 0.6 * e,
            "The image must be subtracted.": 0.8 * e + 0.6 * x,
            "The two factors are exchanged: where the image is clean (alpha_bar = 1), v is all noise.": (
                0.6 * e - 0.8 * x
            ),
            "Both factors lack their root.": 0.64 * e - 0.36 * x,
            "That is the noise alone, the target of prediction = 'eps'.": e,
            "That is the image alone, the target of prediction = 'x0'.": x,
        },
    ) or Verdict(
        False,
        "v is a sum of two terms, each with a root of alpha_bar or of 1 - alpha_bar; look at `training_target`.",
    )


def best_noise(best: Callable[[np.ndarray, float], np.ndarray]) -> Verdict:
    """6.3: the mean of all eps that could have led to x_t, where x_0 is -1 or 1."""
    x = np.array([-1.5, -0.7, -0.2, 0.1, 0.4, 1.1])

    def noise(image: np.ndarray | float) -> np.ndarray:
        return (x - 0.8 * image) / 0.6

    def mean(centre: float, twice_variance: float) -> np.ndarray:
        plus, minus = (np.exp(-((x - c) ** 2) / twice_variance) for c in (centre, -centre))
        return (plus - minus) / (plus + minus)

    right = mean(0.8, 0.72)
    plus, minus = (np.exp(-((x - c) ** 2) / 0.72) for c in (0.8, -0.8))
    got = answer_of(best, x, 0.64, shape=x.shape)
    if isinstance(got, Verdict):
        return got
    if close(got, noise(right)):
        return Verdict(
            True,
            "No network can do better than this; where both images are likely, it must be wrong in part.",
        )
    return told_of(
        got,
        {
            "That is the average image. Which noise leads from it to x_t?": right,
            "You take the nearer image for certain. The other may have led here too; how probable is it?": (
                noise(np.sign(x))
            ),
            "You give both images the same weight. The one that lies nearer to x_t is the more probable one.": (
                noise(0.0)
            ),
            "That is x_t itself, which is the noise only at alpha_bar = 0.": x,
            "In the exponent stands the variance of the noise, not its root.": noise(
                mean(0.8, 1.2)
            ),
            "The images in x_t are shrunk: they lie at a root of alpha_bar, not at -1 and 1.": (
                noise(mean(1.0, 0.72))
            ),
            "The images in x_t are shrunk by a root of alpha_bar, not by alpha_bar.": noise(
                mean(0.64, 0.72)
            ),
            "The density of the normal distribution has twice the variance in its exponent.": (
                noise(mean(0.8, 0.36))
            ),
            "The two weights must add up to 1: divide by their sum.": noise(plus - minus),
            "The average image is right. It too is shrunk in x_t, before the noise is added.": (
                x - right
            )
            / 0.6,
            "The average image is right. What x_t holds beside it must still be divided by the noise's factor.": (
                x - 0.8 * right
            ),
        },
    ) or Verdict(
        False,
        "First the weights: how likely is x_t from each image? Then the average image, then its noise. At "
        f"x_t = 0.4 and alpha_bar = 0.64 the average image is {right[4]:.3f}.",
    )
