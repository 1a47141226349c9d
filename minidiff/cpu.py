"""The compiled kernels for the CPU: one kind for each instruction set that runs here."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np

import minidiff._cpu as _cpu
from minidiff.compiled import Compiled, offered
from minidiff.threads import num_threads

_cpu.set_num_threads(num_threads())
_cpu.install_allocator()


def kinds() -> dict[str, SimpleNamespace]:
    """The kinds of kernels that run here: "cpu", the best instruction set, and the others as "cpu_NAME"."""
    return {
        "cpu" if i == 0 else f"cpu_{name}": offered(
            Compiled(_cpu, np), instruction_set=name, activate=partial(_cpu.use_instruction_set, name)
        )
        for i, name in enumerate(_cpu.instruction_sets())
    }
