"""The checkers of notebook 3 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n03_convolution as check
from solutions import n03_convolution as solution

SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])


def test_solutions_are_right():
    assert check.height(solution.output_height).right
    assert check.vertical_edges(solution.my_kernel).right
    assert check.vertical_edges(-solution.my_kernel).right
    assert check.one_output(solution.pixels_gradient).right


def test_no_answer_is_told_so():
    for verdict in (
        check.height(lambda *a: ...),
        check.vertical_edges(...),
        check.one_output(lambda w, i, j, H, W: np.zeros((H, W))),
        check.one_output(lambda *a: None),
    ):
        assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda H, k, p, s: (H + 2 * p - k) // s, "fence posts"),
        (lambda H, k, p, s: (H + p - k) // s + 1, "*each* side"),
        (lambda H, k, p, s: (H - k) // s + 1, "padding is missing"),
        (lambda H, k, p, s: H + 2 * p - k + 1, "stride is missing"),
        (lambda H, k, p, s: (H + 2 * p - k + 1) // s, "must not be divided"),
        (lambda H, k, p, s: -(-(H + 2 * p - k) // s) + 1, "Round down"),
        (lambda H, k, p, s: (H + 2 * p - k) / s + 1, "whole number"),
        (lambda H, k, p, s: float((H + 2 * p - k) // s + 1), "make it an int"),
        (lambda H, k, p, s: H, "there are 30 windows, you say 32"),
        (lambda H, k, p, s: float("nan"), "you say nan"),
        (lambda H, k, p, s: "many", "'many'"),
        (lambda H, k, p, s: np.zeros(2), "whole number is wanted"),
        (lambda H, k, p, s: H // p, "raises ZeroDivisionError"),
    ],
)
def test_wrong_heights(answer, told):
    verdict = check.height(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "kernel, told",
    [
        (solution.my_kernel.T, "horizontal edges. Compare"),
        (np.array([[-1, 0, 1], [-1, 0, 1], [-1, 1, 1]]), "add up to 0"),
        (np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]]), "answers 1: its weights"),
        (np.array([[1, 0, -1], [0, 0, 0], [-1, 0, 1]]), "neither"),
        (np.array([[-1, 0, 0], [0, 0, 0], [0, 0, 1]]), "a horizontal one too"),
        (SOBEL, "no other weights"),
        (np.zeros((3, 3)), "answers to nothing"),
        (np.full((3, 3), np.nan), "NaN"),
        (np.ones((2, 3)), "not (2, 3)"),
        ("vertical", "array of numbers"),
    ],
)
def test_wrong_kernels(kernel, told):
    verdict = check.vertical_edges(kernel)
    assert not verdict.right and told in verdict.message


def placed(values, i, j, H, W):
    dx = np.zeros((H, W))
    dx[i : i + 3, j : j + 3] = values
    return dx


def only_one(w, i, j, H, W):
    dx = np.zeros((H, W))
    dx[i, j] = 1
    return dx


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda w, *a: placed(w[::-1, ::-1], *a), "flipped"),
        (lambda w, *a: placed(w.T, *a), "transposed"),
        (lambda w, *a: placed(1, *a), "its own weight"),
        (lambda w, i, j, H, W: placed(w, i - 1, j - 1, H, W), "top left pixel"),
        (lambda w, i, j, H, W: placed(w, j, i, H, W), "other way round"),
        (only_one, "nine pixels, not one"),
        (lambda w, *a: placed(2 * w, *a), "rows 1 to 3 and columns 3 to 5"),
        (lambda w, i, j, H, W: placed(w, 0, 0, H, W), "Your pixels lie in rows 0 to 2"),
        (lambda w, i, j, H, W: w, "shape (3, 3)"),
        (lambda w, i, j, H, W: np.full((H, W), np.nan), "NaN"),
        (lambda w, i, j, H, W: "there", "array of numbers"),
        (lambda w, i, j, H, W: w[9, 9], "raises IndexError"),
    ],
)
def test_wrong_gradients(answer, told):
    verdict = check.one_output(answer)
    assert not verdict.right and told in verdict.message
