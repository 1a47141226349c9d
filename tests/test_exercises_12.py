"""The checkers of notebook 12 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n12_real_images as check
from solutions import n12_real_images as solution

CHECKERS = (check.epoch_and_place, check.agreement_and_error, check.picture_distance)


def test_solutions_are_right():
    assert check.epoch_and_place(solution.visit).right
    assert check.agreement_and_error(solution.agreement).right
    assert check.picture_distance(solution.distance).right


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("answer", [lambda *a: ..., lambda *a: None])
def test_no_answer_is_told_so(checker, answer):
    verdict = checker(answer)
    assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda *a: (np.nan, np.nan), "NaN"),
        (lambda *a: (1, 2, 3), "shape"),
        (lambda *a: a[0].nothing, "AttributeError"),
        (lambda: 0, "TypeError"),
        (lambda *a: "near", "stopped with ValueError"),
    ],
)
def test_answers_that_are_none(checker, answer, told):
    if checker is check.picture_distance and told == "NaN":
        verdict = checker(lambda *a: np.nan)
    else:
        verdict = checker(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda s, i, B, N: divmod(s * B + i, N)[::-1], "exchanged"),
        (lambda s, i, B, N: divmod(s + i, N), "not s"),
        (lambda s, i, B, N: divmod(s * B, N), "i visits later"),
        (lambda s, i, B, N: (s * B // N, (s * B + i) % N), "over the end of an epoch"),
        (lambda s, i, B, N: (s // max(1, N // B), s % max(1, N // B) * B + i), "without a gap"),
        (lambda s, i, B, N: ((s * B + i) / N, (s * B + i) % N), "whole number"),
        (lambda s, i, B, N: divmod((s - 1) * B + i, N), "counts from 0"),
        (lambda s, i, B, N: (s, i), "(1, 0)"),
    ],
)
def test_wrong_visits(answer, told):
    verdict = check.epoch_and_place(answer)
    assert not verdict.right and told in verdict.message


def share(named, asked):
    return np.mean(named == asked)


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda A, n: (np.sqrt(A * (1 - A) / n), A), "exchanged"),
        (lambda A, n: (n * A, np.sqrt(A * (1 - A) / n)), "divide it"),
        (lambda A, n: (1 - A, np.sqrt(A * (1 - A) / n)), "wrong ones"),
        (lambda A, n: (A, A * (1 - A) / n), "lacks the root"),
        (lambda A, n: (A, np.sqrt(A * (1 - A))), "where is n"),
        (lambda A, n: (A, np.sqrt(A * (1 - A)) / n), "Under the root, divide by n"),
        (lambda A, n: (A, np.sqrt(A / n)), "A (1 - A), not A"),
        (lambda A, n: (A, np.sqrt(A * (1 - A) / 10)), "not of classes"),
        (lambda A, n: (100 * A, 100 * np.sqrt(A * (1 - A) / n)), "shares of 1"),
        (lambda A, n: (A, 0.5), "put it into"),
        (lambda A, n: (A / 2, 0.5), "from 0 to 1"),
    ],
)
def test_wrong_agreements(answer, told):
    verdict = check.agreement_and_error(lambda named, asked: answer(share(named, asked), len(asked)))
    assert not verdict.right and told in verdict.message


def rms(a, b):
    return np.sqrt(np.mean((a / 127.5 - b / 127.5) ** 2))


@pytest.mark.parametrize(
    "answer, told",
    [
        (rms, "never tried"),
        (lambda a, b: rms(a, b[:, ::-1]), "smaller of both"),
        (lambda a, b: min(rms(a, b), rms(a, b[::-1])), "upside down"),
        (lambda a, b: min(rms(a, b), rms(a, b[..., ::-1])), "exchanges the colours"),
        (lambda a, b: min(rms(a, b), rms(a, b[::-1, ::-1])), "half a circle"),
        (lambda a, b: 127.5 * solution.distance(a, b), "divide by 127.5"),
        (lambda a, b: solution.distance(a, b) / 2, "not by 255"),
        (lambda a, b: solution.distance(a, b) ** 2, "root is missing"),
        (lambda a, b: np.sqrt(a.size) * solution.distance(a, b), "the sum of the squares"),
        (lambda a, b: max(rms(a, b), rms(a, b[:, ::-1])), "larger of the two"),
        (lambda a, b: min(np.abs(a / 127.5 - c / 127.5).mean() for c in (b, b[:, ::-1])), "absolute"),
        (lambda a, b: min(np.abs(a / 127.5 - c / 127.5).max() for c in (b, b[:, ::-1])), "largest difference"),
        (lambda a, b: min(np.sqrt(np.mean(((a - c) / 127.5) ** 2)) for c in (b, b[:, ::-1])), "3 - 5 is 254"),
        (lambda a, b: min(np.sqrt(np.mean((a - c) ** 2)) / 127.5 for c in (b, b[:, ::-1])), "3 - 5 is 254"),
        (lambda a, b: np.sqrt(np.mean((a - b) ** 2)), "3 - 5 is 254"),
        (lambda a, b: 0.1 + solution.distance(a, b), "from itself"),
        (lambda a, b: 3 * solution.distance(a, b), "For the first pair"),
    ],
)
def test_wrong_distances(answer, told):
    verdict = check.picture_distance(answer)
    assert not verdict.right and told in verdict.message
