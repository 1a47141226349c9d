"""Reading other people's files, and writing folders whole."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minidiff.errors import UserError


def read_text(path: Path) -> str:
    """A file's text, in UTF-8; UserError naming the file where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text") from e


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; UserError naming the file where it cannot be read, is not JSON, or is something else."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def permitted(mode: int) -> int:
    """The permissions that a new file (0o666) or folder (0o777) has by default, where a library makes it private."""
    os.umask(mask := os.umask(0o077))  # there is no other way to read it
    return mode & ~mask


def unfinished(path: Path) -> Path:
    """Where this process writes what shall be at `path` when it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_unfinished(path: Path) -> None:
    """Take away what processes left that were killed while they wrote the file `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names, with a comma between; beyond `most` only how many more."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` when the block ends; nothing is left where it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which appears at `path` when the block ends; nothing is left where it fails."""
    temporary = unfinished(path)
    made = [parent for parent in path.parents if not parent.exists()]
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else may be in there by now
            for parent in made:
                parent.rmdir()
        raise
