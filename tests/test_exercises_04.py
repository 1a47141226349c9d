"""The checkers of notebook 4 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n04_norm_and_attention as check
from solutions import n04_norm_and_attention as solution


def exp_share(x, axis=-1, keepdims=True):
    e = np.exp(x)
    return e / e.sum(axis=axis, keepdims=keepdims)


def of_global_maximum(x):
    e = np.exp(x - x.max())
    return e / e.sum(axis=-1, keepdims=True)


def merged(fa, fb, ga=None, gb=None, by_l=False):
    """An answer with these factors of l (and of o, where they differ)."""

    def merge(a, b):
        m = np.maximum(a[0], b[0])
        f, g = fa(a[0], m), fb(b[0], m)
        total = a[1] * f + b[1] * g
        f, g = (ga or fa)(a[0], m), (gb or fb)(b[0], m)
        o = a[2] * f + b[2] * g
        return m, total, o / total if by_l else o

    return merge


def right(old, new):
    return np.exp(old - new)


def upside_down(old, new):
    return np.exp(new - old)


def one(old, new):
    return 1.0


def fails(*inputs):
    raise ZeroDivisionError("planted")


def test_solutions_are_right():
    assert check.safe(solution.safe_softmax).right
    assert check.merging(solution.merge).right
    assert check.merging(merged(right, right)).right
    assert check.hiding(solution.hide).right
    assert check.hiding(lambda s, mask: s + np.where(mask, 0, -1e9)).right


@pytest.mark.parametrize("checker", [check.safe, check.merging, check.hiding])
@pytest.mark.parametrize("nothing", [..., None])
def test_no_answer_is_told_so(checker, nothing):
    verdict = checker(lambda *inputs: nothing)
    assert not verdict.right and "..." in verdict.message


def test_no_answer_in_a_tuple_is_told_so():
    verdict = check.merging(lambda a, b: (np.maximum(a[0], b[0]), ..., ...))
    assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize("checker", [check.safe, check.merging, check.hiding])
def test_an_exception_is_a_verdict(checker):
    verdict = checker(fails)
    assert not verdict.right and "ZeroDivisionError: planted" in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (exp_share, "more than a float can hold"),
        (of_global_maximum, "0 / 0 is NaN"),
        (lambda x: exp_share(np.clip(x, -50, 50)), "Clipping"),
        (lambda x: exp_share(x, axis=0), "columns add up"),
        (lambda x: exp_share(x, axis=None), "by itself"),
        (lambda x: exp_share(x, keepdims=False), "another row's sum"),
        (lambda x: np.exp(x - x.max(axis=-1, keepdims=True)), "The rows add up to"),
        (lambda x: np.full(x.shape, 1 / 3), "ratio of e^score"),
        (lambda x: x.sum(axis=-1), "keepdims"),
        (lambda x: x * np.nan, "NaN or infinity"),
        (lambda x: "soon", "not str"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_wrong_softmaxes(answer, told):
    verdict = check.safe(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (merged(one, one), "different maxima"),
        (merged(upside_down, upside_down), "upside down"),
        (merged(right, one), "Only the first"),
        (merged(one, right), "Only the second"),
        (merged(right, right, one, one), "same factors as l"),
        (merged(right, right, by_l=True), "divided by l already"),
        (merged(right, right, upside_down, one), "o is not"),
        (merged(lambda old, new: 2.0, right), "l is not"),
        (lambda a, b: (a[0] + b[0], a[1], a[2]), "not a sum"),
        (lambda a, b: a, "largest score of either half"),
        (lambda a, b: (a[0], a[1] * np.nan, a[2]), "l holds NaN"),
        (lambda a, b: (a[0], a[1][:1], a[2]), "l has shape (1, 1)"),
        (lambda a, b: a[0], "m has shape (1,)"),
        (lambda a, b: 3, "three arrays"),
    ],
)
def test_wrong_merges(answer, told):
    verdict = check.merging(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda s, mask: s * mask, "e^0 = 1"),
        (lambda s, mask: np.where(mask, -np.inf, s), "other way round"),
        (lambda s, mask: s, "nothing is hidden"),
        (lambda s, mask: s * np.where(mask, 1, -np.inf), "+infinity"),
        (lambda s, mask: s + np.inf * (mask - 1.0), "NaN"),
        (lambda s, mask: solution.safe_softmax(s) * mask, "before the softmax"),
        (lambda s, mask: s - 5 * ~mask, "exactly 0"),
        (lambda s, mask: 0 * s + np.where(mask, 0, -np.inf), "have changed"),
        (lambda s, mask: s[:, mask], "keep their shape"),
        (lambda s, mask: s * np.nan, "NaN"),
    ],
)
def test_wrong_masks(answer, told):
    verdict = check.hiding(answer)
    assert not verdict.right and told in verdict.message
