"""What the benchmarks share: the machine's name, its measured ceilings, worker processes asked in turn, and tables.

Each side (ours, our NumPy reference, PyTorch in each of its ways) is a process of its own that waits while another is
asked, so that no two pools of threads share the cores. A case is first checked: every side's results against
PyTorch's in float64 (the reference's in float64 where there is no PyTorch); then the times are taken in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from minidiff import Tensor, no_grad, plotting
from minidiff.backend import active_kernels, kernels
from minidiff.text.words import split_words

RESULTS = Path(__file__).parent / "results"
THREADS = int(os.environ.get("MINIDIFF_NUM_THREADS", os.cpu_count() or 1))
PYTORCH = ("contiguous", "channels last", "compiled")
SECONDS_A_SAMPLE = 0.03
WORST_ERROR = 1e-4  # rms, relative; beyond it a result is wrong and its time means nothing


# ---- the logs of training runs


def thinned(log: list[dict], points: int = 200) -> list[dict[str, float]]:
    """The log as medians over equal spans of steps."""
    parts = np.array_split(np.arange(len(log)), min(points, len(log)))
    return [
        {
            "minutes": log[part[-1]]["minutes"],
            "images": log[part[-1]]["images"],
            "loss": median([log[i]["loss"] for i in part]),
        }
        for part in parts
    ]


def median(values: list[float]) -> float:
    """The middle of them."""
    return float(np.median(values))


# ---- the machine


def words_of(captions: Iterable[str]) -> str:
    """How many words the captions have, and how many of these once, to be printed."""
    words = Counter(word for caption in captions for word in split_words(caption))
    return f"{len(words)} words, {sum(n == 1 for n in words.values())} of them once"


def device() -> dict[str, Any]:
    """What a timing was measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": THREADS,
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


def multiply_add_ceiling() -> float:
    """Operations a second of multiply-adds on numbers that never leave the registers."""
    from minidiff import _cpu

    started = time.perf_counter()
    done = _cpu.peak(20_000_000)
    return done / (time.perf_counter() - started)


def copy_ceiling() -> float:
    """Bytes a second read and written by copying arrays far larger than the caches, one a thread."""
    arrays = [(np.ones(1 << 25, np.float32), np.ones(1 << 25, np.float32)) for _ in range(THREADS)]
    threads = [threading.Thread(target=np.copyto, args=pair) for pair in arrays]
    started = time.perf_counter()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return 2 * sum(a.nbytes for a, _ in arrays) / (time.perf_counter() - started)


def ceilings(repeats: int = 5) -> dict[str, float]:
    """Both ceilings, the best of a few tries."""
    return {
        "multiply-adds": max(multiply_add_ceiling() for _ in range(repeats)),
        "copy": max(copy_ceiling() for _ in range(repeats)),
    }


# ---- sides


class Worker:
    """A process of the same script that answers requests; `serve` is its other end."""

    def __init__(self, *args: str):
        env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "MINIDIFF_NUM_THREADS": str(THREADS)}
        command = [sys.executable, sys.argv[0], "--serve", *args]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, **request: Any) -> Any:
        """The answer to a request. RuntimeError if the process ends without one."""
        time.sleep(0.02)  # the threads of the side asked before stop spinning
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"a worker ended while it was asked {request}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def serve(answer: Callable[..., Any]) -> None:
    """Answer requests from stdin, one a line, until it closes."""
    for line in sys.stdin:
        print("answer " + json.dumps(answer(**json.loads(line))), flush=True)


def timed(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds a call."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def in_turns(ask: dict[str, Callable[[], float]], samples: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of each side's seconds, one sample of each after the other."""
    seconds: dict[str, list[float]] = {side: [] for side in ask}
    for i in range(samples):
        for side, sample in ask.items():
            if side != "reference" or i < 3:  # NumPy is slow, and only there for orientation
                seconds[side].append(sample())
    return {side: summary(s) for side, s in seconds.items()}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def best_rival(seconds: dict[str, dict[str, float]]) -> str | None:
    """PyTorch's fastest way."""
    rivals = [side for side in seconds if side in PYTORCH]
    return min(rivals, key=lambda side: seconds[side]["median"]) if rivals else None


def relative_errors(got: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """The largest root-mean-square error of a list of arrays, each relative to the array's size."""
    return max(float(np.sqrt(((g - e) ** 2).mean()) / np.sqrt((e**2).mean())) for g, e in zip(got, exact, strict=True))


# ---- one op over many shapes


def our_passes(op: Callable[..., Tensor], leaves: list[Tensor], dy: np.ndarray) -> dict[str, Callable[[], list[Any]]]:
    """An op of ours on Tensors, tape and all: its result; and its result with all gradients."""

    def forward() -> list[Any]:
        with no_grad():
            return [op(*leaves).data]

    def both() -> list[Any]:
        for leaf in leaves:
            leaf.grad = None
        y = op(*leaves)
        y.backward(dy)
        return [y.data, *(leaf.grad for leaf in leaves)]

    return {"forward": forward, "forward + backward": both}


def torch_passes(op: Callable[..., Any], leaves: list[Any], dy: Any, way: str) -> dict[str, Callable[[], list[Any]]]:
    """The same of PyTorch, in inference mode for the forward."""
    import torch

    leaves = [leaf.requires_grad_() for leaf in leaves]
    called = torch.compile(op) if way == "compiled" else op

    def forward() -> list[Any]:
        with torch.inference_mode():
            return [called(*leaves)]

    def both() -> list[Any]:
        y = called(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    return {"forward": forward, "forward + backward": both}


def in_layout(images: Any, way: str) -> Any:
    """Our images (B, H, W, C) as PyTorch's (B, C, H, W), in the memory layout of this way."""
    import torch

    memory = torch.channels_last if way == "channels last" else torch.contiguous_format
    return images.permute(0, 3, 1, 2).contiguous(memory_format=memory)


@dataclass
class Bench:
    """An op's benchmark. A pass ("forward", "forward + backward") is a function () -> results as arrays or tensors.

    work(case, pass) -> (operations, bytes): of the plain algorithm, and the least that must be moved.
    ours(case, arrays) and torch(case, arrays, way): the passes of each side, made once a case. numpy(case, results):
    PyTorch's results in our layout.
    """

    name: str
    unit: str  # GFLOP/s or GB/s
    cases: dict[str, Any]
    work: Callable[[Any, str], tuple[float, float]]
    arrays: Callable[[Any, np.random.Generator], list[np.ndarray]]
    ours: Callable[[Any, list[np.ndarray]], dict[str, Callable[[], Iterable[Any]]]]
    torch: Callable[[Any, list[Any], str], dict[str, Callable[[], Iterable[Any]]]]
    numpy: Callable[[Any, list[Any]], list[np.ndarray]]
    ways: tuple[str, ...] = PYTORCH
    passes: tuple[str, ...] = ("forward", "forward + backward")


def run_op(bench: Bench) -> None:
    """The command line of an op's benchmark."""
    parser = argparse.ArgumentParser(description=f"{bench.name}: ours, NumPy's reference and PyTorch, shape by shape")
    parser.add_argument("names", nargs="*", metavar="SHAPE", help=f"of {', '.join(map(repr, bench.cases))}")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (seconds a shape)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(_Side(bench, args.serve))
    path = results_path(bench.name, "json")
    rows = json.loads(path.read_text())["cases"] if path.exists() and args.names else {}
    top = ceilings()
    with tempfile.TemporaryDirectory() as tmp:
        ways = [w for w in bench.ways if find_spec("torch") and not (w == "compiled" and args.no_compile)]
        workers = {side: Worker(side) for side in ("ours", "reference", *ways)}
        try:
            for case in args.names or bench.cases:
                rows[case] = {p: _measure(workers, case, p, args.samples, Path(tmp)) for p in bench.passes}
                _add_shares(bench, case, rows[case], top)
                print(_lines(bench, case, rows[case])[-1], flush=True)
        finally:
            for worker in workers.values():
                worker.close()
    command = f"bench_{bench.name}.py --samples {args.samples}"
    write_json(bench.name, {"command": command, "unit": bench.unit, "ceilings": top, "cases": rows})
    results_path(bench.name, "md").write_text(_table(bench, rows, top))
    draw(bench.name, bench.unit, bench.passes[-1], rows, top)


class _Side:
    """A worker's state: the passes of one case at a time."""

    def __init__(self, bench: Bench, side: str):
        self.bench, self.side, self.case = bench, side, ""
        self.passes: dict[str, Callable[[], Iterable[Any]]] = {}
        self.repeats: dict[str, int] = {}

    def __call__(self, case: str, what: str, check: str | None = None, dtype: str = "float32") -> float:
        """Seconds of a pass; or, with `check`, write its results to that file, computed in dtype."""
        if case != self.case or check:
            self.passes.clear()
            self.passes, self.case, self.repeats = self._set_up(case, dtype), case, {}
        if check:
            np.savez(check, *self._results(case, self._call(what)))
            self.case = "" if dtype != "float32" else case
            return 0.0
        if what not in self.repeats:
            self._call(what)
            self.repeats[what] = max(1, int(SECONDS_A_SAMPLE / timed(lambda: self._call(what))))
        return timed(lambda: self._call(what), self.repeats[what])

    def _set_up(self, name: str, dtype: str) -> dict[str, Callable[[], Iterable[Any]]]:
        case = self.bench.cases[name]
        arrays = [a.astype(dtype) for a in self.bench.arrays(case, np.random.default_rng(0))]
        if self.side in ("ours", "reference"):
            return self.bench.ours(case, arrays)
        import torch

        torch.set_num_threads(THREADS)
        torch._dynamo.reset()
        return self.bench.torch(case, [torch.tensor(a) for a in arrays], self.side)

    def _call(self, what: str) -> Iterable[Any]:
        if self.side == "reference":
            with kernels("reference"):
                return self.passes[what]()
        return self.passes[what]()

    def _results(self, name: str, results: Iterable[Any]) -> list[np.ndarray]:
        if self.side in ("ours", "reference"):
            return list(results)
        return self.bench.numpy(self.bench.cases[name], list(results))


def _measure(workers: dict[str, Worker], case: str, what: str, samples: int, folder: Path) -> dict[str, Any]:
    def results(side: str, dtype: str = "float32") -> list[np.ndarray]:
        workers[side].ask(case=case, what=what, check=str(folder / "results.npz"), dtype=dtype)
        with np.load(folder / "results.npz") as file:
            return [file[key] for key in file.files]

    exact = results("contiguous" if "contiguous" in workers else "reference", "float64")
    errors = {side: relative_errors(results(side), exact) for side in workers}
    for side, error in errors.items():
        if not error < WORST_ERROR:
            raise RuntimeError(f"{case}, {what}: the result of {side} is off by {error:.1e}")
    ask = {side: (lambda w=w: w.ask(case=case, what=what)) for side, w in workers.items()}
    for warm_up in ask.values():
        warm_up()
    return {"seconds": in_turns(ask, samples), "errors": errors}


def _add_shares(bench: Bench, case: str, row: dict[str, Any], top: dict[str, float]) -> None:
    for what, r in row.items():
        operations, moved = bench.work(bench.cases[case], what)
        ours = r["seconds"]["ours"]["median"]
        r["floor"] = max(operations / top["multiply-adds"], moved / top["copy"])
        r["rate"] = (operations if bench.unit == "GFLOP/s" else moved) / ours / 1e9
        r["share"] = r["floor"] / ours
        r["reference ratio"] = r["seconds"]["reference"]["median"] / ours
        rival = best_rival(r["seconds"])
        if rival:
            r["best rival"], r["ratio"] = rival, r["seconds"][rival]["median"] / ours


def spread(s: dict[str, float]) -> str:
    """Milliseconds: median (quartiles)."""
    digits = 0 if s["median"] > 1 else 1 if s["median"] > 0.1 else 2 if s["median"] > 1e-3 else 4
    return f"{s['median'] * 1e3:.{digits}f} ({s['low'] * 1e3:.{digits}f}-{s['high'] * 1e3:.{digits}f})"


def _lines(bench: Bench, case: str, row: dict[str, Any]) -> list[str]:
    lines = []
    for what, r in row.items():
        rival = (
            spread(r["seconds"][r["best rival"]]) + f" | {r['best rival']} | {r['ratio']:.2f}"
            if "ratio" in r
            else " | | "
        )
        cells = [case, what, f"{r['rate']:.0f}", f"{r['share']:.2f}", spread(r["seconds"]["ours"]), rival]
        lines.append(f"| {' | '.join(cells)} | {r['reference ratio']:.1f} |")
    return lines


def _table(bench: Bench, rows: dict[str, Any], top: dict[str, float]) -> str:
    names = ["shape", "pass", bench.unit, "floor / time", "ours (ms)", "PyTorch (ms)", "its best way"]
    names += ["PyTorch / ours", "NumPy / ours"]
    fastest = f"{top['multiply-adds'] / 1e9:.0f} GFLOP/s of multiply-adds, {top['copy'] / 1e9:.1f} GB/s of copying"
    head = [f"Ceilings: {fastest}.", ""]
    head += [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    return "\n".join(head + [line for case, row in rows.items() for line in _lines(bench, case, row)]) + "\n"


def draw(name: str, unit: str, what: str, rows: dict[str, Any], top: dict[str, float]) -> None:
    """The picture of an op: how fast each side is, shape by shape."""
    rates: dict[str, list[float]] = {"minidiff": [], "PyTorch, its best way": [], "NumPy reference": []}
    for row in rows.values():
        r = row[what]
        amount = r["rate"] * r["seconds"]["ours"]["median"]
        sides = {"minidiff": "ours", "PyTorch, its best way": r.get("best rival"), "NumPy reference": "reference"}
        for label, side in sides.items():
            rates[label].append(amount / r["seconds"][side]["median"] if side else 0.0)
    ceiling = top["multiply-adds" if unit == "GFLOP/s" else "copy"] / 1e9
    told = "multiply-add ceiling" if unit == "GFLOP/s" else "copy ceiling"
    figure = plotting.bars(list(rows), rates, f"{unit}, {what}", (told, ceiling), f"{name}: {unit} by shape")
    plotting.save(figure, results_path(name, "png"))
