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
@pytest.mark.parametrize("answer", [lambda *a: ..., lambda *a: None, lambda *a: ... * a[0]])
def test_no_answer_is_told_so(checker, answer):
    verdict = checker(answer)
    assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize("checker, count", list(zip(CHECKERS, (2, 2, 1), strict=True)))
@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda n: [np.nan] * n, "NaN"),
        (lambda n: [1, 2, 3], "Return"),
        (lambda n: 1 if n == 2 else [1, 2], "Return"),
        (lambda n: (np.zeros(3), 1), "Return"),
        (lambda n: ["near"] * n, "Numbers are wanted"),
        (lambda n: n.nothing, "AttributeError"),
    ],
)
def test_answers_that_are_none(checker, count, answer, told):
    def f(*args):
        got = answer(count)
        return got[0] if count == 1 and len(got) == 1 else got

    verdict = checker(f)
    assert not verdict.right and told in verdict.message


def test_a_wrong_number_of_arguments_is_told_so():
    for checker in CHECKERS:
        assert "TypeError" in checker(lambda: 0).message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda s, i, B, N: divmod(s * B + i, N)[::-1], "exchanged"),
        (lambda s, i, B, N: divmod(s + i, N), "not s"),
        (lambda s, i, B, N: divmod(s * B, N), "i visits later"),
        (lambda s, i, B, N: (s * B // N, (s * B + i) % N), "over the end of an epoch"),
        (lambda s, i, B, N: (s * B // N, s * B % N + i), "below N"),
        (lambda s, i, B, N: (s // max(1, N // B), s % max(1, N // B) * B + i), "without a gap"),
        (lambda s, i, B, N: (s // (N // B), s % (N // B) * B + i), "without a gap"),
        (lambda s, i, B, N: (s // -(-N // B), s % -(-N // B) * B + i), "without a gap"),
        (lambda s, i, B, N: ((s * B + i) / N, (s * B + i) % N), "whole number"),
        (lambda s, i, B, N: divmod((s - 1) * B + i, N), "Batches count from 0"),
        (lambda s, i, B, N: divmod(s * B + i - 1, N), "Pictures count from 0"),
        (lambda s, i, B, N: ((s * B + i) // N, (s * B + i) % N + 1), "The place counts"),
        (lambda s, i, B, N: (s, i), "you return (7, 3)"),
        (lambda s, i, B, N: (int(s * B + i >= N), s * B + i - (N if s * B + i >= N else 0)), "so it should be"),
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
        (lambda A, n: (n * A, np.sqrt(n * A * (1 - n * A) / n)), "divide it"),
        (lambda A, n: (100 * A, np.sqrt(100 * A * (1 - 100 * A) / n)), "shares of 1"),
        (lambda A, n: (A, np.sqrt(A * (1 - A) / (n - 1))), "n - 1"),
        (lambda A, n: (1 - A, np.sqrt(A * (1 - A) / n)), "wrong ones"),
        (lambda A, n: (A, A * (1 - A) / n), "lacks the root"),
        (lambda A, n: (A, np.sqrt(A * (1 - A))), "where is n"),
        (lambda A, n: (A, np.sqrt(A * (1 - A)) / n), "n belongs under the root"),
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
        (
            lambda a, b: min(np.sqrt(np.mean((a.astype(np.int16) - c) ** 2)) / 127.5 for c in (b, b[:, ::-1])),
            "182 squared",
        ),
        (lambda a, b: min(rms(a, c) for c in (b, b[:, ::-1], b[::-1])), "upside down is another"),
        (lambda a, b: min(rms(a, c) for c in (b, b[:, ::-1], b[::-1], b[::-1, ::-1])), "turned is another"),
        (
            lambda a, b: np.sqrt(
                np.mean(np.minimum((a / 127.5 - b / 127.5) ** 2, (a / 127.5 - b[:, ::-1] / 127.5) ** 2))
            ),
            "pixel by pixel",
        ),
        (lambda a, b: np.sqrt(-solution.distance(a, b) - 1), "NaN"),
        (lambda a, b: 0.1 + solution.distance(a, b), "from itself"),
        (lambda a, b: 3 * solution.distance(a, b), "is wanted; you return"),
    ],
)
def test_wrong_distances(answer, told):
    verdict = check.picture_distance(answer)
    assert not verdict.right and told in verdict.message
