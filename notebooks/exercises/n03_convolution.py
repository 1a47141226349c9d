"""Checkers for notebook 3. Kernels and gradients are tried out with the library's own convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from course import Verdict, close, unanswered
from minidiff import ops
from minidiff.ops.conv2d import conv2d_backward

CASES = [
    (32, 3, 0, 1),
    (32, 3, 1, 1),
    (32, 3, 1, 2),
    (33, 5, 2, 2),
    (31, 1, 0, 3),
    (6, 6, 0, 1),
]


def height(output_height: Callable[[int, int, int, int], Any]) -> Verdict:
    """3.1: the number of windows, for (H, k, padding, stride)."""
    answers = []
    for case in CASES:
        try:
            got = output_height(*case)
        except Exception as e:
            return _raised(e, f"for H, k, padding, stride = {case}")
        if verdict := unanswered(got):
            return verdict
        answers.append(got)
    try:
        numbers = [float(got) for got in answers]
    except (TypeError, ValueError):
        return Verdict(False, f"A whole number is wanted, not {answers[0]!r}.")
    for wrong, formula in {
        "": lambda H, k, p, s: (H + 2 * p - k) // s + 1,
        "You count the steps between the windows. How many fence posts have 10 gaps?": (
            lambda H, k, p, s: (H + 2 * p - k) // s
        ),
        "The padding is on *each* side.": lambda H, k, p, s: (H + p - k) // s + 1,
        "The padding is missing: the kernel may stand on the zeros around the image too.": (
            lambda H, k, p, s: (H - k) // s + 1
        ),
        "The stride is missing: how many steps fit?": lambda H, k, p, s: H + 2 * p - k + 1,
        "The 1 must not be divided by the stride: the first window is there whatever the stride is.": (
            lambda H, k, p, s: (H + 2 * p - k + 1) // s
        ),
        "Round down, not up: a window that does not fit wholly is not there.": (
            lambda H, k, p, s: -(-(H + 2 * p - k) // s) + 1
        ),
        "The result must be a whole number: what is left over after the last full step does not count.": (
            lambda H, k, p, s: (H + 2 * p - k) / s + 1
        ),
    }.items():
        if close(numbers, [formula(*case) for case in CASES], 1e-9):
            if wrong:
                return Verdict(False, wrong)
            if not all(isinstance(got, int | np.integer) for got in answers):
                return Verdict(
                    False, "The values are right; make it an int, by `//` in place of `/`."
                )
            return Verdict(
                True, "In full: the output's height is (H + 2P − k) / s, rounded down, plus 1."
            )
    for case, got in zip(CASES, numbers, strict=True):
        H, k, p, s = case
        wanted = (H + 2 * p - k) // s + 1
        if got != wanted:
            return Verdict(
                False,
                f"H = {H}, k = {k}, padding = {p}, stride = {s}: there are {wanted} windows, you say {got:g}. "
                f"The padded image has {H + 2 * p} rows; where do the first and the last window start?",
            )
    raise AssertionError("one of the answers is wrong")


def vertical_edges(kernel: Any) -> Verdict:
    """3.2: a 3 x 3 kernel of -1, 0 and 1 that answers to vertical edges alone."""
    if verdict := unanswered(kernel):
        return verdict
    try:
        kernel = np.asarray(kernel, np.float64)
    except (TypeError, ValueError):
        return Verdict(False, "The kernel must be an array of numbers.")
    if kernel.shape != (3, 3):
        return Verdict(False, f"The kernel must have the shape (3, 3), not {kernel.shape}.")
    if not np.isfinite(kernel).all():
        return Verdict(False, "The kernel holds NaN or infinity.")
    edge = np.zeros((6, 6))
    edge[:, 3:] = 1
    flat, along, across = (_answer(image, kernel) for image in (np.ones((6, 6)), edge, edge.T))
    if not kernel.any():
        return Verdict(False, "All weights are zero: it answers to nothing.")
    if flat > 1e-9:
        return Verdict(
            False,
            f"On a flat image of ones it answers {kernel.sum():g}: its weights must add up to 0.",
        )
    if along <= 1e-9 < across:
        return Verdict(
            False,
            "It answers to horizontal edges. Compare left with right, not above with below.",
        )
    if along <= 1e-9:
        return Verdict(
            False,
            "It answers neither to a vertical nor to a horizontal edge: to dots, perhaps.",
        )
    if across > 1e-9:
        return Verdict(
            False,
            f"It answers to a vertical edge ({along:g}), but to a horizontal one too ({across:g}): each of "
            "its *rows* must add up to 0.",
        )
    if not np.isin(kernel, (-1, 0, 1)).all():
        return Verdict(
            False, "It finds vertical edges. Now use no other weights than −1, 0 and 1."
        )
    return Verdict(
        True,
        f"A vertical edge of height 1 gives {along:g}, a horizontal edge and a flat image 0.",
    )


def one_output(pixels_gradient: Callable[..., Any]) -> Verdict:
    """3.3: dx for a dy that is 1 at (i, j) and 0 elsewhere."""
    w = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 10]])
    H, W, i, j = 6, 7, 1, 3
    dy = np.zeros((1, H - 2, W - 2, 1))
    dy[0, i, j] = 1
    sides = ((0, 0), (0, 0))
    wanted = conv2d_backward(dy, np.zeros((1, H, W, 1)), w[:, :, None, None], 1, sides)[0]
    wanted = wanted[0, :, :, 0]
    try:
        got = pixels_gradient(w.copy(), i, j, H, W)
    except Exception as e:
        return _raised(e, f"for i = {i}, j = {j}, H = {H}, W = {W} and a kernel of 3 x 3")
    if verdict := unanswered(got):
        return verdict
    try:
        got = np.asarray(got, np.float64)
    except (TypeError, ValueError):
        return Verdict(False, "dx must be an array of numbers.")
    if got.shape != (H, W):
        return Verdict(
            False, f"dx has the shape {got.shape}; it must have that of the image, {(H, W)}."
        )
    if not np.isfinite(got).all():
        return Verdict(False, "dx holds NaN or infinity.")
    if close(got, wanted):
        return Verdict(True, "The kernel, unflipped, where it had stood.")
    if not got.any():
        return Verdict(False, "Replace the `...`: dx is still all zeros.")
    places = {
        "The kernel is in the right place, but flipped: the output read its first pixel with W[0, 0].": (
            w[::-1, ::-1]
        ),
        "The kernel is in the right place, but transposed: rows and columns are mixed up.": w.T,
        "The right nine pixels, but each has its own weight in the output.": np.ones((3, 3)),
    }
    for message, values in places.items():
        if close(got, _placed(values, i, j, H, W)):
            return Verdict(False, message)
    if close(got, _placed(w, i - 1, j - 1, H, W)):
        return Verdict(
            False,
            "The kernel is centred on (i, j), but without padding (i, j) is its top left pixel.",
        )
    if close(got, _placed(w, j, i, H, W)):
        return Verdict(
            False, "i is the row and j the column; you have them the other way round."
        )
    if np.count_nonzero(got) == 1:
        return Verdict(False, "The output has read nine pixels, not one.")
    rows, columns = np.nonzero(got)
    return Verdict(
        False,
        f"Your pixels lie in rows {rows.min()} to {rows.max()} and columns {columns.min()} to {columns.max()}; "
        f"for i = {i}, j = {j} the output has read rows {i} to {i + 2} and columns {j} to {j + 2}. "
        "The gradient of a pixel is the weight that it was multiplied by.",
    )


def _answer(image: np.ndarray, kernel: np.ndarray) -> float:
    """The strongest answer of the kernel to the image, of either sign."""
    return float(
        np.abs(ops.conv2d(image[None, :, :, None], kernel[:, :, None, None]).data).max()
    )


def _placed(values: np.ndarray, i: int, j: int, H: int, W: int) -> np.ndarray:
    dx = np.zeros((H, W))
    part = dx[i : i + 3, j : j + 3]
    part[:] = values[: part.shape[0], : part.shape[1]]
    return dx


def _raised(e: Exception, when: str) -> Verdict:
    return Verdict(False, f"Your function raises {type(e).__name__}: {e} ({when}).")
