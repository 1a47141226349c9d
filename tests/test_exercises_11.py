"""The checkers of notebook 11 take right answers, and say of wrong ones what is wrong."""

import numpy as np
import pytest
from exercises import n11_how_fast as check
from solutions import n11_how_fast as solution


def test_solutions_are_right():
    assert check.attainable(solution.attainable).right
    assert check.attainable(lambda i, p, b: 1 / max(1 / p, 1 / (i * b))).right
    assert check.passes(solution.bytes_moved).right
    assert check.passes(lambda n: [20 * n, 12 * n]).right
    assert check.honest(solution.measure).right


def test_no_answer_is_told_so():
    for verdict in (
        check.attainable(lambda *a: ...),
        check.passes(lambda n: ...),
        check.passes(lambda n: (..., ...)),
        check.honest(lambda *a: None),
        check.honest(lambda calls, repeats, clock: dict.fromkeys(calls, ...)),
    ):
        assert not verdict.right and "..." in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda i, p, b: max(p, i * b), "larger of the two"),
        (lambda i, p, b: p, "arithmetic ceiling alone"),
        (lambda i, p, b: i * b, "memory alone"),
        (lambda i, p, b: min(p, b / i), "multiply"),
        (lambda i, p, b: 1 / (1 / p + 1 / (i * b)), "at the same time"),
        (lambda i, p, b: max(1 / p, 1 / (i * b)), "That is a time"),
        (lambda i, p, b: min(p / i, b), "bytes a second"),
        (lambda i, p, b: min(p, i * b) / 1e9, "not in billions"),
        (lambda i, p, b: min(p, b), "For I = 0.5"),
        (lambda i, p, b: float("nan"), "You say nan"),
        (lambda i, p, b: "fast", "One number"),
        (lambda i, p, b: (p, i * b), "One number"),
        (lambda i, p, b: p / 0, "raises ZeroDivisionError"),
    ],
)
def test_wrong_roofs(answer, told):
    verdict = check.attainable(answer)
    assert not verdict.right and told in verdict.message


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda n: (12 * n, 20 * n), "wrong way round"),
        (lambda n: (5 * n, 3 * n), "4 bytes"),
        (lambda n: (40 * n, 24 * n), "not 8"),
        (lambda n: (12 * n, 12 * n), "The same for both"),
        (lambda n: (12 * n, 8 * n), "what is *written*"),
        (lambda n: (16 * n, 12 * n), "One of the five"),
        (lambda n: (24 * n, 12 * n), "what each pass reads"),
        (lambda n: (20 * n, 8 * n), "two inputs"),
        (lambda n: (20 * n, 16 * n), "stays in a register"),
        (lambda n: (20 * n, 4 * n), "as well as what is written"),
        (lambda n: (20 * n, 10 * n), "must come from memory"),
        (lambda n: (20 * n + 8, 12 * n), "Twice as many"),
        (lambda n: (20, 12), "Twice as many"),
        (lambda n: 20 * n, "Two numbers"),
        (lambda n: ("many", "few"), "Two numbers"),
        (lambda n: (float("nan"), 12 * n), "Twice as many"),
        (lambda n: n[0], "raises TypeError"),
    ],
)
def test_wrong_bytes(answer, told):
    verdict = check.passes(answer)
    assert not verdict.right and told in verdict.message


def one_after_the_other(calls, repeats, clock):
    seconds = {}
    for name, call in calls.items():
        call()
        seconds[name] = np.median([timed(call, clock) for _ in range(repeats)])
    return seconds


def timed(call, clock):
    since = clock()
    call()
    return clock() - since


def taken(statistic, warm_ups=1, rounds=None, swap=False):
    """A measurement in turns, with this statistic of each one's timings."""

    def measure(calls, repeats, clock):
        for _ in range(warm_ups):
            for call in calls.values():
                call()
        seconds = {name: [] for name in calls}
        for _ in range(rounds or repeats):
            for name, call in calls.items():
                seconds[name].append(timed(call, clock))
        result = {name: statistic(s) for name, s in seconds.items()}
        return dict(zip(result, list(result.values())[::-1], strict=True)) if swap else result

    return measure


def warm_up_counted(calls, repeats, clock):
    seconds = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            seconds[name].append(timed(call, clock))
    return {name: np.median(s) for name, s in seconds.items()}


def no_clock(calls, repeats, clock):
    return taken(np.median)(calls, repeats, lambda: 0.0)


def one_forgotten(calls, repeats, clock):
    return {name: timed(calls["ours"], clock) for name in calls}


def one_clock_for_all(calls, repeats, clock):
    since = clock()
    seconds = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            call()
            seconds[name].append(clock() - since)
    return {name: np.median(s[1:]) for name, s in seconds.items()}


@pytest.mark.parametrize(
    "answer, told",
    [
        (one_after_the_other, "a factor of 5.8"),
        (taken(np.mean), "You take the mean"),
        (taken(np.min), "You take the shortest"),
        (taken(np.max), "You take the longest"),
        (taken(np.sum), "That is the sum"),
        (taken(lambda s: s[-1]), "a single timing lies"),
        (taken(lambda s: s[0]), "a single timing lies"),
        (taken(np.median, swap=True), "exchanged"),
        (taken(np.median, warm_ups=0), "warm-up is missing"),
        (taken(np.median, rounds=3), "ours 4 times"),
        (taken(np.median, warm_ups=3), "ours 12 times"),
        (taken(lambda s: np.median(s) * 1e3), "right before and right after"),
        (taken(lambda s: float("nan")), "right before and right after"),
        (taken(lambda s: "fast"), "One number"),
        (warm_up_counted, "counts the warm-up too. Call"),
        (one_clock_for_all, "right before and right after"),
        (no_clock, "Use the `clock`"),
        (one_forgotten, "“theirs” was never called"),
        (lambda calls, repeats, clock: [1, 2], "A dict"),
        (lambda calls, repeats, clock: {"ours": 1}, "A dict"),
        (lambda calls, repeats, clock: calls["mine"](), "raises KeyError"),
    ],
)
def test_wrong_measurements(answer, told):
    verdict = check.honest(answer)
    assert not verdict.right and told in verdict.message
