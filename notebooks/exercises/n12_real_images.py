"""Checkers for notebook 12."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from course import Verdict, answer_of, close, told_of


def epoch_and_place(visit: Callable[[int, int, int, int], tuple[int, int]]) -> Verdict:
    """12.1: (epoch, place) of picture i in the batch of step s, with B pictures a step and N in the set."""
    cases = [(0, 0, 4, 10), (2, 1, 4, 10), (2, 2, 4, 10), (7, 3, 32, 50), (3, 5, 20, 7)]

    def all_cases(*_: int) -> np.ndarray:
        return np.array([_numbers(visit(*case)) for case in cases])

    got = answer_of(all_cases, shape=(len(cases), 2))
    if isinstance(got, Verdict):
        return got
    right = np.array([divmod(s * B + i, N) for s, i, B, N in cases])
    if close(got, right):
        return Verdict(
            True,
            "Nothing needs to be remembered. A batch may begin in one epoch and end in the next.",
        )
    return told_of(
        got,
        {
            "The two are exchanged: first the epoch, then the place.": right[:, ::-1],
            "Steps have B pictures each, so s B visits lie before this batch, not s.": np.array(
                [divmod(s + i, N) for s, i, B, N in cases]
            ),
            "That is where the batch begins; picture i of it comes i visits later.": np.array(
                [divmod(s * B, N) for s, i, B, N in cases]
            ),
            "That is right while N divides by B; otherwise a batch reaches over the end of an epoch, and the next epoch "
            "begins in its middle.": np.array(
                [divmod(s * B, N)[0] * np.array([1, 0]) + [0, (s * B + i) % N] for s, i, B, N in cases]
            ),
            "You leave the rest of an epoch out where it is no whole batch. Here the walk goes on without a gap: count the "
            "visits, not the batches.": np.array(
                [(s // max(1, N // B), s % max(1, N // B) * B + i) for s, i, B, N in cases]
            ),
            "The epoch must be a whole number: // divides without a rest.": np.array(
                [((s * B + i) / N, (s * B + i) % N) for s, i, B, N in cases]
            ),
            "The step counts from 0: step 0 makes the visits 0 to B - 1.": np.array(
                [divmod((s - 1) * B + i, N) for s, i, B, N in cases]
            ),
        },
    ) or Verdict(
        False,
        "For s = 2, i = 2, B = 4, N = 10 it should be (1, 0): ten visits, a whole epoch, lie before it.",
    )  # fmt: skip


def agreement_and_error(
    agreement: Callable[[np.ndarray, np.ndarray], tuple[float, float]],
) -> Verdict:
    """12.2: the share of equal classes, and sqrt(A (1 - A) / n)."""
    rng = np.random.default_rng(2)
    asked = np.arange(60) % 10
    named = np.where(rng.random(60) < 0.6, asked, rng.integers(0, 10, 60))
    got = answer_of(lambda a, b: _numbers(agreement(a, b)), named, asked, shape=(2,))
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
    return told_of(
        got,
        {
            "The two are exchanged: first the agreement, then its error.": [error, A],
            "That is the number of equal ones; divide it by how many there are.": [n * A, error],
            "That is the share of wrong ones.": [1 - A, error],
            "The agreement is right; the error lacks the root.": [A, error**2],
            "The agreement is right. Its error falls with the number of pictures: where is n?": [A, error * np.sqrt(n)],
            "The agreement is right. Under the root, divide by n, not by its square.": [A, error / np.sqrt(n)],
            "The agreement is right. Only the numerator is under your root; n belongs there, too.": [A, np.sqrt(A * (1 - A)) / n],
            "The agreement is right. A (1 - A), not A: at A = 1 there is no error left.": [A, np.sqrt(A / n)],
            "The agreement is right. n is the number of pictures, not of classes.": [A, np.sqrt(A * (1 - A) / 10)],
            "In percent it is the same, but the question is for shares of 1.": [100 * A, 100 * error],
        },
    ) or Verdict(
        False,
        f"The agreement is {'right' if close(got[0], A) else 'the mean of named == asked'}"
        + (
            "; the error is not: put it into sqrt(A (1 - A) / n)."
            if close(got[0], A)
            else ", a number from 0 to 1."
        ),
    )  # fmt: skip


def picture_distance(distance: Callable[[np.ndarray, np.ndarray], float]) -> Verdict:
    """12.3: root mean square of the difference of two uint8 pictures in [-1, 1], the second mirrored if that is nearer."""
    rng = np.random.default_rng(3)
    a = rng.integers(0, 256, (6, 5, 3), np.uint8)
    other = rng.integers(0, 256, a.shape, np.uint8)
    near = np.clip(a.astype(int) + rng.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)
    ways = [near, near[:, ::-1], near[::-1], near[..., ::-1], near[::-1, ::-1], other, a]
    pairs = [(a, way.copy()) for way in ways]

    def all_pairs() -> np.ndarray:
        return np.array([_numbers(distance(x.copy(), y.copy())) for x, y in pairs])

    with np.errstate(over="ignore"):
        got = answer_of(all_pairs, shape=(len(pairs),))
    if isinstance(got, Verdict):
        return got

    def each(
        difference: Callable[[np.ndarray, np.ndarray], float],
        mirror: Callable[[np.ndarray], np.ndarray] = lambda y: y[:, ::-1],
    ) -> np.ndarray:
        return np.array([min(difference(x, y), difference(x, mirror(y))) for x, y in pairs])

    def plain(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(np.mean(((x / 1.0 - y) / 127.5) ** 2)))

    def wrapped(x: np.ndarray, y: np.ndarray, scale: float = 127.5) -> float:
        return float(np.sqrt(np.mean(((x - y) / scale) ** 2)))

    def wrapped_squares(x: np.ndarray, y: np.ndarray, scale: float = 127.5) -> float:
        return float(np.sqrt(np.mean((x - y) ** 2)) / scale)

    right = each(plain)
    if close(got, right, 1e-5):
        return Verdict(
            True,
            f"The first pair is {right[0]:.2f} apart, the mirrored one as much, two of noise {right[5]:.2f}.",
        )
    overflow = "Bytes cannot be negative: in uint8, 3 - 5 is 254. Make floats of both before you subtract."
    told = told_of(
        got,
        {
            "The mirror image is never tried: a mirrored copy is a copy.": np.array([plain(*p) for p in pairs]),
            "You only compare with the mirror image; the smaller of both distances is wanted.": np.array(
                [plain(x, y[:, ::-1]) for x, y in pairs]
            ),
            "Your mirror turns the picture upside down. The axes are (H, W, 3): left and right are the second.": each(
                plain, lambda y: y[::-1]
            ),
            "Your mirror exchanges the colours. The axes are (H, W, 3): left and right are the second.": each(
                plain, lambda y: y[..., ::-1]
            ),
            "That turns the picture by half a circle; only the second axis is to be reversed.": each(
                plain, lambda y: y[::-1, ::-1]
            ),
            "In bytes that is right; 255 of them are 2 units, so divide by 127.5.": 127.5 * right,
            "Colours go from -1 to 1, which is 2 wide; you scale as if it were 1: divide by 127.5, not by 255.": right / 2,
            "The root is missing.": right**2,
            "You take the mean of the absolute differences; the root of the mean square is wanted.": each(
                lambda x, y: float(np.mean(np.abs(x / 127.5 - y / 127.5)))
            ),
            "You take the sum of the squares. With the mean, pictures of any size can be compared.": np.sqrt(a.size)
            * right,
            "You take the largest difference; the root of the mean square is wanted.": each(
                lambda x, y: float(np.max(np.abs(x / 127.5 - y / 127.5)))
            ),
            "The larger of the two distances; where the mirror image is nearer, it counts.": np.array(
                [max(plain(x, y), plain(x, y[:, ::-1])) for x, y in pairs]
            ),
        },
    )  # fmt: skip
    if told:
        return told
    for scale in (1.0, 127.5, 255.0):
        for difference in (wrapped, wrapped_squares):
            for values in (
                each(lambda x, y, d=difference, s=scale: d(x, y, s)),  # type: ignore[misc]
                np.array([difference(x, y, scale) for x, y in pairs]),
            ):
                if close(got, values, 1e-5):
                    return Verdict(False, overflow)
    if got[6] != 0:
        return Verdict(
            False, "A picture is at the distance 0 from itself; by your answer it is not."
        )
    return Verdict(
        False,
        f"For the first pair, which are near to each other, {right[0]:.3f} is wanted; you return {got[0]:.3g}.",
    )


def _numbers(answer: object) -> np.ndarray:
    """What somebody answered as an array; `...` and None go through, for `answer_of` to tell of."""
    if answer is ... or answer is None:
        raise TypeError("ellipsis")
    return np.asarray(answer, float)
