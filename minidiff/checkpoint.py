"""Checkpoints: one safetensors file with everything a run needs to go on, replaced in one atomic step.

Tensors `model.*` (raw weights), `ema.*` (their moving average), `optimizer.m.*` and `optimizer.v.*`; the metadata
holds the step, the resolved config and the vocabulary as JSON. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minidiff.backend import Array, to_numpy
from minidiff.errors import UserError
from minidiff.files import permitted, unfinished

FORMAT = "minidiff checkpoint 1"
FILE = "checkpoint.safetensors"
PARTS = ("model", "ema", "optimizer.m", "optimizer.v")


def save_checkpoint(path: Path, parts: dict[str, dict[str, Array]], about: dict[str, Any]) -> None:
    """Write {part: {name: array}} and facts about the run; the old file stays whole until the new one is.

    A crash at any moment leaves one or the other: the new file is written beside it, flushed to the disk, then renamed.
    Raises UserError where it cannot be written.
    """
    tensors = {
        f"{part}.{name}": np.ascontiguousarray(to_numpy(array))
        for part, arrays in parts.items()
        for name, array in arrays.items()
    }
    temporary = unfinished(path)
    try:
        save_file(tensors, temporary, metadata={"format": FORMAT, "about": json.dumps(about)})
        temporary.chmod(permitted(0o666))  # save_file lets nobody else read it
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path} ({e}); make room on its disk, or check the folder's permissions") from e


def load_checkpoint(
    path: Path, parts: tuple[str, ...] = PARTS
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """The named parts {part: {name: array}} and the facts. Raises UserError on a file that is missing or damaged."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; train a model first (minidiff train) or name another folder")
    try:
        with safe_open(path, framework="numpy") as f:
            metadata = f.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a checkpoint of a training run (no {FORMAT!r} in its metadata)")
            about = json.loads(metadata["about"])
            names = list(f.keys())
            loaded = {
                part: {n[len(part) + 1 :]: f.get_tensor(n) for n in names if n.startswith(f"{part}.")} for part in parts
            }
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as e:
        raise UserError(f"{path} is truncated or damaged ({e}); restore it from a copy, or train again") from e
    return loaded, about
