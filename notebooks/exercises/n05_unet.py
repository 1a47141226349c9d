"""Checkers for notebook 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from course import Verdict, called, close, unanswered
from minidiff import ops
from minidiff.models.unet import UNet, UNetConfig


def level_shapes(features_at: Callable[[int, int, tuple[int, ...], int], Any]) -> Verdict:
    """5.1: (H, W, C) of the features at a level."""
    for H, W, channels, level in (
        (32, 32, (16, 32, 48), 0),
        (32, 48, (16, 32, 48), 1),
        (64, 32, (8, 16, 24, 40), 3),
    ):
        got = _called(features_at, H, W, channels, level)
        if isinstance(got, Verdict):
            return got
        try:
            got = tuple(float(n) for n in got)
        except (TypeError, ValueError):
            return Verdict(False, f"Return three numbers (H, W, C), not {got!r}.")
        where = f"features_at({H}, {W}, {channels}, {level})"
        if len(got) != 3:
            return Verdict(
                False, f"{where}: three numbers are wanted, (H, W, C); you give {len(got)}."
            )
        if not np.isfinite(got).all():
            return Verdict(False, f"{where}: NaN or infinity is no size.")
        wanted = (H / 2**level, W / 2**level, channels[level])
        if got == wanted:
            continue
        told = tuple(f"{n:g}" for n in got)
        if got == (wanted[2], *wanted[:2]):
            why = "the channels come last: (H, W, C)."
        elif got[:2] == (W / 2**level, H / 2**level) and H != W:
            why = "height and width are exchanged."
        elif got[:2] == (H / 2 ** (level + 1), W / 2 ** (level + 1)):
            why = "one halving too many: level 0 is the full size."
        elif level > 1 and got[:2] in (
            (H / (2 * level), W / (2 * level)),
            (H / level, W / level),
        ):
            why = "halving three times divides by 2 · 2 · 2, not by 2 + 2 + 2."
        elif level > 0 and got[:2] == (H, W):
            why = "each level below the first has half the height and width of the one above."
        elif got[:2] != wanted[:2]:
            why = "how often has the image been halved at that level?"
        else:
            why = "the size is right; the number of channels stands in the configuration, one entry a level."
        return Verdict(False, f"{where} gives ({', '.join(told)}): {why}")
    return Verdict(
        True,
        "Half the side means a quarter of the positions, so the lower levels can afford more channels.",
    )


def up_widths(inputs_of_up: Callable[[tuple[int, ...], int], Any]) -> Verdict:
    """5.2: channels that the two residual blocks of each up block take in, with blocks = 1."""
    for channels in ((16, 32, 48), (8, 24, 40, 56)):
        levels = len(channels)
        config = UNetConfig(
            channels=channels,
            blocks=1,
            attention=("none",) * levels,
            mid_attention="none",
            heads=(1,) * levels,
            transformer_layers=(1,) * levels,
            norm_groups=8,
        )
        real = [
            [r.conv1.weight.wanted_shape[2] for r in up.resnets]
            for up in UNet(config, seed=None).up_blocks
        ]
        for level in reversed(range(levels)):
            wanted = real[levels - 1 - level]
            got = _called(inputs_of_up, channels, level)
            if isinstance(got, Verdict):
                return got
            try:
                got = [float(n) for n in got]
            except (TypeError, ValueError):
                return Verdict(False, f"Return two numbers, one for each block, not {got!r}.")
            where = f"channels {channels}, level {level}"
            if len(got) != 2:
                return Verdict(
                    False,
                    f"{where}: there are two residual blocks; you give {len(got)} numbers.",
                )
            if not np.isfinite(got).all():
                return Verdict(False, f"{where}: NaN or infinity is no number of channels.")
            if got == wanted:
                continue
            below = channels[min(level + 1, levels - 1)]
            c = channels[level]
            if got == wanted[::-1]:
                why = "those are the right two in the wrong order: what comes from below enters the first block."
            elif got == [below, c]:
                why = "you count what comes from below, but not the skip beside it."
            elif got[0] == wanted[0] and got[1] == 2 * c:
                why = (
                    "the first is right. The second block's skip is the level's very first result: what came in "
                    "from the level above, with that one's channels."
                )
            elif got[0] == 2 * c and wanted[0] != 2 * c:
                why = "into the first block goes what comes up from the level below, with that one's channels."
            elif got[0] != wanted[0]:
                why = "the first block's number is wrong: features from below, and the last skip of this level beside them."
            else:
                why = "the first is right, the second is not: the first block has made the level's own channels by now."
            return Verdict(False, f"{where}: {[round(n) for n in got]}; {why}")
    return Verdict(
        True,
        "So the way up has wider convolutions than the way down, and most of the parameters.",
    )


def embedding(embed: Callable[[float, int, float], Any]) -> Verdict:
    """5.3: the timestep embedding of one t."""
    t, dim, period = 37.0, 8, 10000.0
    got = _called(embed, t, dim, period)
    if isinstance(got, Verdict):
        return got
    try:
        got = np.asarray(got, float)
    except (TypeError, ValueError):
        return Verdict(False, f"Return an array of numbers, not {type(got).__name__}.")
    if got.shape != (dim,):
        return Verdict(
            False,
            f"A vector of shape ({dim},) is wanted, not {got.shape}: dim / 2 cosines, then dim / 2 sines (np.concatenate).",
        )
    if not np.isfinite(got).all():
        return Verdict(False, "There is NaN or infinity in it.")
    i = np.arange(dim // 2)

    def waves(f: np.ndarray, at: float = t) -> np.ndarray:
        return np.concatenate([np.cos(at * f), np.sin(at * f)])

    f = period ** (-i / (dim // 2))
    if close(got, waves(f), 1e-5):
        other = _called(embed, 5.0, 6, 100.0)
        if not isinstance(other, Verdict) and close(
            other, ops.timestep_embedding(np.array([5.0]), 6, period=100.0)[0], 1e-5
        ):
            return Verdict(
                True,
                "The first pair of waves turns once in 6.3 steps, the last one hardly at all: fine and coarse clocks.",
            )
        return Verdict(
            False,
            "Right for t = 37, dim = 8, period = 10000, but not for other numbers: use the arguments.",
        )
    half = dim // 2
    for told, wrong in {
        "Sines and cosines are exchanged: the cosines come first.": np.concatenate(
            [np.sin(t * f), np.cos(t * f)]
        ),
        "Cosines and sines alternate in your vector; here all cosines come first, then all sines.": np.stack(
            [np.cos(t * f), np.sin(t * f)], axis=1
        ).ravel(),
        "Sines and cosines alternate in your vector; here all cosines come first, then all sines.": np.stack(
            [np.sin(t * f), np.cos(t * f)], axis=1
        ).ravel(),
        "The exponent lacks its minus: your frequencies grow from 1 to 1000 in place of falling.": waves(
            1 / f
        ),
        "The exponent is i over dim; it must be i over the number of frequencies, dim / 2.": waves(
            period ** (-i / dim)
        ),
        "The last frequency is 1 / period; the exponent is i / (dim / 2), which never reaches 1.": waves(
            period ** (-i / (half - 1))
        ),
        "The base is e; the frequencies are powers of `period`.": waves(np.exp(-i / half)),
        "You embed t - 1; here t itself is wanted (the network takes the 1 off before).": waves(
            f, t - 1
        ),
        "i counts from 0: the first frequency is 1.": waves(period ** (-(i + 1) / half)),
        "Those are the frequencies; the waves are the cosines and sines of t times them.": np.concatenate(
            [f, f]
        ),
        "Those are the angles; take their cosines and sines.": np.concatenate([t * f, t * f]),
        "t is missing: the angle is t times the frequency.": waves(f, 1.0),
    }.items():
        if close(got, wrong, 1e-5):
            return Verdict(False, told)
    if close(got[:half] ** 2 + got[half:] ** 2, np.ones(half), 1e-5):
        return Verdict(
            False,
            "They are cosines and sines of one angle each, as they should be, but the angles are wrong: "
            "the frequencies are period^(-i / (dim / 2)).",
        )
    return Verdict(
        False,
        "Number i and number i + dim / 2 must be the cosine and the sine of the same angle: their squares add up to 1.",
    )


def _called(answer: Callable[..., Any], *inputs: Any) -> Any:
    """What the answer gives, or the verdict on one that raises or is none."""
    got = called(answer, *inputs)
    unfinished = isinstance(got, tuple | list) and any(x is ... for x in got)
    return unanswered(...) if unfinished else got
