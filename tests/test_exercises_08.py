"""The checkers of notebook 8 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n08_text_to_image as check
from solutions import n08_text_to_image as solution


def softmax(x, axis):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def test_solutions_are_right():
    assert check.other_convention(solution.scale_of).right
    assert check.attention_maps(solution.maps_by_word).right
    assert check.cost(solution.WITH_GUIDANCE, solution.WITHOUT).right


def test_no_answer_is_told_so():
    empty = (check.other_convention(lambda w: ...), check.attention_maps(lambda q, k: None), check.cost(..., 200))
    for verdict in empty:
        assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda w: w, "factors of eps_cond"),
        (lambda w: w + 1, "wrong way round"),
        (lambda w: 1 - w, "sign"),
        (lambda w: w / 2, "you give 0.5"),
        (lambda w: float("nan"), "nan"),
    ],
)
def test_wrong_conventions(answer, told):
    verdict = check.other_convention(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda q, k: softmax(q @ k.T / 8**0.5, 1), "transposed"),
        (lambda q, k: softmax(q @ k.T / 8**0.5, 0).T, "wrong axis"),
        (lambda q, k: softmax(q @ k.T, 1).T, "root of d"),
        (lambda q, k: (q @ k.T / 8**0.5).T, "softmax"),
        (lambda q, k: np.zeros((2, 2)), "(5, 16)"),
        (lambda q, k: np.full((5, 16), np.nan), "NaN"),
        (lambda q, k: np.full((5, 16), 0.3), "sum to 1.5"),
    ],
)
def test_wrong_maps(answer, told):
    verdict = check.attention_maps(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        ((200, 400), "swapped"),
        ((100, 50), "counts calls"),
        ((200, 200), "predicted twice"),
        ((400, 400), "nobody needs it"),
        ((7, 3), "steps x captions"),
    ],
)
def test_wrong_costs(answer, told):
    verdict = check.cost(*answer)
    assert not verdict.right and told in verdict.message
