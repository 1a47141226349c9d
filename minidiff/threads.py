"""Threads: how many there are, and the work that they share.

NumPy runs everything but its matrix products on one core. So whole forward and backward passes, or whole batches of
pictures, run beside each other instead, each with matrix products of one thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from minidiff.errors import UserError

A = TypeVar("A")
B = TypeVar("B")


def num_threads(xp: ModuleType = np) -> int:
    """MINIDIFF_NUM_THREADS, or else the number of cores that this process may use; 1 for work on CuPy's arrays."""
    if xp is not np:
        return 1
    wanted = os.environ.get("MINIDIFF_NUM_THREADS", "")
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise UserError(f"MINIDIFF_NUM_THREADS must be a number of threads, 1 or more, got {wanted!r}")
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def parallel_map(call: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """call(item) for each item, in the items' order, in up to `threads` threads."""
    items = list(items)
    threads = min(threads, len(items))
    if threads < 2:
        yield from map(call, items)
        return
    with (
        _blas().limit(limits=max(1, num_threads() // threads), user_api="blas"),
        _impatient(),
        ThreadPoolExecutor(threads) as pool,
    ):
        yield from pool.map(call, items)


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """A thread back from NumPy waits for the interpreter: not up to 5 ms, Python's own choice, but 20 us."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
