"""The checkers of notebook 7 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n07_reverse_process as check
from solutions import n07_reverse_process as solution

CHECKERS = (check.mean_of_step, check.finish, check.beta_of_stride)


def test_solutions_are_right():
    assert check.mean_of_step(solution.mean_of_step).right
    assert check.finish(solution.finish).right
    assert check.beta_of_stride(solution.beta_of_stride).right


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
    (check.mean_of_step, lambda x, *a: x * np.nan),
    (check.finish, lambda mu, *a: mu * np.nan),
    (check.beta_of_stride, lambda table, t, t_prev: np.nan),
])  # fmt: skip
def test_nan_is_told(checker, answer):
    verdict = checker(answer)
    assert not verdict.right and "NaN" in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda x, e, a, b, ab: (x - b * e) / np.sqrt(a), "missing under it"),
        (lambda x, e, a, b, ab: x - b / np.sqrt(1 - ab) * e, "not undone"),
        (lambda x, e, a, b, ab: (x - b / np.sqrt(1 - ab) * e) / a, "divide by the root"),
        (lambda x, e, a, b, ab: (x - b / (1 - ab) * e) / np.sqrt(a), "the root of 1 - alpha_bar"),
        (lambda x, e, a, b, ab: (x - np.sqrt(1 - ab) * e) / np.sqrt(a), "only a part"),
        (lambda x, e, a, b, ab: (x - np.sqrt(1 - ab) * e) / np.sqrt(ab), "predicted x_0"),
        (lambda x, e, a, b, ab: (x + b / np.sqrt(1 - ab) * e) / np.sqrt(a), "The sign"),
        (lambda x, e, a, b, ab: x / np.sqrt(a) - b / np.sqrt(1 - ab) * e, "the noise too"),
        (lambda x, e, a, b, ab: (x - np.sqrt(b) / np.sqrt(1 - ab) * e) / np.sqrt(a), "no root"),
        (lambda x, e, a, b, ab: (x - b / np.sqrt(1 - ab) * e) * np.sqrt(a), "make larger"),
        (lambda x, e, a, b, ab: (x - b / np.sqrt(ab) * e) / np.sqrt(a), "not alpha_bar, the image's"),
        (lambda x, e, a, b, ab: x, "1.25 times"),
    ],
)
def test_wrong_means(answer, told):
    verdict = check.mean_of_step(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda mu, sd, z, p: mu + sd * z, "after that"),
        (lambda mu, sd, z, p: mu, "never add"),
        (lambda mu, sd, z, p: mu + sd**2 * z * (p > 0), "no square"),
        (lambda mu, sd, z, p: mu + np.sqrt(sd) * z * (p > 0), "no root"),
        (lambda mu, sd, z, p: mu + z * (p > 0), "Scale it"),
        (lambda mu, sd, z, p: mu - 3 * z, "plus its deviation"),
        (lambda mu, sd, z, p: mu + sd * z * (p > 1), "t_prev = 1"),
        (lambda mu, sd, z, p: mu + sd * z if p else z, "mean itself"),
        (lambda mu, sd, z, p: mu + sd * z * (1, 2, 1)[min(p, 2)] if p else mu, "only 0 is special"),
    ],
)
def test_wrong_ends(answer, told):
    verdict = check.finish(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda ab, t, p: 1 - ab[t] / ab[t - 1], "single step"),
        (lambda ab, t, p: ab[t] / ab[p], "what is kept"),
        (lambda ab, t, p: (1 - ab[p + 1 : t + 1] / ab[p:t]).sum(), "do not add up"),
        (lambda ab, t, p: ab[p] - ab[t], "too little"),
        (lambda ab, t, p: 1 - ab[p] / ab[t], "upside down"),
        (lambda ab, t, p: 1 - ab[t], "since t = 0"),
        (lambda ab, t, p: 0.5, "product of all alphas"),
    ],
)
def test_wrong_strides(answer, told):
    verdict = check.beta_of_stride(answer)
    assert not verdict.right and told in verdict.message
