"""What the benchmarks share: the machine's name, and where results go."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np

from minidiff.backend import active_kernels

RESULTS = Path(__file__).parent / "results"


def device() -> dict[str, Any]:
    """What a timing was measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"],
        "kernels": active_kernels(),
    }


def cpu_name() -> str:
    """The processor's own name, or the architecture where it has none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family)\s*:\s*(.+)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine()).strip()
    return f"{name} (family {fields['cpu family']})" if "cpu family" in fields else name


def results_path(name: str, suffix: str) -> Path:
    """benchmarks/results/NAME-DEVICE.SUFFIX."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {os.cpu_count()} cores".lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}-{slug}.{suffix}"


def write_json(name: str, record: dict[str, Any]) -> Path:
    """Write a record, with the device it was measured on, to the results."""
    path = results_path(name, "json")
    path.write_text(json.dumps({"device": device(), **record}, indent=1) + "\n")
    return path
