"""Checkers for notebook 12."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from course import Verdict, answer_of, close, told_of, unanswered


def epoch_and_place(visit: Callable[[int, int, int, int], tuple[int, int]]) -> Verdict:
    """12.1: (epoch, place) of picture i in batch s, with B pictures a batch and N in the set."""
    cases = [(0, 0, 4, 10), (2, 1, 4, 10), (2, 2, 4, 10), (7, 3, 32, 50), (3, 5, 20, 7)]
    no_gap = (
        "You leave the rest of an epoch out where it is no whole batch, or make that batch short. Here the walk goes on "
        "without a gap, into the next epoch: count the visits, not the batches."
    )
    answers = []
    for case in cases:
        got = _numbers(visit, *case, count=2, what="two numbers, the epoch and the place")
        if isinstance(got, Verdict):
            return Verdict(False, no_gap) if "ZeroDivisionError" in got.message else got
        answers.append(got)
    got = np.array(answers)
    right = np.array([divmod(s * B + i, N) for s, i, B, N in cases])
    if close(got, right):
        return Verdict(
            True,
            "Nothing needs to be remembered. A batch may begin in one epoch and end in the next.",
        )

    def answer(formula: Callable[[int, int, int, int], tuple[float, float]]) -> np.ndarray:
        return np.array([formula(*case) for case in cases])

    told = told_of(
        got,
        {
            "The two are exchanged: first the epoch, then the place.": right[:, ::-1],
            "Batches have B pictures each, so s B visits lie before this one, not s.": answer(
                lambda s, i, B, N: divmod(s + i, N)
            ),
            "That is where the batch begins; picture i of it comes i visits later.": answer(
                lambda s, i, B, N: divmod(s * B, N)
            ),
            "That is right where N is a multiple of B; otherwise a batch reaches over the end of an epoch, and the next "
            "epoch begins in its middle.": answer(lambda s, i, B, N: (s * B // N, (s * B + i) % N)),
            "A place must be below N; beyond it the next epoch has begun.": answer(
                lambda s, i, B, N: (s * B // N, s * B % N + i)
            ),
            "The epoch must be a whole number: // drops the remainder.": answer(
                lambda s, i, B, N: ((s * B + i) / N, (s * B + i) % N)
            ),
            "Batches count from 0: batch 0 makes the visits 0 to B - 1.": answer(
                lambda s, i, B, N: divmod((s - 1) * B + i, N)
            ),
            "Pictures count from 0: the first of a batch has i = 0.": answer(lambda s, i, B, N: divmod(s * B + i - 1, N)),
            "The place counts from 0.": right + [0, 1],
        },
    )  # fmt: skip
    if told:
        return told
    for batches in (lambda B, N: max(1, N // B), lambda B, N: -(-N // B)):
        gaps = answer(lambda s, i, B, N, n=batches: (s // n(B, N), s % n(B, N) * B + i))  # type: ignore[misc]
        if close(got, gaps):
            return Verdict(False, no_gap)
    k = int(np.argmax(np.abs(got - right).max(axis=1)))
    s, i, B, N = cases[k]
    return Verdict(
        False,
        f"For s = {s}, i = {i}, B = {B}, N = {N}, {s * B + i} visits lie before this one, so it should be "
        f"({right[k, 0]}, {right[k, 1]}); you return ({got[k, 0]:g}, {got[k, 1]:g}).",
    )


def agreement_and_error(
    agreement: Callable[[np.ndarray, np.ndarray], tuple[float, float]],
) -> Verdict:
    """12.2: the share of equal classes, and sqrt(A (1 - A) / n)."""
    rng = np.random.default_rng(2)
    asked = np.arange(60) % 10
    named = np.where(rng.random(60) < 0.6, asked, rng.integers(0, 10, 60))
    with np.errstate(invalid="ignore"):  # the root of A (1 - A), where A is no share
        got = _numbers(
            agreement, named, asked, count=2, what="two numbers, the agreement and its error", finite=False
        )  # fmt: skip
    if isinstance(got, Verdict):
        return got
    n = len(asked)
    A = np.mean(named == asked)
    error = np.sqrt(A * (1 - A) / n)
    if close(got, [A, error]):
        return Verdict(
            True,
            f"Here {A:.2f} with an error of {error:.2f}. Four times as many pictures would halve it.",
        )
    if close(got[0], n * A):
        return Verdict(
            False, "That is the number of equal ones; divide it by how many pictures there are."
        )
    if close(got[0], 100 * A):
        return Verdict(
            False,
            "That is the agreement in percent; the formula of the error is for shares of 1.",
        )
    if not np.isfinite(got).all():
        verdict = answer_of(lambda: got, shape=(2,))
        assert isinstance(verdict, Verdict)
        return verdict
    return told_of(
        got,
        {
            "The two are exchanged: first the agreement, then its error.": [error, A],
            "That is the share of wrong ones.": [1 - A, error],
            "The agreement is right; the error lacks the root.": [A, error**2],
            "The agreement is right. Its error falls with the number of pictures: where is n?": [A, error * np.sqrt(n)],
            "The agreement is right. n belongs under the root: sqrt(A (1 - A) / n), not sqrt(A (1 - A)) / n.": [
                A, error / np.sqrt(n),
            ],
            "The agreement is right. A (1 - A), not A: at A = 1 there is no error left.": [A, np.sqrt(A / n)],
            "The agreement is right. n is the number of pictures, not of classes.": [A, np.sqrt(A * (1 - A) / 10)],
            "The agreement is right. You divide by n - 1; here by n.": [A, np.sqrt(A * (1 - A) / (n - 1))],
        },
    ) or Verdict(
        False,
        "The agreement is right; the error is not: put it into sqrt(A (1 - A) / n)."
        if close(got[0], A)
        else "The agreement is not the mean of named == asked, a number from 0 to 1.",
    )  # fmt: skip


def picture_distance(distance: Callable[[np.ndarray, np.ndarray], float]) -> Verdict:
    """12.3: root mean square of the difference of two uint8 pictures in [-1, 1], the second mirrored if that is nearer."""
    rng = np.random.default_rng(3)
    a = rng.integers(0, 256, (6, 5, 3), np.uint8)
    other = rng.integers(0, 256, a.shape, np.uint8)
    near = np.clip(a.astype(int) + rng.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)
    seconds = {
        "nearly the same one": near,
        "nearly the same one, mirrored": near[:, ::-1],
        "one that is upside down": near[::-1],
        "one with red and blue exchanged": near[..., ::-1],
        "one turned by half a circle": near[::-1, ::-1],
        "another one": other,
        "itself": a,
    }
    pairs = [(a, second.copy()) for second in seconds.values()]
    answers = []
    with np.errstate(over="ignore", invalid="ignore"):
        for x, y in pairs:
            got = _numbers(
                distance, x.copy(), y.copy(), count=0, what="one number for the two pictures", finite=False
            )  # fmt: skip
            if isinstance(got, Verdict):
                return got
            answers.append(got)
    got = np.array(answers)

    def plain(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(np.mean(((x / 1.0 - y) / 127.5) ** 2)))

    def nearer(
        difference: Callable[[np.ndarray, np.ndarray], float],
        *mirrors: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        ways = mirrors or (lambda y: y[:, ::-1],)
        return np.array([min(difference(x, y), *(difference(x, m(y)) for m in ways)) for x, y in pairs])  # fmt: skip

    right = nearer(plain)
    if close(got, right, 1e-5):
        return Verdict(
            True,
            f"Nearly the same pictures are {right[0]:.2f} apart, also when one is mirrored; two of noise {right[5]:.2f}.",
        )
    for small in (np.uint8, np.int8, np.int16):
        if _overflows(got, pairs, small):
            return Verdict(
                False,
                "Bytes hold 0 to 255: in uint8, 3 - 5 is 254; and in int16, 182 squared is negative. Make floats of both "
                "pictures before you compute.",
            )
    if not np.isfinite(got).all():
        verdict = answer_of(lambda: got, shape=got.shape)
        assert isinstance(verdict, Verdict)
        return verdict
    told = told_of(
        got,
        {
            "The mirror image is never tried: a mirrored copy is a copy.": np.array([plain(*p) for p in pairs]),
            "You only compare with the mirror image; the smaller of both distances is wanted.": np.array(
                [plain(x, y[:, ::-1]) for x, y in pairs]
            ),
            "The larger of the two distances; where the mirror image is nearer, it counts.": np.array(
                [max(plain(x, y), plain(x, y[:, ::-1])) for x, y in pairs]
            ),
            "Your mirror turns the picture upside down. The axes are (H, W, 3): left and right are the second.": nearer(
                plain, lambda y: y[::-1]
            ),
            "Your mirror exchanges the colours. The axes are (H, W, 3): left and right are the second.": nearer(
                plain, lambda y: y[..., ::-1]
            ),
            "That turns the picture by half a circle; only the second axis is to be reversed.": nearer(
                plain, lambda y: y[::-1, ::-1]
            ),
            "Only left and right are exchanged; a picture that is upside down is another picture.": nearer(
                plain, lambda y: y[:, ::-1], lambda y: y[::-1]
            ),
            "Only left and right are exchanged; a picture that is turned is another picture.": nearer(
                plain, lambda y: y[:, ::-1], lambda y: y[::-1], lambda y: y[::-1, ::-1]
            ),
            "Decide once for the whole picture which is nearer, not pixel by pixel.": np.array(
                [
                    np.sqrt(np.mean(np.minimum((x / 127.5 - y / 127.5) ** 2, (x / 127.5 - y[:, ::-1] / 127.5) ** 2)))
                    for x, y in pairs
                ]
            ),
            "In bytes that is right; 255 of them are 2 units, so divide by 127.5.": 127.5 * right,
            "Colours go from -1 to 1, which is 2 wide; you scale as if it were 1: divide by 127.5, not by 255.": right / 2,
            "The root is missing.": right**2,
            "You take the mean of the absolute differences; the root of the mean square is wanted.": nearer(
                lambda x, y: float(np.mean(np.abs(x / 127.5 - y / 127.5)))
            ),
            "You take the sum of the squares. With the mean, pictures of any size can be compared.": np.sqrt(a.size)
            * right,
            "You take the largest difference; the root of the mean square is wanted.": nearer(
                lambda x, y: float(np.max(np.abs(x / 127.5 - y / 127.5)))
            ),
        },
    )  # fmt: skip
    if told:
        return told
    if got[-1] != 0:
        return Verdict(
            False, "A picture is at the distance 0 from itself; by your answer it is not."
        )
    k = int(np.argmax(np.abs(got - right)))
    return Verdict(
        False,
        f"For a picture and {list(seconds)[k]}, {right[k]:.3f} is wanted; you return {got[k]:.3f}.",
    )


def _overflows(got: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]], small: Any) -> bool:
    """Whether these are the distances that come out where differences, or their squares too, are taken in this type."""

    def early(x: np.ndarray, y: np.ndarray, scale: float) -> float:
        return np.sqrt(np.mean(((x.astype(small) - y.astype(small)) / scale) ** 2))

    def late(x: np.ndarray, y: np.ndarray, scale: float) -> float:
        return np.sqrt(np.mean((x.astype(small) - y.astype(small)) ** 2)) / scale

    with np.errstate(over="ignore", invalid="ignore"):
        for difference in (early, late) if small is not np.int16 else (late,):
            for scale in (1.0, 127.5, 255.0):
                one = np.array([difference(x, y, scale) for x, y in pairs])
                two = np.array([difference(x, y[:, ::-1], scale) for x, y in pairs])
                for values in (one, np.minimum(one, two), np.fmin(one, two)):
                    if np.allclose(got, values, rtol=1e-5, atol=0, equal_nan=True):
                        return True
    return False


def _numbers(
    f: Callable[..., Any], *args: Any, count: int, what: str, finite: bool = True
) -> np.ndarray | Verdict:
    """What f answers as `count` floats (0: a single one), or the verdict on an answer that is none."""
    try:
        got = f(*args)
    except Exception as e:
        if "ellipsis" in str(e) and (verdict := unanswered(...)):
            return verdict
        return Verdict(False, f"Your function stopped with {type(e).__name__}: {e}")
    if verdict := unanswered(got):
        return verdict
    shape = (count,) if count else ()
    try:
        there = np.shape(got)
    except ValueError:  # parts of several shapes
        there = (-1,)
    if there != shape:
        return Verdict(False, f"Return {what}.")
    try:
        values = np.asarray(got, float)
    except (TypeError, ValueError):
        return answer_of(lambda: got, shape=shape)  # it says that numbers are wanted
    return answer_of(lambda: values, shape=shape) if finite else values
