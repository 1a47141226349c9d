"""Decoded pictures, kept: one memory-mapped array of bytes a data set, with a fingerprint of what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minidiff.errors import UserError
from minidiff.files import permitted

ARRAY, FACTS = "images.npy", "about.json"
VERSION = 2  # of how pixels and facts are made; another one takes no array of this one


def stamps(files: Sequence[Path]) -> list[tuple[str | int, ...]]:
    """Path, size, times of change and mode of each file: what a fingerprint holds of it. A missing one has none.

    Two times: a file that is moved to another's place keeps that of its content, but not the other.
    """
    found: list[tuple[str | int, ...]] = []
    for path in files:
        try:
            about = path.stat()
            times = about.st_mtime_ns, about.st_ctime_ns
            found.append((str(path.absolute()), about.st_size, *times, about.st_mode))
        except OSError:
            found.append((str(path.absolute()), -1))
    return found


def decoded(
    folder: Path, name: str, made_from: Any, make: Callable[[Path], dict[str, Any]], files: Sequence[Path] = ()
) -> tuple[np.ndarray, dict[str, Any]]:
    """The array uint8, mapped read only, and the facts that `make` returned.

    made_from: whatever decides the pixels, as JSON, and files: what they are read from, known by their `stamps`; an
    array made from anything else is never taken for this one.
    make(path) writes the array as a .npy file, and returns facts as JSON allows; "content", the SHA-256 of the pixels,
    joins them. It runs only where there is no such array yet. Raises UserError for one damaged or of other data, for
    files that change meanwhile, and for a folder that cannot be written.
    """
    before = stamps(files)
    fingerprint = _sum([VERSION, made_from, before])
    place = folder / f"{name}-{fingerprint[:16]}"
    if not place.exists():
        _make(place, fingerprint, make, lambda: _changed(before, files))
    try:
        about = json.loads((place / FACTS).read_text())
        facts = about["facts"]
        array = np.lib.format.open_memmap(place / ARRAY, mode="r")
        right = about["sum"] == _sum([fingerprint, array.shape, facts]) and facts["content"] == _digest(array)
    except PermissionError as e:
        raise UserError(
            f"{e.filename} may not be read; check its permissions, or name another folder with --data.cache"
        ) from e
    except Exception as e:  # a header's bytes are parsed as Python, whose parser raises what it likes
        raise UserError(f"{place} is damaged ({e}); remove this folder, and it is made anew") from e
    if not right:
        raise UserError(f"{place} was made from other data; remove this folder, and it is made anew")
    return array, facts


def _changed(before: Sequence[tuple[str | int, ...]], files: Sequence[Path]) -> Path | None:
    """The first of the files that is another than it was."""
    return next((f for f, then, now in zip(files, before, stamps(files), strict=True) if then != now), None)


def _sum(value: Any) -> str:
    """The SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(pixels: np.ndarray) -> str:
    """The SHA-256 of what is uint8 (N, H, W, 3)."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not pixels.flags.c_contiguous:
        raise ValueError(f"it holds {pixels.dtype} of shape {pixels.shape}, not the pixels of pictures")
    return hashlib.sha256(pixels.data).hexdigest()


def _make(
    place: Path, fingerprint: str, make: Callable[[Path], dict[str, Any]], changed: Callable[[], Path | None]
) -> None:
    """Make the array in a folder beside its place, which it takes when it is whole."""
    folder = place.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=folder, ignore_cleanup_errors=True) as temporary:
            facts = make(Path(temporary, ARRAY))
            if file := changed():
                raise UserError(f"{file} changed while the pictures were decoded; run the command again")
            array = np.lib.format.open_memmap(Path(temporary, ARRAY), mode="r")
            facts = {**facts, "content": _digest(array)}
            about = {"sum": _sum([fingerprint, array.shape, facts]), "facts": facts}
            Path(temporary, FACTS).write_text(json.dumps(about))
            del array  # some systems rename no folder with a file that is mapped
            Path(temporary).chmod(permitted(0o777))  # others may share the cache
            try:
                os.rename(temporary, place)
            except OSError:  # another process was faster: its array is the same
                if not place.exists():
                    raise
    except OSError as e:
        raise UserError(
            f"decoded pictures cannot be kept in {folder} ({e.strerror or e}); make room there, or name another folder "
            "with --data.cache"
        ) from e
