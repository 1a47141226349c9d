"""Where a training step's time goes: share by kind of work, ours and PyTorch's, for the networks of bench_unet.py.

    python benchmarks/bench_profile.py [NAME ...]     (needs torch and diffusers: pip install -e '.[compare]')

Ours: every kernel's calls are timed; what is left is Python: the tape, the layers, the loop. PyTorch's: its profiler's
self time by operation, eagerly in its faster layout of bench_unet.py's results. Writes results/profile-DEVICE.json
and .png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench_unet import NETWORKS, ours, passes, torchs
from common import Worker, results_path, serve, write_json

from minidiff import plotting

KINDS = {
    "convolution": ("conv2d", "convolution"),
    "linear": ("linear", "addmm", "mm", "bmm"),
    "attention": ("attention", "scaled_dot_product"),
    "GroupNorm, SiLU": ("group_norm", "silu"),
    "LayerNorm, GEGLU": ("layer_norm", "gelu", "geglu"),
    "optimizer": ("adam", "gradient_norm", "lerp"),
    "sums, copies": (
        "accumulate",
        "add",
        "sum",
        "mse",
        "cat",
        "copy",
        "mul",
        "upsample",
        "fill",
        "zero",
        "slice",
        "sub",
    ),
}
OTHER = "Python and the rest"
REPEATS = 5


def kind_of(operation: str) -> str:
    """The first kind that the operation's name speaks of."""
    return next((kind for kind, words in KINDS.items() if any(w in operation for w in words)), OTHER)


def profile_ours(name: str, folder: Path) -> dict[str, float]:
    """Seconds a step by kind."""
    from minidiff.backend import MODULES, active_kernels

    module, seconds = MODULES[active_kernels()], defaultdict(float)
    depth = [0]

    def timed(kernel: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            depth[0] += 1
            result = function(*args)
            depth[0] -= 1
            if not depth[0]:
                seconds[kind_of(kernel)] += time.perf_counter() - started
            return result

        return call

    for kernel, function in list(vars(module).items()):
        if kernel not in ("instruction_set", "activate"):
            setattr(module, kernel, timed(kernel, function))
    command, batch = ours(name, folder)[passes(name)[-1]], NETWORKS[name]["batch"]
    command(batch)
    seconds.clear()
    started = time.perf_counter()
    for _ in range(REPEATS):
        command(batch)
    total = time.perf_counter() - started
    seconds[OTHER] += total - sum(seconds.values())
    return {kind: s / REPEATS for kind, s in seconds.items()}


def profile_torch(name: str, folder: Path, way: str) -> dict[str, float]:
    """Seconds a step by kind."""
    from torch.profiler import ProfilerActivity, profile

    command, batch = torchs(name, folder, way)[passes(name)[-1]], NETWORKS[name]["batch"]
    command(batch)
    started = time.perf_counter()
    for _ in range(REPEATS):
        command(batch)
    total = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(REPEATS):
            command(batch)
    seconds: dict[str, float] = defaultdict(float)
    for event in record.key_averages():
        seconds[kind_of(event.key.lower())] += event.self_cpu_time_total / 1e6
    factor = min(1.0, total / sum(seconds.values()))  # the profiler costs a little itself
    seconds = defaultdict(float, {kind: s * factor for kind, s in seconds.items()})
    seconds[OTHER] += total - sum(seconds.values())
    return {kind: s / REPEATS for kind, s in seconds.items()}


def answer(side: str, name: str, folder: str, way: str) -> dict[str, float]:
    """In a worker."""
    if side == "weights":
        torchs(name, Path(folder), "contiguous")["weights"](0)
        return {}
    return profile_ours(name, Path(folder)) if side == "ours" else profile_torch(name, Path(folder), way)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(map(repr, NETWORKS))}")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(answer)
    times = json.loads(results_path("unet", "json").read_text())["networks"]
    rows: dict[str, dict[str, float]] = {}
    for name in args.names or [n for n in NETWORKS if n in times]:
        eager = {
            w: s["median"]
            for w, s in times[name][passes(name)[-1]]["seconds"].items()
            if w.startswith(("cont", "chan"))
        }
        with tempfile.TemporaryDirectory() as tmp:
            for side in ("weights", "ours", "PyTorch"):
                worker = Worker()
                seconds = worker.ask(side=side, name=name, folder=tmp, way=min(eager, key=lambda w: eager[w]))
                worker.close()
                if side != "weights":
                    order = [*KINDS, OTHER]
                    rows[f"{name}\n{passes(name)[-1]}, {side}"] = {k: 1e3 * seconds[k] for k in order if k in seconds}
        print(json.dumps(rows, indent=1), flush=True)
        write_json("profile", {"command": "bench_profile.py", "unit": "ms", "rows": rows})
        figure = plotting.stacked_shares(rows, "milliseconds", "Where the time goes")
        plotting.save(figure, results_path("profile", "png"))


if __name__ == "__main__":
    main()
