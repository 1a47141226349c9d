"""The checkers of notebook 1 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n01_forward_process as check
from solutions import n01_forward_process as solution

from minidiff import schedule

SCHEDULES = {"linear": schedule.linear(), "scaled linear": schedule.scaled_linear(), "cosine": schedule.cosine()}
RIGHT = solution.first_t(SCHEDULES)


def test_solutions_are_right():
    assert check.one_step(solution.noisier).right
    assert check.crossing(RIGHT, SCHEDULES).right
    assert check.jump_between(solution.jump).right


def test_no_answer_is_told_so():
    for verdict in (check.one_step(lambda *a: ...), check.crossing({}, SCHEDULES), check.jump_between(lambda *a: None)):
        assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda x, beta, eps: (1 - beta) * x + np.sqrt(beta) * eps, "variance* must shrink"),
        (lambda x, beta, eps: np.sqrt(1 - beta) * x + beta * eps, "standard deviation"),
        (lambda x, beta, eps: (1 - beta) * x + beta * eps, "Both factors"),
        (lambda x, beta, eps: x + np.sqrt(beta) * eps, "not shrunk"),
        (lambda x, beta, eps: np.sqrt(beta) * x + np.sqrt(1 - beta) * eps, "each other's"),
        (lambda x, beta, eps: 3 * x, "3 times x"),
        (lambda x, beta, eps: np.zeros(2), "shape (2,)"),
        (lambda x, beta, eps: x * np.nan, "nan times x"),
    ],
)
def test_wrong_steps(answer, told):
    verdict = check.one_step(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "wrong, told",
    [
        (RIGHT["linear"] - 1, "one step more"),
        (RIGHT["linear"] + 1, "index is t itself"),
        (700, "below one half"),
        (3, "above one half"),
        (2000, "from 0 to 1000"),
        ("soon", "'soon'"),
    ],
)
def test_wrong_crossings(wrong, told):
    verdict = check.crossing({**RIGHT, "linear": wrong}, SCHEDULES)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda x, s, t, eps: np.sqrt(t) * x + np.sqrt(1 - t) * eps, "jump from 0"),
        (lambda x, s, t, eps: np.sqrt(t / s) * x + np.sqrt(1 - t) * eps, "noise is not"),
        (lambda x, s, t, eps: np.sqrt(t / s) * x + np.sqrt(s - t) * eps, "shrinks too"),
        (lambda x, s, t, eps: x, "alpha_bar_t / alpha_bar_s"),
    ],
)
def test_wrong_jumps(answer, told):
    verdict = check.jump_between(answer)
    assert not verdict.right and told in verdict.message
