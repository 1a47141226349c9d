"""The checkers of notebook 9 take right answers, and say of wrong ones what is wrong; what it counts is right."""

import numpy as np
import pytest
from drawing_09 import counting
from exercises import n09_latent_space as check
from helpers import assert_close
from solutions import n09_latent_space as solution

from minidiff import ops
from minidiff.models import VAE, UNet, UNetConfig, VAEConfig
from minidiff.nn import Conv2d
from minidiff.tensor import no_grad

CHECKERS = (check.sample, check.divergence, check.factor)


def test_solutions_are_right():
    assert check.sample(solution.sample).right
    assert check.divergence(solution.divergence).right
    assert check.factor(solution.factor).right


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("answer", [lambda *a: ..., lambda *a: None, lambda *a: ... * a[0]])
def test_no_answer_is_told_so(checker, answer):
    verdict = checker(answer)
    assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda *a: np.zeros((2, 2)), "shape (2, 2)"),
        (lambda *a: a[0].nothing, "AttributeError"),
        (lambda: 0, "TypeError"),
        (lambda *a: "noise", "Numbers are wanted"),
    ],
)
def test_answers_that_are_none(checker, answer, told):
    verdict = checker(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize("checker, answer", [
    (check.sample, lambda mean, *a: mean * np.nan),
    (check.divergence, lambda mean, v: mean * np.inf),
    (check.factor, lambda z: np.nan),
])  # fmt: skip
def test_what_is_not_finite_is_told(checker, answer):
    verdict = checker(answer)
    assert not verdict.right and "NaN" in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda m, lv, e: m, "the same z at every draw"),
        (lambda m, lv, e: m + np.exp(lv / 2), "does not depend on eps"),
        (lambda m, lv, e: m + np.exp(lv) * e, "its root"),
        (lambda m, lv, e: m + lv * e, "undone, by exp"),
        (lambda m, lv, e: m + lv / 2 * e, "exp is still missing"),
        (lambda m, lv, e: np.exp(lv / 2) * e, "around 0"),
        (lambda m, lv, e: m + e, "not scaled"),
        (lambda m, lv, e: np.exp(lv / 2) * (m + e), "not the mean"),
        (lambda m, lv, e: m + e / np.exp(lv / 2), "Divided"),
        (lambda m, lv, e: m + np.exp(-lv) * e, "The sign"),
        (lambda m, lv, e: m + np.exp(lv) / 2 * e, "inside the exp"),
        (lambda m, lv, e: 2 * m + e, "For eps = 0"),
        (lambda m, lv, e: m + np.exp(lv / 2) * np.random.default_rng().normal(size=m.shape), "For eps = 0"),
    ],
)
def test_wrong_samples(answer, told):
    verdict = check.sample(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda m, v: m**2 + v - 1 - np.log(v), "half in front"),
        (lambda m, v: (m**2 + v - 1 + np.log(v)) / 2, "logarithm's sign"),
        (lambda m, v: (m**2 + v - np.log(v)) / 2, "1 is missing"),
        (lambda m, v: (m + v - 1 - np.log(v)) / 2, "by its square"),
        (lambda m, v: (v - 1 - np.log(v)) / 2, "The mean is not in it"),
        (lambda m, v: m**2 / 2, "the variance is not in it"),
        (lambda m, v: (m**2 + np.exp(v) - 1 - v) / 2, "no exp"),
        (lambda m, v: (m**2 + v**2 - 1 - np.log(v**2)) / 2, "do not square"),
        (lambda m, v: (m**2 + v - 1 - np.log(np.sqrt(v))) / 2, "half that of the variance"),
        (lambda m, v: -(m**2 + v - 1 - np.log(v)) / 2, "never below 0"),
        (lambda m, v: 0 * m + np.mean((m**2 + v - 1 - np.log(v)) / 2), "average over all"),
        (lambda m, v: m * v, "0.5 (1, 1)"),
    ],
)
def test_wrong_divergences(answer, told):
    verdict = check.divergence(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda z: z.std(), "one over it"),
        (lambda z: z.var(), "That is the variance"),
        (lambda z: 1 / z.var(), "twice"),
        (lambda z: 1 / np.sqrt(z.std()), "once too often"),
        (lambda z: 1 / np.mean(z**2), "mean square: the root"),
        (lambda z: 1 / np.sqrt(np.mean(z**2)), "mean is still in it"),
        (lambda z: 1 / z.std(axis=(0, 1, 2)), "one number for all"),
        (lambda z: 1 / z.std(axis=(0, 1, 2), keepdims=True), "one number for all"),
        (lambda z: 1 / z.std(axis=(0, 1, 2)).mean(), "average the deviations"),
        (lambda z: 1 / np.abs(z).max(), "not the extremes"),
        (lambda z: 0.18215, "Measure these"),
        (lambda z: 2.0, "should be 1"),
    ],
)
def test_wrong_factors(answer, told):
    verdict = check.factor(answer)
    assert not verdict.right and told in verdict.message


def test_a_factor_may_be_an_array_of_one_number():
    assert check.factor(lambda z: 1 / np.std(z, axis=None)).right


# ---- counting


def test_a_convolution_is_counted_as_by_hand():
    with counting() as counts:
        y = Conv2d(3, 5, stride=2)(np.zeros((2, 8, 6, 3), np.float32))
    assert y.shape == (2, 4, 3, 5) and counts == {"convolutions": 2 * 4 * 3 * 9 * 3 * 5}


def test_attention_and_linear_layers_are_counted_as_by_hand():
    config = UNetConfig(
        channels=(8,), blocks=1, attention=("none",), mid_attention="self", heads=(2,), transformer_layers=(1,),
        norm_groups=4,
    )  # fmt: skip
    with counting() as counts:
        UNet(config, seed=None)(np.zeros((1, 4, 4, 3), np.float32), np.array([1]))
    assert counts["attention"] == 16 * 16 * 8 * 2
    of_time, blocks = 8 * 32 + 32 * 32, 5
    assert counts["linear layers"] == of_time + blocks * 32 * 8 + 4 * 16 * 8 * 8


def test_what_is_only_counted_has_the_shapes_of_what_is_computed():
    images, noise = np.zeros((2, 16, 8, 3), np.float32), np.ones((2, 8, 4, 2), np.float32)
    vae = VAE(VAEConfig(channels=(4, 8), blocks=1, latent_channels=2, norm_groups=2))
    with counting() as counts:
        counted, _ = vae(images, noise)
    before = counts.copy()
    with no_grad():
        computed, _ = vae(images, noise)
    assert counted.shape == computed.shape and counts == before  # after the block nothing is counted


def test_ops_are_put_back_after_an_error():
    real = ops.conv2d
    with pytest.raises(KeyError), counting():
        assert ops.conv2d is not real
        raise KeyError
    assert ops.conv2d is real
    x = np.ones((1, 2, 2, 1), np.float32)
    assert_close(ops.conv2d(x, np.full((1, 1, 1, 1), 3.0, np.float32)).data, 3 * x)
