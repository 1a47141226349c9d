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
from typing import Any, TypeVar

import numpy as np

from minidiff.backend import active_kernels
from minidiff.errors import UserError

A = TypeVar("A")
B = TypeVar("B")


_wanted = 0  # by set_num_threads


def set_num_threads(n: int) -> None:
    """Use n threads from now on, in the compiled kernels as well. Raises ValueError for less than 1."""
    global _wanted
    if n < 1:
        raise ValueError(f"the number of threads must be at least 1, got {n}")
    _wanted = n
    compiled = sys.modules.get("minidiff._cpu")
    if compiled is not None:
        compiled.set_num_threads(n)


def num_threads(xp: ModuleType = np) -> int:
    """What was set; or MINIDIFF_NUM_THREADS; or the cores that this process may use. 1 for work on CuPy's arrays."""
    if xp is not np:
        return 1
    if _wanted:
        return _wanted
    wanted = os.environ.get("MINIDIFF_NUM_THREADS", "")
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise UserError(f"MINIDIFF_NUM_THREADS must be a number of threads, 1 or more, got {wanted!r}")
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin_thread() -> None:
    """What a new thread should call: NumPy's allocator, here one that keeps what is freed, is each thread's own."""
    compiled = sys.modules.get("minidiff._cpu")
    if compiled is not None:
        compiled.install_allocator()


def release_memory() -> None:
    """Give back what the compiled kernels' allocator keeps for arrays to come."""
    compiled = sys.modules.get("minidiff._cpu")
    if compiled is not None:
        compiled.release_memory()


def num_workers(xp: ModuleType = np) -> int:
    """How many Python threads should share work: 1 where the kernels have threads of their own."""
    return num_threads(xp) if active_kernels() == "reference" else 1


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController  # where whole passes share the cores, which is on NumPy alone

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
        ThreadPoolExecutor(threads, initializer=begin_thread) as pool,
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


def peak_memory() -> int:
    """The most memory, in bytes, that this process ever had in use: arrays, libraries, everything. 0 where unknown."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
