"""docs/debugging-kernels.md: its snippets run, and print what the page shows."""

import ast
import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest

from minidiff.backend import MODULES

if "checked" not in MODULES:
    pytest.skip("the checked kernels are not built here; see: minidiff doctor", allow_module_level=True)

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/debugging-kernels.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
SHOWN = [text for language, text in BLOCKS if not language]


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """What each of the snippets prints, run one after the other; with the error that ends it."""
    checked, names = importlib.import_module("minidiff._checked"), {}
    monkeypatch.chdir(tmp_path)
    checked.reset_counts()
    outputs = []
    for snippet in SNIPPETS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                exec(snippet, names)
            except RuntimeError as e:
                print(f"RuntimeError: {e}")
        checked.skip_sync()
        outputs.append(out.getvalue())
    checked.choose("linear", 0)
    return outputs


def test_the_snippets_print_what_is_shown(printed):
    first, without_barrier, profiles, drawn = printed
    assert float(first) < 1e-4
    shown = next(text for text in SHOWN if "RuntimeError" in text)
    assert without_barrier.split() == shown.split()
    rows = [ast.literal_eval(line) for line in profiles.splitlines()]
    table = [line.split(" | ") for line in PAGE.splitlines() if re.match(r"\| .*\| linear.cu:", line)]
    assert len(rows) == len(table)
    for row, (_, line, access, *counts) in zip(rows, table, strict=True):
        kind = f"{'shared' if row['shared'] else 'global'} {'store' if row['store'] else 'load'}"
        assert (line, access) == (f"{row['file']}:{row['line']}", f"{kind}, {row['bytes']} bytes")
        assert [int(n.strip("| ")) for n in counts] == [row["requests"], row["transactions"], row["ideal"]]
    assert drawn == "" and Path("store.png").stat().st_size


def test_the_debugger_stops_at_the_line_that_is_shown():
    source = (ROOT / "csrc/cuda/linear.cu").read_text().splitlines()
    listed = re.findall(r"^(\d+)\t(.*)$", PAGE, re.MULTILINE)
    assert len(listed) == 2
    for number, text in listed:
        assert source[int(number) - 1] == text
    assert re.search(r"^break linear.cu:(\d+) ", PAGE, re.MULTILINE).group(1) == listed[0][0]
