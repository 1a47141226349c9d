"""Checkers for notebook 11. No clock of this machine is read: timing is tried out in a small made-up world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from course import Verdict, called, close, told_of, unanswered

ROOFS = [  # operations a byte, operations a second, bytes a second
    (0.5, 600e9, 40e9),
    (1.5, 600e9, 40e9),
    (15.0, 600e9, 40e9),
    (140.0, 600e9, 40e9),
    (4.0, 50e9, 100e9),
    (0.25, 50e9, 100e9),
]


def attainable(speed: Callable[[float, float, float], Any]) -> Verdict:
    """11.1: the roof above an op, min(P, I B)."""
    answers = []
    for case in ROOFS:
        got = called(speed, *case)
        if isinstance(got, Verdict):
            return got
        answers.append(got)
    try:
        numbers = np.array([float(got) for got in answers])
    except (TypeError, ValueError):
        return Verdict(False, f"One number is wanted for each op, not {answers[0]!r}.")
    intensity, P, B = np.array(ROOFS).T
    if close(numbers, np.minimum(P, intensity * B), 1e-9):
        ridge = ROOFS[0][1] / ROOFS[0][2]
        return Verdict(
            True,
            f"Memory gives I B operations a second, the core at most P. In the first machine the two meet at "
            f"{ridge:g} operations a byte.",
        )
    wrong = {
        "The larger of the two is what you would get if the slower half of the machine did not hold you up.": (
            np.maximum(P, intensity * B)
        ),
        "That is the arithmetic ceiling alone. An op of few operations a byte waits for its bytes.": P,
        "That is the memory alone. An op of many operations a byte runs into the arithmetic ceiling.": (
            intensity * B
        ),
        "Bytes a second times *operations a byte* are operations a second; you divide where you should multiply.": (
            np.minimum(P, B / intensity)
        ),
        "One after the other would be this. The processor fetches and calculates at the same time: the slower of "
        "the two counts alone.": 1 / (1 / P + 1 / (intensity * B)),
        "That is a time, the seconds of one operation. A speed is wanted: operations a second.": (
            np.maximum(1 / P, 1 / (intensity * B))
        ),
        "That is a speed in bytes a second. Multiply by the operations that are done on each byte.": (
            np.minimum(P / intensity, B)
        ),
        "The units differ: P and B are given in operations and bytes a second, not in billions.": (
            np.minimum(P, intensity * B) / 1e9
        ),
    }
    if verdict := told_of(numbers, wrong):
        return verdict
    for got, (i, p, b) in zip(numbers, ROOFS, strict=True):
        if not close(got, min(p, i * b), 1e-9):
            return Verdict(
                False,
                f"For I = {i:g} operations a byte, P = {p:g} and B = {b:g} a second: memory delivers {b:g} bytes in a "
                f"second. How many operations is that, and can the core do so many? You say {got:g}.",
            )
    raise AssertionError("one of the answers is wrong")


def passes(bytes_moved: Callable[[int], Any]) -> Verdict:
    """11.2: bytes of silu(x + r) in two passes and in one, float32: 20 n and 12 n."""
    answers = []
    for n in (1, 1000, 3_000_000):
        got = called(bytes_moved, n)
        if isinstance(got, Verdict):
            return got
        if unanswered_part(got):
            return unanswered(...) or Verdict(False, "")
        try:
            pair = np.asarray(got, float)
        except (TypeError, ValueError):
            pair = np.zeros(0)
        if pair.shape != (2,):
            return Verdict(
                False, f"Two numbers are wanted, (in two passes, in one); you return {got!r}."
            )
        answers.append(pair / n)
    a_number = np.array(answers)
    if not close(a_number, np.broadcast_to(a_number[0], a_number.shape), 1e-9):
        return Verdict(False, "Twice as many numbers must be twice as many bytes.")
    two, one = a_number[0]
    if close([two, one], [20, 12]):
        return Verdict(
            True,
            "20 bytes a number against 12: what is saved is the array in between, written once and read once.",
        )
    if close([two, one], [12, 20]):
        return Verdict(False, "The two are the wrong way round: two passes move more.")
    if close([two, one], [5, 3]):
        return Verdict(
            False, "Those are numbers. A float32 has 4 bytes; the ceiling is in bytes a second."
        )
    if close([two, one], [40, 24]):
        return Verdict(False, "A float32 has 4 bytes, not 8.")
    if close(two, one):
        return Verdict(
            False,
            "The same for both? In two passes x + r is written to memory, and read again for the SiLU.",
        )
    if not close(two, 20):
        hint = {
            12: "Count what is *written* as well as what is read.",
            8: "Count what is *written* as well as what is read.",
            16: "One of the five is missing: x and r are read, x + r is written; it is read, and y is written.",
        }.get(round(float(two)), "Write down what each pass reads and what it writes.")
        return Verdict(False, f"In two passes you count {two:g} bytes a number. {hint}")
    hint = {
        8: "It has two inputs and one output.",
        16: "In one pass x + r stays in a register: it is not written, and not read.",
        4: "Count what is read as well as what is written.",
    }.get(round(float(one)), "What must come from memory, and what must go there?")
    return Verdict(False, f"Two passes are right. In one pass you count {one:g} bytes. {hint}")


def unanswered_part(got: Any) -> bool:
    """Whether an answer of several parts has one that was left as `...`."""
    return isinstance(got, tuple | list) and any(part is ... for part in got)


# ---- a made-up world


class World:
    """Calls that take a known time on a clock of their own. The first of each is slow, and so is all from a moment on."""

    true = MappingProxyType({"ours": 1.0, "theirs": 2.0})
    repeats = 9
    cold, slow, slow_from, hiccup = 40.0, 3.0, 14, 25.0
    jitter = (1.0, 1.04, 0.96, 1.0, 0.94, 1.02, 0.98, 1.0, 1.05, 0.97)  # of each one's calls

    def __init__(self) -> None:
        self.now, self.reads = 100.0, 0
        self.order: list[str] = []
        self.took: dict[str, list[float]] = {name: [] for name in self.true}

    def clock(self) -> float:
        """Seconds since some moment."""
        self.reads += 1
        return self.now

    def calls(self) -> dict[str, Callable[[], None]]:
        """The functions to be timed."""
        return {name: (lambda n=name: self._call(n)) for name in self.true}

    def _call(self, name: str) -> None:
        seconds = self.true[name] * self.jitter[len(self.took[name]) % len(self.jitter)]
        if not self.took[name]:
            seconds *= self.cold
        if len(self.order) >= self.slow_from:
            seconds *= self.slow
        if len(self.order) in (6, 15):  # now and then a call is held up
            seconds *= self.hiccup
        self.order.append(name)
        self.took[name].append(seconds)
        self.now += seconds


def honest(measure: Callable[..., Any]) -> Verdict:
    """11.3: {name: median seconds}, each call warmed up once and then taken in turns."""
    world = World()
    names = list(world.true)
    got = called(measure, world.calls(), world.repeats, world.clock)
    if isinstance(got, Verdict):
        return got
    if not isinstance(got, Mapping) or set(got) != set(names):
        return Verdict(
            False,
            f"A dict with the same names is wanted, {{name: seconds}}; you return {got!r}.",
        )
    if any(v is ... for v in got.values()):
        return unanswered(...) or Verdict(False, "")
    try:
        seconds = {name: float(got[name]) for name in names}
    except (TypeError, ValueError):
        return Verdict(False, "One number is wanted for each name: its median seconds.")
    counts = {name: len(took) for name, took in world.took.items()}
    if not world.reads:
        return Verdict(
            False,
            "Use the `clock` that you are given: call it before and after. Here it is not the time of day.",
        )
    if 0 in counts.values():
        return Verdict(
            False,
            f"“{min(counts, key=lambda n: counts[n])}” was never called: calls[name]() runs it.",
        )
    if set(counts.values()) == {world.repeats}:
        return Verdict(
            False,
            f"Each was called {world.repeats} times: the warm-up is missing. Call each once more, before the clock counts.",
        )
    if set(counts.values()) != {world.repeats + 1}:
        told = ", ".join(f"{n} {c} times" for n, c in counts.items())
        return Verdict(
            False,
            f"Called: {told}. Wanted: one warm-up and then {world.repeats} timings of each, of one call each.",
        )
    answers = list(seconds.values())

    def summed(f: Callable[[list[float]], float], skip: int = 1) -> list[float]:
        return [float(f(world.took[name][skip:])) for name in names]

    if not in_rounds(world.order, names):
        ratio = seconds[names[1]] / seconds[names[0]] if seconds[names[0]] else float("nan")
        return Verdict(
            False,
            f"You take all timings of one, then all of the other; meanwhile this machine became {world.slow:g} times "
            f"slower. You would report a factor of {ratio:.3g}; the truth is 2. Let each have its turn in every round.",
        )
    if close(answers, summed(np.median), 1e-9):
        ratio = answers[1] / answers[0]
        return Verdict(
            True,
            f"The machine became {world.slow:g} times slower half way, the first calls took {world.cold:g} times as long, "
            f"two were held up, and the factor between the two is still {ratio:.3g}.",
        )
    wrong = {
        "You take the mean. One call that was held up moves it; the median does not see it.": summed(
            np.mean
        ),
        "You take the shortest. It is the luckiest moment of each, and says nothing of how it usually goes; the "
        "median is wanted.": summed(np.min),
        "You take the longest: that is the call that was held up.": summed(np.max),
        "You take the last timing alone, or the first: a single timing lies.": summed(
            lambda t: t[-1]
        ),
        "Your median counts the warm-up too. Call each once before the clock counts.": summed(
            np.median, 0
        ),
        "Your mean counts the warm-up too; and a median is wanted.": summed(np.mean, 0),
        "That is the sum. The median of the single timings is wanted.": summed(np.sum),
        "The two are exchanged: each name has the other's time.": summed(np.median)[::-1],
    }
    if close(answers, summed(lambda t: t[0]), 1e-9):
        return Verdict(
            False, "You take the last timing alone, or the first: a single timing lies."
        )
    if verdict := told_of(np.array(answers), wrong):
        return verdict
    return Verdict(
        False,
        "Calls and turns are right, the numbers are not. Read the clock right before and right after each single call, "
        "keep the differences, and take np.median of them.",
    )


def in_rounds(order: list[str], names: list[str]) -> bool:
    """Whether, after the first call of each, every round holds each name once."""
    rest, seen = [], set()
    for name in order:
        if name in seen:
            rest.append(name)
        seen.add(name)
    n = len(names)
    return all(set(rest[i : i + n]) == set(names) for i in range(0, len(rest), n))
