"""Checkers for notebook 10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from course import NEEDS, Verdict, unanswered
from emulator_10 import SECTOR, KernelError, Written, report, unwritten, write


def _written(text: Any) -> Written | Verdict:
    """The compiled kernel, or the verdict on a text that is none."""
    if verdict := unanswered(text):
        return verdict
    if not isinstance(text, str):
        return Verdict(False, f"The kernel's text is wanted; this is a {type(text).__name__}.")
    if not NEEDS["emulator"][0]():
        return Verdict(
            False, "The emulator is not here to try it; the first cell says how to bring it."
        )
    try:
        return write(text)
    except KernelError as e:
        return Verdict(False, f"{e}.")


def barriers(text: str) -> Verdict:
    """10.1: `smooth` with a barrier before the neighbour is read, and one before it is overwritten."""
    kernel = _written(text)
    if isinstance(kernel, Verdict):
        return kernel
    x = np.random.default_rng(1).standard_normal(128).astype(np.float32)
    for order in ("forward", "reverse", "random"):
        for rounds in (0, 1, 5):
            y, wanted = unwritten(128), x.copy()
            for _ in range(rounds):
                wanted = (wanted + np.roll(wanted, -1)) / 2
            kernel.order(order)
            try:
                kernel.launch("smooth", 1, 128, x, y, rounds)
            except KernelError as e:
                return Verdict(
                    False,
                    f"{_hint(str(e))} The emulator says:\n\n```\n{report(kernel, e)}\n```",
                )
            if np.isnan(y).any():
                return Verdict(
                    False, f"After {rounds} rounds some numbers of y are not written, or NaN."
                )
            if not np.allclose(y, wanted, atol=1e-5):
                return Verdict(
                    False,
                    f"No race, but after {rounds} rounds the numbers are wrong: the sum must stay as it was.",
                )
    return Verdict(
        True,
        "Nobody reads a neighbour that is not written yet, nor overwrites one that is still to be read.",
    )


def _hint(told: str) -> str:
    """What the emulator's report means for this kernel."""
    if "race (write after read)" in told:
        return (
            "A thread overwrites its number while its left neighbour may still have to read it."
        )
    if "race" in told or "unwritten" in told:
        return (
            "A thread reads its neighbour's number, and nothing says that it is written by now."
        )
    if "barrier" in told or "syncthreads" in told:
        return (
            "A barrier is for all threads of the block: none may pass it by, or return before."
        )
    return "The kernel cannot run like this."


def coalesced(text: str) -> Verdict:
    """10.2: `add_bias` with neighbouring threads on neighbouring numbers."""
    kernel = _written(text)
    if isinstance(kernel, Verdict):
        return kernel
    asked = least = 0
    for N, C in ((100, 48), (7, 5), (1, 2000)):
        rng = np.random.default_rng(N)
        x, b = (rng.standard_normal(s).astype(np.float32) for s in ((N, C), (C,)))
        y = unwritten(N, C)
        kernel.order("forward")
        try:
            kernel.launch("add_bias", 8, 128, x, b, y, N, C)
        except KernelError as e:
            return Verdict(
                False,
                f"With N = {N} and C = {C} the emulator says:\n\n```\n{report(kernel, e)}\n```",
            )
        if missing := int(np.isnan(y).sum()):
            return Verdict(
                False,
                f"With N = {N} and C = {C}, {missing} of {y.size} numbers of y are not "
                "written. There are 1024 threads; where there are more numbers, a thread must "
                "take several.",
            )
        if not np.allclose(y, x + b, atol=1e-6):
            return Verdict(
                False,
                f"With N = {N} and C = {C} the numbers are wrong. Number i of x is of channel i % C.",
            )
        if (N, C) == (100, 48):
            asked, least = kernel.traffic.bytes() // SECTOR, 2 * x.nbytes // SECTOR
    if asked > 2 * least:
        return Verdict(
            False,
            f"The numbers are right. But the warps ask for {asked:,} sectors where x and y "
            f"have {least:,}: what does thread t + 1 read while thread t reads x[n * C + c]?",
        )
    return Verdict(
        True,
        f"{asked:,} sectors: {least:,} for x and y, the rest for the bias, which a GPU's cache would hold.",
    )


def swizzle(place: Callable[[int, int], int]) -> Verdict:
    """10.3: 1024 different words; a row and a column each in 32 different banks."""
    words = np.zeros((32, 32), int)
    for row in range(32):
        for column in range(32):
            try:
                word = place(row, column)
            except Exception as e:
                return Verdict(False, f"Your function stopped with {type(e).__name__}: {e}")
            if verdict := unanswered(word):
                return verdict
            if not isinstance(word, int | np.integer):
                return Verdict(
                    False, f"A whole number is wanted; you return a {type(word).__name__}."
                )
            if not 0 <= word < 1024:
                return Verdict(
                    False,
                    f"place({row}, {column}) is {word}, but there are the words 0 to 1023 only: no padding.",
                )
            words[row, column] = word
    if len(np.unique(words)) < 1024:
        _, first, count = np.unique(words, return_index=True, return_counts=True)
        word = words.flat[first[count > 1][0]]
        two = [tuple(map(int, at)) for at in np.argwhere(words == word)[:2]]
        return Verdict(
            False, f"Word {word} would hold two numbers, those of {two[0]} and {two[1]}."
        )
    for what, lines in (("row", words), ("column", words.T)):
        passes = [int(np.bincount(line % 32).max()) for line in lines]
        if max(passes) > 1:
            worst = int(np.argmax(passes))
            return Verdict(
                False,
                f"Reading {what} {worst} takes {passes[worst]} passes: so many of its words "
                f"are in bank {int(np.bincount(lines[worst] % 32).argmax())}.",
            )
    return Verdict(
        True, "Every row and every column is in 32 different banks, and no word is wasted."
    )
