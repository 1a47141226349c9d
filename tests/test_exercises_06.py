"""The checkers of notebook 6 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n06_training as check
from solutions import n06_training as solution

CHECKERS = (check.image_from_noise, check.v_target, check.best_noise)


def test_solutions_are_right():
    assert check.image_from_noise(solution.clean).right
    assert check.v_target(solution.target).right
    assert check.best_noise(solution.best).right


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("answer", [lambda *a: ..., lambda *a: None, lambda *a: ... * a[0]])
def test_no_answer_is_told_so(checker, answer):
    verdict = checker(answer)
    assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda *a: a[0] * np.nan, "NaN"),
        (lambda *a: np.zeros(2), "shape (2,)"),
        (lambda *a: a[0].nothing, "AttributeError"),
        (lambda: 0, "TypeError"),
        (lambda *a: "noise", "Numbers are wanted"),
    ],
)
def test_answers_that_are_none(checker, answer, told):
    verdict = checker(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda x, e, a: (x - (1 - a) * e) / a, "Both roots"),
        (lambda x, e, a: (x - (1 - a) * e) / np.sqrt(a), "its factor not"),
        (lambda x, e, a: (x - np.sqrt(1 - a) * e) / a, "divide by that root"),
        (lambda x, e, a: (x - np.sqrt(1 - a) * e) / np.sqrt(1 - a), "Which one did x_0 get"),
        (lambda x, e, a: (x - np.sqrt(a) * e) / np.sqrt(1 - a), "each other's factor"),
        (lambda x, e, a: x - np.sqrt(1 - a) * e, "undo the shrinking"),
        (lambda x, e, a: (x + np.sqrt(1 - a) * e) / np.sqrt(a), "The sign"),
        (lambda x, e, a: (x - e) / np.sqrt(a), "How large a part"),
        (lambda x, e, a: x / np.sqrt(a) - np.sqrt(1 - a) * e, "then divide all"),
        (lambda x, e, a: x, "1.25 times"),
    ],
)
def test_wrong_images(answer, told):
    verdict = check.image_from_noise(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda x, e, a: np.sqrt(1 - a) * x - np.sqrt(a) * e, "wrong sign"),
        (lambda x, e, a: np.sqrt(a) * x + np.sqrt(1 - a) * e, "That is x_t"),
        (lambda x, e, a: np.sqrt(a) * x - np.sqrt(1 - a) * e, "are exchanged."),
        (lambda x, e, a: np.sqrt(a) * e + np.sqrt(1 - a) * x, "must be subtracted"),
        (lambda x, e, a: np.sqrt(1 - a) * e - np.sqrt(a) * x, "factors are exchanged"),
        (lambda x, e, a: a * e - (1 - a) * x, "lack their root"),
        (lambda x, e, a: e, "noise alone"),
        (lambda x, e, a: x, "image alone"),
        (lambda x, e, a: e - x, "training_target"),
    ],
)
def test_wrong_targets(answer, told):
    verdict = check.v_target(answer)
    assert not verdict.right and told in verdict.message


def best_with(centre, exponent, image=lambda x, plus, minus: (plus - minus) / (plus + minus)):
    """An answer whose weights are exp(-(x -+ centre)^2 / exponent)."""

    def best(x, a):
        plus, minus = (np.exp(-((x - c) ** 2) / exponent(a)) for c in (centre(a), -centre(a)))
        return (x - np.sqrt(a) * image(x, plus, minus)) / np.sqrt(1 - a)

    return best


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda x, a: (x - np.sqrt(1 - a) * solution.best(x, a)) / np.sqrt(a), "average image. Which"),
        (best_with(np.sqrt, lambda a: 2 * (1 - a), lambda x, *_: np.sign(x)), "for certain"),
        (best_with(np.sqrt, lambda a: 2 * (1 - a), lambda x, *_: 0 * x), "same weight"),
        (lambda x, a: x, "x_t itself"),
        (best_with(np.sqrt, lambda a: 2 * np.sqrt(1 - a)), "not its root"),
        (best_with(lambda a: 1.0, lambda a: 2 * (1 - a)), "not at -1 and 1"),
        (best_with(lambda a: a, lambda a: 2 * (1 - a)), "not by alpha_bar"),
        (best_with(np.sqrt, lambda a: 1 - a), "twice the variance"),
        (best_with(np.sqrt, lambda a: 2 * (1 - a), lambda x, p, m: p - m), "add up to 1"),
        (
            lambda x, a: (x - (x - np.sqrt(1 - a) * solution.best(x, a)) / np.sqrt(a)) / np.sqrt(1 - a),
            "It too is shrunk",
        ),
        (lambda x, a: np.sqrt(1 - a) * solution.best(x, a), "must still be divided"),
        (lambda x, a: 2 * x, "First the weights"),
    ],
)
def test_wrong_noises(answer, told):
    verdict = check.best_noise(answer)
    assert not verdict.right and told in verdict.message
