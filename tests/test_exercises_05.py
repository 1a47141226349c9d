"""The checkers of notebook 5 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n05_unet as check
from solutions import n05_unet as solution

CHECKERS = [check.level_shapes, check.up_widths, check.embedding]


def test_solutions_are_right():
    assert check.level_shapes(solution.features_at).right
    assert check.up_widths(solution.inputs_of_up).right
    assert check.embedding(solution.embed).right


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("nothing", [..., None, (..., ...)])
def test_no_answer_is_told_so(checker, nothing):
    verdict = checker(lambda *inputs: nothing)
    assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize("checker", CHECKERS)
def test_an_exception_is_a_verdict(checker):
    def fails(*inputs):
        raise ZeroDivisionError("planted")

    verdict = checker(fails)
    assert not verdict.right and "ZeroDivisionError: planted" in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda H, W, c, i: (H, W, c[i]), "half the height"),
        (lambda H, W, c, i: (H / 2 ** (i + 1), W / 2 ** (i + 1), c[i]), "one halving too many"),
        (lambda H, W, c, i: (H / max(1, 2 * i), W / max(1, 2 * i), c[i]), "2 · 2 · 2"),
        (lambda H, W, c, i: (W / 2**i, H / 2**i, c[i]), "exchanged"),
        (lambda H, W, c, i: (c[i], H / 2**i, W / 2**i), "channels come last"),
        (lambda H, W, c, i: (H / 2**i, W / 2**i, c[0]), "configuration"),
        (lambda H, W, c, i: (H / 3**i, W / 3**i, c[i]), "how often"),
        (lambda H, W, c, i: (H, W), "you give 2"),
        (lambda H, W, c, i: (np.nan, W, c[i]), "NaN"),
        (lambda H, W, c, i: "soon", "three numbers"),
        (lambda H, W, c, i: 3, "three numbers"),
    ],
)
def test_wrong_shapes(answer, told):
    verdict = check.level_shapes(answer)
    assert not verdict.right and told in verdict.message


def around(c, i):
    return c[min(i + 1, len(c) - 1)], c[i], c[max(i - 1, 0)]


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda c, i: around(c, i)[:2], "not the skip"),
        (lambda c, i: solution.inputs_of_up(c, i)[::-1], "wrong order"),
        (lambda c, i: (around(c, i)[0] + c[i], 2 * c[i]), "very first result"),
        (lambda c, i: (2 * c[i], c[i] + around(c, i)[2]), "from the level below"),
        (lambda c, i: (7, 7), "first block's number"),
        (lambda c, i: (around(c, i)[0] + c[i], 7), "the second is not"),
        (lambda c, i: (1, 2, 3), "you give 3"),
        (lambda c, i: (np.nan, 2), "NaN"),
        (lambda c, i: 3, "two numbers"),
    ],
)
def test_wrong_widths(answer, told):
    verdict = check.up_widths(answer)
    assert not verdict.right and told in verdict.message


def waves(exponent, base=None, shift=0.0, first=np.cos, second=np.sin):
    def embed(t, dim, period):
        i = np.arange(dim // 2)
        f = (period if base is None else base) ** exponent(i, dim)
        return np.concatenate([first((t + shift) * f), second((t + shift) * f)])

    return embed


def falling(i, dim):
    return -i / (dim // 2)


def alternating(first, second):
    def embed(t, dim, period):
        f = period ** (-np.arange(dim // 2) / (dim // 2))
        return np.stack([first(t * f), second(t * f)], axis=1).ravel()

    return embed


@pytest.mark.parametrize(
    "answer, told",
    [
        (waves(falling, first=np.sin, second=np.cos), "exchanged"),
        (alternating(np.cos, np.sin), "Cosines and sines alternate"),
        (alternating(np.sin, np.cos), "Sines and cosines alternate"),
        (waves(lambda i, dim: i / (dim // 2)), "minus"),
        (waves(lambda i, dim: -i / dim), "i over dim"),
        (waves(lambda i, dim: -i / (dim // 2 - 1)), "never reaches 1"),
        (waves(falling, base=np.e), "The base is e"),
        (waves(falling, base=10000.0), "use the arguments"),
        (waves(falling, base=1000.0), "angles are wrong"),
        (waves(falling, shift=-1), "t - 1"),
        (waves(lambda i, dim: -(i + 1) / (dim // 2)), "counts from 0"),
        (waves(falling, first=lambda x: x, second=lambda x: x), "Those are the angles"),
        (lambda t, dim, period: np.tile(period ** (-np.arange(dim // 2) / (dim // 2)), 2), "Those are the frequencies"),
        (lambda t, dim, period: solution.embed(1.0, dim, period), "t is missing"),
        (waves(falling, second=np.cos), "squares add up to 1"),
        (lambda t, dim, period: np.zeros(dim // 2), "shape (8,)"),
        (lambda t, dim, period: np.full(dim, np.nan), "NaN"),
        (lambda t, dim, period: "soon", "not str"),
    ],
)
def test_wrong_embeddings(answer, told):
    verdict = check.embedding(answer)
    assert not verdict.right and told in verdict.message
