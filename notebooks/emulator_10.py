"""What notebook 10 does with the CUDA emulator: kernels written in a cell, counts of memory traffic, source from csrc.

A kernel that is written in a cell is compiled as the tests compile theirs (tests/test_emulator.py): together with the
emulator, in its checked build, by the C++ compiler. It takes a second; the emulator itself is compiled once, before the
first of them. The library's kernels are in minidiff._checked already.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from course import NEEDS, ROOT, _markdown
from minidiff import kernels, plotting
from minidiff.backend import MODULES
from minidiff.plotting import Chart

SECTOR = 32  # bytes that global memory moves at a time
CELL = "cell.cu"  # how messages call the text of a cell
CUDA = ROOT / "csrc" / "cuda"
OF_TESTS = ROOT / "tests" / "emulator"  # the emulator's interface with C names
FLAGS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wno-unknown-pragmas "
    f"-I{CUDA} -I{ROOT / 'csrc' / 'emulator'} -I{OF_TESTS} -x c++"
)
CHECKED = (  # as in setup.py
    "-g -fsanitize=thread -fsanitize=bounds -fsanitize-undefined-trap-on-error -fno-tree-sra "
    "-fno-tree-vectorize -fno-tree-slp-vectorize -fno-store-merging --param "
    "tsan-distinguish-volatile=1"
)
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
REQUESTS = 4  # of each line are recorded, for drawings
PATIENCE = 10.0  # seconds without progress before a kernel is given up


class KernelError(Exception):
    """What the compiler or the emulator reported."""


def emulator_here() -> bool:
    """Whether kernels can be run here; if not, the page says that a cell was left out."""
    here = NEEDS["emulator"][0]()
    if not here:
        _markdown("*Left out here: this cell runs kernels in the CUDA emulator.*")
    return bool(here)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts on a multiple of 256 bytes, as GPU memory does."""
    raw = np.empty(array.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def unwritten(*shape: int) -> np.ndarray:
    """Memory for a result: NaN until a kernel writes there, and a mistake to read before."""
    return np.full(shape, np.nan, np.float32)


# ---- source


def cu_source(file: str, *names: str) -> None:
    """Show functions or structs of a file in csrc/cuda, each with the comment above it."""
    path = CUDA / file
    lines = path.read_text().splitlines()
    for name in names:
        first, last = _definition(lines, name)
        code = "\n".join(lines[first : last + 1])
        where = path.relative_to(ROOT).as_posix()
        _markdown(
            f"[`{where}`](../{where}#L{first + 1}), line {first + 1}:\n\n```cpp\n{code}\n```"
        )


def _definition(lines: Sequence[str], name: str) -> tuple[int, int]:
    """The first and last line of a definition, from the comment and the template above it to its closing brace."""
    begins = re.compile(rf"^(?!\s|//|#).*(\b{name}\(|struct {name} )")
    found = [i for i, line in enumerate(lines) if begins.match(line) and not line.endswith(";")]
    if not found:
        raise ValueError(f"there is no {name} in this file")
    first = last = found[0]
    while first and re.match("//|template", lines[first - 1]):
        first -= 1
    while not (lines[last].startswith("}") or (last == found[0] and lines[last].endswith("}"))):
        last += 1
    return first, last


# ---- counts


@dataclass(frozen=True)
class Access:
    """What one line of a kernel did with one kind of memory, and who touched what the first time."""

    kernel: str
    file: str
    line: int
    shared: bool
    store: bool
    bytes: int  # of one thread
    requests: int
    transactions: int  # sectors of global memory, or passes over the banks of shared memory
    ideal: int  # the same if all bytes of a request lay side by side
    records: list[tuple[int, int, int]] = field(repr=False)  # request, thread, offset
    code: str = ""  # the line itself

    def apart(self) -> list[list[tuple[int, int, int]]]:
        """The records of each access, where the line has several: then a thread makes the first request again."""
        found: list[list[tuple[int, int, int]]] = [[]]
        for record in self.records:
            if record[:2] in [known[:2] for known in found[-1]]:
                found.append([])
            found[-1].append(record)
        return found


@dataclass(frozen=True)
class Traffic:
    """What a run of kernels did with memory."""

    accesses: list[Access]
    launches: str = ""

    def of(self, shared: bool = False, store: bool | None = None) -> list[Access]:
        """The accesses to one kind of memory; loads, stores or both."""
        return [a for a in self.accesses if a.shared == shared and store in (None, a.store)]

    def bytes(self, store: bool | None = None) -> int:
        """Read from or written to global memory, in whole sectors."""
        return SECTOR * sum(a.transactions for a in self.of(store=store))

    def picture(self, shared: bool = False, store: bool = False, code: str = "") -> Chart:
        """Which thread touches which word, at the busiest line with `code` in it.

        Of a line's several accesses it is the one that touches most.
        """
        those = [a for a in self.of(shared, store) if code in a.code]
        a = max(those, key=lambda a: a.requests)
        records = max(a.apart(), key=lambda one: len({offset for _, _, offset in one}))
        title = textwrap.shorten(f"{a.file}, line {a.line}: {a.code}", 84, placeholder=" …")
        return plotting.memory_accesses(records, a.bytes, shared, title=title)

    def lanes(self, code: str, shape: tuple[int, ...], store: bool = False) -> np.ndarray:
        """Which thread touched which element of an array, by the records of the line with `code` in it."""
        found = np.full(shape, -1)
        for a in self.of(store=store):
            if code in a.code:
                for _, thread, offset in a.records:
                    found.flat[offset // a.bytes] = thread
        return found


def counted(
    op: str, rung: int, run: Callable[[], Any], drawn: bool = False
) -> tuple[Any, Traffic]:
    """What run() returns, and its traffic, on a rung of the op's ladder in the checked build.

    drawn: keep who touched what, which takes a second, for `Traffic.picture`.
    """
    module = MODULES["checked"].module
    module.choose(op, rung)
    module.reset_counts()
    module.start_profile(records=int(drawn))
    try:
        with kernels("checked"):
            result = run()
    finally:
        module.stop_profile()
        module.choose(op, 0)
    accesses = []
    for row in module.profile():
        place = row["file"], row["line"], row["shared"], row["store"]
        code = (CUDA / row["file"]).read_text().splitlines()[row["line"] - 1].strip()
        records = module.access_records(*place) if drawn else []
        accesses.append(Access(**row, records=records, code=code))
    return result, Traffic(accesses, _launches(module.counts()))


def _launches(counts: dict[str, dict[str, int]]) -> str:
    """The launches of a run, in words."""
    parts = []
    for kernel, n in counts.items():
        times = f"{n['launches']} × " if n["launches"] > 1 else ""
        blocks = n["blocks"] // n["launches"]
        name = re.sub("<.*", "", kernel)
        parts.append(f"{times}{name}, {blocks} block{'s' * (blocks > 1)}")
    return "; ".join(parts)


# ---- kernels written in a cell


class Written:
    """Kernels from the text of a cell. `traffic` is that of the last launch."""

    def __init__(self, text: str):
        self.text = text.lstrip("\n")
        self._types = _parameters(self.text)
        self._c = _compiled(self.text, self._types)
        self.traffic = Traffic([])
        self.order()

    def order(self, order: str = "forward", seed: int = 1) -> None:
        """In which order threads take their turns: "forward", "reverse" or "random"."""
        self._c.set_options(ORDERS[order], seed, 1, 0, PATIENCE, 10**6, 227 << 10)

    def launch(self, kernel: str, grid: Any, block: Any, *arguments: Any) -> None:
        """kernel<<<grid, block>>>(arguments): arrays go to "device memory", and what is not const comes back.

        Raises KernelError with what the emulator reports.
        """
        if kernel not in self._types:
            raise KernelError(f"there is no kernel {kernel}, only {', '.join(self._types)}")
        types = self._types[kernel]
        if len(arguments) != len(types):
            raise KernelError(
                f"{kernel} must have {len(arguments)} parameters, as before; it has {len(types)}"
            )
        there = [aligned(a) if isinstance(a, np.ndarray) else a for a in arguments]
        arrays = [
            (a, name, "const" not in kind)
            for a, (kind, name) in zip(there, types, strict=True)
            if isinstance(a, np.ndarray)
        ]
        for a, name, writable in arrays:
            nothing = writable and bool(np.isnan(a).all())
            self._c.add_array(a.ctypes.data, a.nbytes, name.encode(), writable, nothing)
        try:
            self._c.profile_on(REQUESTS, 0)
            run = getattr(self._c, f"run_{kernel}")
            run.restype = ctypes.c_char_p
            error = run(*map(ctypes.c_uint, (*_pair(grid), *_pair(block))), *map(_as_c, there))
        finally:
            self._c.profile_off()
            for a, _, _ in arrays:
                self._c.remove_array(a.ctypes.data)
        if error:
            raise KernelError(error.decode())
        for to, a, (kind, _) in zip(arguments, there, types, strict=True):
            if isinstance(to, np.ndarray) and "const" not in kind:
                to[...] = a
        self.traffic = Traffic(self._accesses())

    def _accesses(self) -> list[Access]:
        found, lines = [], self.text.splitlines()
        for kernel, file, line, memory, way, *numbers in self._table("profile_table"):
            shared, store, number = memory == "shared", way == "store", int(line)
            kept = self._table("access_table", file.encode(), number, shared, store)
            records = [(int(a), int(b), int(c)) for a, b, c in kept]
            code = lines[number - 1].strip() if file == CELL else ""
            n = map(int, numbers)  # bytes, requests, transactions, ideal
            found.append(Access(kernel, file, number, shared, store, *n, records, code))
        return found

    def _table(self, name: str, *arguments: Any) -> list[list[str]]:
        function = getattr(self._c, name)
        function.restype = ctypes.c_char_p
        return [row.split("\t")[:-1] for row in function(*arguments).decode().splitlines()]


@cache
def write(text: str) -> Written:
    """Compile the kernels in a text; raises KernelError with the compiler's first complaint."""
    return Written(text)


def refusal(written: Written, *launch: Any) -> str:
    """What the emulator reports of a launch."""
    try:
        written.launch(*launch)
    except KernelError as e:
        return report(written, e)
    return "The emulator reports nothing."


def report(written: Written, error: KernelError) -> str:
    """An error in lines of a page's width, and the lines of the cell that it names."""
    told = [textwrap.fill(x, 95, subsequent_indent="  ") for x in str(error).splitlines()]
    lines = written.text.splitlines()
    named = sorted({int(n) for n in re.findall(rf"{CELL}:(\d+)", str(error))})
    quoted = [f"{n:3}  {lines[n - 1]}" for n in named if n <= len(lines)]
    return "\n".join([*told, "", *quoted] if quoted else told)


def _parameters(text: str) -> dict[str, list[tuple[str, str]]]:
    """The types and names of every kernel's parameters."""
    found = {}
    bare = re.sub(r"//[^\n]*", "", text)
    for name, inside in re.findall(r"__global__\s+void\s+(\w+)\s*\(([^)]*)\)", bare):
        written = [p.strip() for p in inside.split(",") if p.strip()]
        parameters = [re.fullmatch(r"(.*?[\s*])\s*(\w+)", p, re.S) for p in written]
        if not all(parameters):
            raise KernelError(f"{name}: every parameter needs a type and a name")
        found[name] = [(p[1].strip(), p[2]) for p in parameters if p]
    if not found:
        raise KernelError("there is no kernel in it: __global__ void name(...) { ... }")
    return found


def _compiled(text: str, kernels_of: dict[str, list[tuple[str, str]]]) -> Any:
    """The text as a library in which run_NAME(grid, block, arguments) launches kernel NAME and returns what went wrong."""
    launches = []
    for name, parameters in kernels_of.items():
        takes = ", ".join(
            ["unsigned gx, unsigned gy, unsigned bx, unsigned by"]
            + [f"{kind} {p}" for kind, p in parameters]
        )
        given = ", ".join(
            ["dim3(gx, gy)", "dim3(bx, by)", "0", "0", *(p for _, p in parameters)]
        )
        launches.append(f"FUNCTION(run_{name}, ({takes}), LAUNCH({name}, {given}))")
    folder = Path(tempfile.mkdtemp(dir=_folder()))
    (folder / CELL).write_text(
        f'#include "export.h"\nusing namespace minidiff::cuda;\n#line 1 "{CELL}"\n{text}\n'
        + '#line 1 "launches.cu"\n'
        + "\n".join(launches)
        + "\n"
    )
    objects = _emulator()
    _compile(folder / CELL, folder / "kernel.o", f"{FLAGS} {CHECKED}")
    library = folder / "kernel.so"
    command = [_compiler(), "-shared", "-o", library, folder / "kernel.o", *objects, "-lrt"]
    subprocess.run(command, check=True, capture_output=True)
    c = ctypes.CDLL(str(library))
    address, number = ctypes.c_void_p, ctypes.c_int
    c.add_array.argtypes = [address, ctypes.c_size_t, ctypes.c_char_p, number, number]
    c.remove_array.argtypes = [address]
    c.profile_on.argtypes = [number, ctypes.c_uint64]
    c.set_options.argtypes = [number, ctypes.c_uint64, number, number, ctypes.c_double]
    c.set_options.argtypes += [ctypes.c_uint64, number]
    return c


@cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="minidiff-notebook-10-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _emulator() -> list[Path]:
    """The emulator's own object files."""
    sources = [p for p in sorted((ROOT / "csrc/emulator").glob("*.cpp")) if p.stem != "module"]
    objects = {s: Path(_folder()) / f"{s.stem}.o" for s in [*sources, OF_TESTS / "module.cpp"]}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda s: _compile(s, objects[s], FLAGS), objects))
    return list(objects.values())


def _compiler() -> str:
    return os.environ.get("CXX", "g++").split()[0]


def _compile(source: Path, to: Path, flags: str) -> None:
    done = subprocess.run(
        [_compiler(), *flags.split(), "-c", source, "-o", to], capture_output=True, text=True
    )
    if done.returncode:
        complaint = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr)
        raise KernelError(f"the compiler says: {complaint}")


def _pair(n: Any) -> tuple[int, int]:
    return n if isinstance(n, tuple) else (n, 1)


def _as_c(a: Any) -> Any:
    if isinstance(a, np.ndarray):
        return ctypes.c_void_p(a.ctypes.data)
    return ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int(a)
