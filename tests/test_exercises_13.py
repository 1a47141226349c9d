"""The checkers of notebook 13 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n13_stable_diffusion as check
from solutions import n13_stable_diffusion as solution

CHECKS = (check.layout, check.heads, check.spelling)


def test_solutions_are_right():
    answers = (solution.in_our_order, solution.heads_of, solution.spell)
    for checker, answer in zip(CHECKS, answers, strict=True):
        assert checker(answer).right


@pytest.mark.parametrize("checker", CHECKS)
def test_no_answer_and_errors_are_told(checker):
    for nothing in (lambda *a: ..., lambda *a: None):
        verdict = checker(nothing)
        assert not verdict.right and "..." in verdict.message
    verdict = checker(lambda *a: 1 / 0)
    assert not verdict.right and "ZeroDivisionError" in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda a: a, "as they were stored"),
        (lambda a: a.T, "not (2, 3, 4, 5)"),
        (lambda a: a.reshape(3, 2, 4, 5) if a.ndim == 4 else a.T, "`reshape`"),
        (lambda a: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a, "axes swapped"),
        (lambda a: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T[None] if a.ndim == 1 else a.T, "one axis"),
        (lambda a: np.full((3, 2, 4, 5), np.nan), "numbers are not"),
        (lambda a: 7, "must become"),
    ],
)
def test_wrong_layouts(answer, told):
    verdict = check.layout(answer)
    assert not verdict.right and told in verdict.message


def sizes(kind, channels, n):
    return [c // n if isinstance(n, int) else c // 64 for c in channels]


def always_numbers(kind, channels, n):
    return list(n) if isinstance(n, list) else [n or 1] * len(channels)


def no_none(kind, channels, n):
    if kind == "UNet2DConditionModel":
        return always_numbers(kind, channels, n)
    return [c // (n or 1) for c in channels]


@pytest.mark.parametrize(
    "answer, told",
    [
        (sizes, "other way round"),
        (lambda kind, channels, n: [8] * len(channels), "A list has a number"),
        (always_numbers, "16 heads of 8"),
        (no_none, "one head as wide"),
        (lambda *a: 8, "A list with one whole number"),
        (lambda *a: ["x"], "A list with one whole number"),
    ],
)
def test_wrong_heads(answer, told):
    verdict = check.heads(answer)
    assert not verdict.right and told in verdict.message


def in_order_of_place(symbols, merges):
    """Joins the leftmost known pair, whatever its rank."""
    symbols = list(symbols)
    i = 0
    while i < len(symbols) - 1:
        if (symbols[i], symbols[i + 1]) in merges:
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            i = 0
        else:
            i += 1
    return symbols


def first_place_only(symbols, merges):
    symbols, done = list(symbols), set()
    for pair in merges:
        for i in range(len(symbols) - 1):
            if (symbols[i], symbols[i + 1]) == pair and pair not in done:
                symbols[i : i + 2] = ["".join(pair)]
                done.add(pair)
                break
    return symbols


def one_round(symbols, merges):
    return next(
        ([*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
         for pair in merges for i in range(len(symbols) - 1) if (symbols[i], symbols[i + 1]) == pair),
        symbols,
    )  # fmt: skip


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda symbols, merges: symbols, "single characters"),
        (lambda symbols, merges: ["".join(symbols)], "not ['c'"),
        (lambda symbols, merges: [s.removesuffix("</w>") for s in symbols], "not its letters"),
        (one_round, "go on until none is left"),
        (first_place_only, "wherever it stands"),
        (lambda symbols, merges: 7, "A list of pieces"),
        (lambda symbols, merges: "cat", "A list of pieces"),
    ],
)
def test_wrong_spellings(answer, told):
    verdict = check.spelling(answer)
    assert not verdict.right and told in verdict.message
