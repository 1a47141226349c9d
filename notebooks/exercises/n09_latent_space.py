"""Checkers for notebook 9."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from course import Verdict, answer_of, close, told_of
from minidiff.models import Posterior
from minidiff.tensor import Tensor


def sample(draw: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Verdict:
    """9.1: z = mean + exp(log_variance / 2) eps."""
    mean, log_variance, eps = np.random.default_rng(1).standard_normal((3, 4, 5))
    got = answer_of(draw, mean, log_variance, eps, shape=mean.shape)
    if isinstance(got, Verdict):
        return got
    std = np.exp(log_variance / 2)
    if close(got, mean + std * eps):
        return Verdict(
            True,
            "All that is random is in eps, so the gradient passes through the mean and the deviation.",
        )
    if close(got, answer_of(draw, mean, log_variance, 0 * eps, shape=mean.shape)):
        if close(got, mean):
            return Verdict(
                False, "That is the mean: the same z at every draw. Where is the noise?"
            )
        return Verdict(
            False,
            "Your z does not depend on eps. Draw nothing yourself: the draw comes in as eps.",
        )
    return told_of(
        got,
        {
            "You scale the noise by the variance; its root, the standard deviation, is wanted.": mean
            + np.exp(log_variance) * eps,
            "The network gives the logarithm of the variance: it has to be undone, by exp.": mean
            + log_variance * eps,
            "Half the logarithm is the logarithm of the root; the exp is still missing.": mean
            + log_variance / 2 * eps,
            "The noise has the right size; it lies around 0 instead of around the mean.": std
            * eps,
            "The noise is not scaled: every number would be equally uncertain.": mean + eps,
            "The deviation scales the noise alone, not the mean.": std * (mean + eps),
            "Divided where it should be multiplied: a small variance must give little noise.": mean
            + eps / std,
            "The sign of the logarithm: a small variance must give little noise.": mean
            + np.exp(-log_variance) * eps,
            "Half of the variance is not its root: put the half inside the exp.": mean
            + np.exp(log_variance) / 2 * eps,
        },
    ) or Verdict(
        False,
        "For eps = 0 it should be the mean; for log_variance = 0, where the variance is 1, mean + eps.",
    )


def divergence(kl: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Verdict:
    """9.2: the KL divergence between two normal distributions, of which the second has the variance v."""
    rng = np.random.default_rng(2)
    mean, v = rng.standard_normal(6), np.exp(rng.standard_normal(6))
    got = answer_of(kl, mean, v, shape=mean.shape)
    if isinstance(got, Verdict):
        return got
    right = (mean**2 + v - 1 - np.log(v)) / 2
    moments = Tensor(np.stack([mean, np.log(v)], axis=1)[:, None, None])
    assert close(Posterior(moments).kl().data, right, 1e-12)
    if close(got, right):
        return Verdict(True, "Each number's share; the library sums them over a picture.")
    return told_of(
        got,
        {
            "The half in front is missing.": 2 * right,
            "The logarithm's sign: at a small variance the KL must be large, since so narrow a cloud says a lot.": (
                mean**2 + v - 1 + np.log(v)
            )
            / 2,
            "At mean 0 and variance 1 nothing differs, and your result there is not 0: the 1 is missing.": (
                mean**2 + v - np.log(v)
            )
            / 2,
            "The mean enters by its square: it costs as much to be off to either side.": (
                mean + v - 1 - np.log(v)
            )
            / 2,
            "The mean is not in it. A narrow cloud far from 0 differs from N(0, 1), too.": (
                v - 1 - np.log(v)
            )
            / 2,
            "The mean is right, but the variance is not in it.": mean**2 / 2,
            "What comes in is the variance itself, not its logarithm: no exp.": (
                mean**2 + np.exp(v) - 1 - v
            )
            / 2,
            "What comes in is the variance: do not square it.": (
                mean**2 + v**2 - 1 - np.log(v**2)
            )
            / 2,
            "The logarithm of the deviation is half that of the variance; here the variance's is wanted.": (
                mean**2 + v - 1 - np.log(v) / 2
            )
            / 2,
            "The sign of the whole: a KL divergence is never below 0.": -right,
            "One number for each (mean, variance) is wanted; you average over all.": np.full(
                6, right.mean()
            ),
        },
    ) or Verdict(
        False,
        f"Some values: {_told(0, 1)}, {_told(1, 1)}, {_told(0, np.e)} at the mean and variance in brackets.",
    )


def _told(mean: float, v: float) -> str:
    kl = (mean**2 + v - 1 - np.log(v)) / 2
    return f"{kl:.3g} ({mean:g}, {v:.3g})"


def factor(find: Callable[[np.ndarray], float]) -> Verdict:
    """9.3: what latents are multiplied by so that their variance is 1; SD's is one number for all channels."""
    rng = np.random.default_rng(3)
    spreads = np.array([0.5, 2.0, 4.0, 7.0])
    z = rng.standard_normal((20, 6, 6, 4)) * spreads + np.array([3.0, 1.0, -2.0, 2.5])
    try:
        shape = np.shape(find(z))
    except Exception:
        shape = ()
    if shape in ((4,), (1, 1, 1, 4)):
        return Verdict(
            False,
            "You give each channel a factor of its own. The library, like Stable Diffusion, has one number for all: "
            "what lies between channels stays as the encoder made it.",
        )
    got = answer_of(find, z, shape=())
    if isinstance(got, Verdict):
        return got
    if close(got, 1 / z.std(), 1e-3):
        return Verdict(
            True,
            f"Here {float(got):.3g}: multiplied by it, all numbers together have the variance {(got * z).var():.3f}.",
        )
    return told_of(
        got,
        {
            "That is the deviation: multiplied by it the spread grows; one over it is wanted.": z.std(),
            "That is the variance. Scaling by a factor scales the deviation by it, and the variance by its square.": (
                z.var()
            ),
            "One over the variance: the variance would become 1 / variance, because a factor counts twice in it.": (
                1 / z.var()
            ),
            "The root is taken once too often.": 1 / np.sqrt(z.std()),
            "That is 1 over the mean square: the root is missing.": 1 / np.mean(z**2),
            "That makes the mean square 1, not the variance: the mean is still in it. "
            "(Where the mean is 0 they are the same.)": 1 / np.sqrt(np.mean(z**2)),
            "You average the deviations of the channels; the deviation of all numbers together is wanted.": (
                1 / z.std(axis=(0, 1, 2)).mean()
            ),
            "That is about the size of the largest number; not the extremes are to be scaled, but the spread.": (
                1 / np.abs(z).max()
            ),
            "That is Stable Diffusion's own factor, measured on its latents. Measure these.": 0.18215,
        },
    ) or Verdict(
        False,
        f"These latents, times your {float(got):.3g}, have the variance {float((got * z).var()):.3g}; it should be 1.",
    )
