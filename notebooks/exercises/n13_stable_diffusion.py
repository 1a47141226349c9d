"""Checkers for notebook 13."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from course import Verdict, called, close


def layout(in_our_order: Callable[[np.ndarray], Any]) -> Verdict:
    """13.1: axes in our order."""
    rng = np.random.default_rng(0)
    conv, linear, bias = (rng.standard_normal(s) for s in ((5, 4, 3, 2), (5, 4), (5,)))
    got = called(in_our_order, conv)
    if isinstance(got, Verdict):
        return got
    shape = np.shape(got)
    if shape == (5, 4, 3, 2):
        return Verdict(False, "A convolution still has its axes as they were stored.")
    if shape != (3, 2, 4, 5):
        return Verdict(
            False,
            f"A convolution of (out, in, height, width) = (5, 4, 3, 2) must become (3, 2, 4, 5), not {shape}.",
        )
    if not close(got, conv.transpose(2, 3, 1, 0)):
        return Verdict(
            False,
            "The shape is right but the numbers are not: `reshape` changes a shape without moving anything; "
            "`transpose` moves the axes.",
        )
    for stored, wanted, name in ((linear, linear.T, "linear layer"), (bias, bias, "vector")):
        got = called(in_our_order, stored)
        if isinstance(got, Verdict):
            return got
        if not close(got, wanted):
            return Verdict(
                False,
                f"A {name} of shape {stored.shape} must become one of {wanted.shape}, with its axes swapped."
                if stored.ndim == 2
                else "A vector has one axis, and stays as it is.",
            )
    return Verdict(
        True, "That, and the names, are all that lies between their file and our modules."
    )


def heads(heads_of: Callable[[str, Sequence[int], Any], Any]) -> Verdict:
    """13.2: attention_head_dim in both meanings."""
    conditional, unconditional = "UNet2DConditionModel", "UNet2DModel"
    cases = [
        ((conditional, (320, 640, 1280), 8), [8, 8, 8], [40, 80, 160],
         "In UNet2DConditionModel it *is* the number of heads, in spite of its name: Stable Diffusion 1 has 8 everywhere."),
        ((conditional, (320, 640, 1280), [5, 10, 20]), [5, 10, 20], [64, 64, 64],
         "A list has a number for each level; in UNet2DConditionModel these are numbers of heads."),
        ((unconditional, (128, 256, 256), 8), [16, 32, 32], [8, 8, 8],
         "In UNet2DModel it is the size of a head: 128 channels make 16 heads of 8."),
        ((unconditional, (128, 256, 256), None), [1, 1, 1], None,
         "Without a size, UNet2DModel has one head as wide as the level."),
    ]  # fmt: skip
    for given, wanted, swapped, why in cases:
        got = called(heads_of, *given)
        if isinstance(got, Verdict):
            return got
        try:
            got = [int(n) for n in got]
        except (TypeError, ValueError):
            return Verdict(
                False, f"A list with one whole number a level is wanted, not {got!r:.60}."
            )
        if got != wanted:
            hint = "You have it the other way round. " if got == swapped else ""
            return Verdict(False, f"For {given} you give {got}. {hint}{why}")
    return Verdict(True, "Both meanings live in the files of today; the class decides.")


def spelling(spell: Callable[[list[str], list[tuple[str, str]]], Any]) -> Verdict:
    """13.3: byte-pair encoding of a word."""
    merges = [
        ("l", "o"),
        ("o", "w"),
        ("lo", "w"),
        ("e", "r</w>"),
        ("low", "er</w>"),
        ("a", "n"),
    ]
    cases = {
        "cat": ["c", "a", "t</w>"],
        "lower": ["lower</w>"],
        "slow": ["s", "lo", "w</w>"],
        "owl": ["ow", "l</w>"],
        "banana": ["b", "an", "an", "a</w>"],
    }
    for word, wanted in cases.items():
        symbols = [*word[:-1], word[-1] + "</w>"]
        got = called(spell, list(symbols), list(merges))
        if isinstance(got, Verdict):
            return got
        if not isinstance(got, list | tuple) or not all(isinstance(s, str) for s in got):
            return Verdict(False, f"A list of pieces is wanted, not {got!r:.60}.")
        got = list(got)
        if got == wanted:
            continue
        if "".join(got) != "".join(symbols):
            return Verdict(
                False, f"“{word}” became {got}: joined again, these are not its letters."
            )
        if got == symbols:
            return Verdict(
                False, f"“{word}” is still in single characters; {wanted} was wanted."
            )
        if word == "banana":
            return Verdict(False, f"A pair is joined wherever it stands: {wanted}, not {got}.")
        if word == "lower":
            return Verdict(
                False,
                f"“lower” became {got}: what a merge makes can be part of the next; go on until none is left.",
            )
        return Verdict(
            False,
            f"“{word}” became {got}, not {wanted}: of the pairs that are there, the one that was learned *first* is "
            "joined first, and `w</w>` is another symbol than `w`.",
        )
    return Verdict(True, "So one table of pairs spells any text.")
