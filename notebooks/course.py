"""What the notebooks share: what is missing here, the library's source on the page, pictures with captions, verdicts.

A notebook begins with `begin(number, ...)`. Nothing here computes what a notebook teaches: that is in the library.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import minidiff
except ImportError as e:
    sys.exit(
        f"minidiff cannot be imported here ({e}). Run `make lab` in the repository: it sets everything up."
    )
from minidiff import backend
from minidiff.plotting import Chart

ROOT = Path(minidiff.__file__).parent.parent
NEEDS = {
    "kernels": (
        lambda: "cpu" in backend.MODULES,
        "the compiled CPU kernels",
        "the fast rows of the tables are left out, and the cells that train take several times as long",
        "install a C++ compiler (on Debian: apt install g++), then `make setup`",
    ),
    "emulator": (
        lambda: {"emulated", "checked"} <= set(backend.MODULES) and bool(_compiler()),
        "the CUDA emulator",
        "the cells that run CUDA kernels are left out; read their results in this notebook as it was built",
        "on Linux on x86-64 install g++ (on Debian: `apt install g++`), then `make setup`",
    ),
    "widgets": (
        lambda: _importable("ipywidgets"),
        "ipywidgets",
        "the step button is left out; the loop beneath it shows the same pictures",
        "`pip install ipywidgets`",
    ),
    "runs": (
        lambda: any((ROOT / "benchmarks" / "results").glob("images_*.json")),
        "runs on real pictures",
        "the cells that look at them show nothing",
        "`git checkout -- benchmarks/results` in a clone of the repository (docs/recipes.md says how they are made)",
    ),
    "model": (
        lambda: _has_model(),
        "a trained model",
        "the cells that draw pictures cannot run",
        "`make demo`, which trains one in a few minutes",
    ),
}
_count = {"notebook": 0, "figure": 0}


def begin(number: int, *needs: str) -> None:
    """The first cell: say what this notebook needs and does not find, what is skipped, and the command that brings it."""
    _count.update(notebook=number, figure=0)
    missing = [NEEDS[name][1:] for name in needs if not NEEDS[name][0]()]
    lines = [
        f"**Not here: {what}.** Then {skipped}. To bring it: {command}."
        for what, skipped, command in missing
    ]
    _markdown("\n\n".join(lines) or "Everything this notebook needs is here.")


def built() -> bool:
    """Whether `make notebooks` is executing the notebook: nobody is there to press a button."""
    return "MINIDIFF_NOTEBOOK_BUILD" in os.environ


def source(*things: Any) -> None:
    """Show the library's own code of functions, classes or properties, with the file and line where it stands."""
    for thing in things:
        thing = inspect.unwrap(getattr(thing, "fget", None) or getattr(thing, "func", thing))
        lines, first = inspect.getsourcelines(thing)
        path = (
            Path(inspect.getsourcefile(thing) or "")
            .resolve()
            .relative_to(ROOT.resolve())
            .as_posix()
        )
        code = textwrap.dedent("".join(lines)).rstrip()
        _markdown(f"[`{path}`](../{path}#L{first}), line {first}:\n\n```python\n{code}\n```")


def figure(chart: Chart, caption: str) -> None:
    """Show a chart with a numbered caption under it."""
    from IPython.display import display

    _count["figure"] += 1
    display(chart)
    _markdown(f"*Figure {_count['notebook']}.{_count['figure']}. {caption}*")


def table(header: list[str], rows: list[list[Any]]) -> None:
    """Show a table; every cell is written as it is."""
    lines = [header, ["---"] * len(header), *rows]
    _markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


def photograph(size: int = 128) -> np.ndarray:
    """A real photograph (size, size, 3) in [-1, 1]: Commodore Grace Hopper, by the US Navy, in the public domain.

    Matplotlib ships it as sample data.
    """
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        square = (
            image.convert("RGB")
            .crop((0, 0, 512, 512))
            .resize((size, size), Image.Resampling.LANCZOS)
        )
    return np.asarray(square, np.float32) / 127.5 - 1


@dataclass(frozen=True)
class Verdict:
    """What a checker says of an answer."""

    right: bool
    message: str

    def _repr_markdown_(self) -> str:
        return f"{'✓ **Right.**' if self.right else '✗ **Not yet.**'} {self.message}"


def unanswered(answer: Any) -> Verdict | None:
    """The verdict on an answer that was left as `...`, or a function that returns it or None; None if there is one."""
    if answer is ... or answer is None:
        return Verdict(False, "Replace the `...` by your answer and run the cell again.")
    return None


def close(got: Any, wanted: Any, tolerance: float = 1e-6) -> bool:
    """Whether two arrays have one shape and differ by at most `tolerance` of the largest wanted number; NaN never does."""
    try:
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    except (TypeError, ValueError):  # no numbers
        return False
    if got.shape != wanted.shape:
        return False
    return bool(
        np.abs(got - wanted).max(initial=0)
        <= tolerance * max(1e-30, np.abs(wanted).max(initial=0))
    )


def called(f: Callable[..., Any], *args: Any) -> Any:
    """What f returns, or the verdict on what it raises, or on no answer."""
    try:
        got = f(*args)
    except Exception as e:
        return Verdict(False, f"Your code raises {type(e).__name__}: {e}")
    return unanswered(got) or got


def answer_of(
    f: Callable[..., Any], *args: Any, shape: tuple[int, ...]
) -> np.ndarray | Verdict:
    """What f answers, as finite floats of this shape, or the verdict on an answer that is none."""
    try:
        got = f(*args)
    except Exception as e:
        if "ellipsis" in str(e):
            return unanswered(...) or Verdict(False, "")
        return Verdict(False, f"Your function stopped with {type(e).__name__}: {e}")
    if verdict := unanswered(got):
        return verdict
    try:
        got = np.asarray(got, float)
    except (TypeError, ValueError):
        return Verdict(False, f"Numbers are wanted; you return a {type(got).__name__}.")
    if got.shape != shape:
        return Verdict(
            False,
            f"Your answer has the shape {got.shape}; it must be {shape}, as what came in.",
        )
    if not np.isfinite(got).all():
        return Verdict(
            False,
            "Your answer holds NaN or infinity: is there a division by 0, or the root of a negative number?",
        )
    return got


def told_of(got: np.ndarray, known: Mapping[str, Any]) -> Verdict | None:
    """The verdict on one of the wrong answers {message: answer}, or None."""
    for message, wrong in known.items():
        if close(got, wrong, 1e-6):
            return Verdict(False, message)
    return None


def _markdown(text: str) -> None:
    from IPython.display import Markdown, display

    display(Markdown(text))


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++").split()[0])


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _has_model() -> bool:
    from minidiff.train import default_run

    path = default_run()
    return path.is_dir() or path.is_file()
