"""Solutions for notebook 11."""

import numpy as np


def attainable(intensity: float, P: float, B: float) -> float:
    """11.1: memory feeds intensity times B operations a second, the core does at most P."""
    return min(P, intensity * B)


def bytes_moved(n: int) -> tuple[int, int]:
    """11.2: two passes read x and r, write the sum, read it and write y; one pass reads x and r and writes y."""
    return 5 * 4 * n, 3 * 4 * n


def measure(calls, repeats, clock):
    """11.3: warm up, then rounds in which each has its turn; the median of each."""
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            since = clock()
            call()
            seconds[name].append(clock() - since)
    return {name: float(np.median(s)) for name, s in seconds.items()}
