"""Whole U-Nets against the same networks of diffusers on PyTorch: forward, training step, memory, errors.

    python benchmarks/bench_unet.py [NAME ...] --samples 9    (needs torch and diffusers: pip install -e '.[compare]')

Both sides have the same weights and inputs, and a process of their own that waits while the other is asked. First the
outputs and all gradients of a small batch are compared with PyTorch's in float64; then the times are taken in turns.
PyTorch runs eagerly in both of its layouts (inference mode for the forward, fused AdamW for the step), and compiled
with --compile; the best counts. Writes results/unet-DEVICE.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import results_path, write_json

THREADS = int(os.environ.get("MINIDIFF_NUM_THREADS", os.cpu_count() or 1))
NETWORKS: dict[str, dict[str, Any]] = {
    "conditional 10 M": {
        "batch": 32, "tokens": (16, 128), "model": "UNet2DConditionModel",
        "config": dict(
            sample_size=32, in_channels=3, out_channels=3, block_out_channels=(64, 128, 128), layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=128, attention_head_dim=4,
        ),
    },
    "DDPM CIFAR-10 35.7 M": {
        "batch": 16, "tokens": None, "model": "UNet2DModel",
        "config": dict(
            sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, downsample_padding=0,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, attention_head_dim=None,
        ),
    },
}  # fmt: skip


def inputs(name: str, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """x_t, t counted from 0, tokens, and the target of the loss."""
    rng, network = np.random.default_rng(0), NETWORKS[name]
    size, channels = network["config"]["sample_size"], network["config"].get("in_channels", 3)
    x, target = (rng.standard_normal((batch, size, size, channels), dtype=np.float32) for _ in range(2))
    tokens = network["tokens"] and rng.standard_normal((batch, *network["tokens"]), dtype=np.float32)
    return x, rng.integers(0, 1000, batch), tokens, target


# ---- the two sides: each returns its commands


def ours(name: str, folder: Path) -> dict[str, Callable[[], Any]]:
    from minidiff import no_grad, ops
    from minidiff.models import UNet, UNetConfig
    from minidiff.optim import AdamW

    config = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads((folder / "config.json").read_text()).items()
    }
    model = UNet(UNetConfig(**config), seed=None)
    model.load(dict(np.load(folder / "weights.npz")))
    parameters = dict(model.named_parameters())
    optimizer = AdamW(parameters)

    def backward(batch: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        x, t, tokens, target = inputs(name, batch)
        y = model(x, t + 1, None if tokens is None else (tokens, None))
        ops.mse(y, target).backward()
        grads = {key: p.grad for key, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        return y.data, grads

    def check() -> None:
        y, grads = backward(2)
        np.savez(folder / "ours.npz", output=y, **grads)

    def forward() -> None:
        x, t, tokens, _ = inputs(name, NETWORKS[name]["batch"])
        with no_grad():
            model(x, t + 1, None if tokens is None else (tokens, None))

    def step() -> None:
        optimizer.step(1e-6, backward(NETWORKS[name]["batch"])[1])

    return {"check": check, "forward": forward, "step": step}


def torchs(name: str, folder: Path, layout: str) -> dict[str, Callable[[], Any]]:
    import diffusers
    import torch

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from test_models_diffusers import our_state, unet_config

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = getattr(diffusers, network["model"])(**network["config"])

    def save_weights() -> None:
        np.savez(folder / "weights.npz", **our_state({k: v.numpy() for k, v in model.state_dict().items()}))
        (folder / "config.json").write_text(json.dumps(vars(unet_config(model.config))))

    def backward(net: Any, batch: int, dtype: Any) -> Any:
        x, t, tokens, target = inputs(name, batch)
        x, target = (torch.tensor(a, dtype=dtype).permute(0, 3, 1, 2) for a in (x, target))
        if layout == "channels last":
            x, target = (a.contiguous(memory_format=torch.channels_last) for a in (x, target))
        else:
            x, target = x.contiguous(), target.contiguous()
        more = () if tokens is None else (torch.tensor(tokens, dtype=dtype),)
        y = net(x, torch.tensor(t), *more).sample
        torch.nn.functional.mse_loss(y, target).backward()
        return y

    def check() -> None:
        for precision, dtype in (("float32", torch.float32), ("float64", torch.float64)):
            model.to(dtype)
            y = backward(model, 2, dtype)
            grads = our_state({k: p.grad.numpy() for k, p in model.named_parameters()})
            np.savez(folder / f"{precision}.npz", output=y.detach().permute(0, 2, 3, 1).numpy(), **grads)
            model.zero_grad()
        model.to(torch.float32)

    if layout == "channels last":
        model = model.to(memory_format=torch.channels_last)
    called = torch.compile(model) if layout == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def forward() -> None:
        x, t, tokens, _ = inputs(name, network["batch"])
        x = torch.tensor(x).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x.contiguous()
        with torch.inference_mode():
            called(x, torch.tensor(t), *(() if tokens is None else (torch.tensor(tokens),)))

    def step() -> None:
        backward(called, network["batch"], torch.float32)
        optimizer.step()
        optimizer.zero_grad()

    return {"save_weights": save_weights, "check": check, "forward": forward, "step": step}


def serve(side: str, name: str, folder: Path) -> None:
    """Run commands from stdin, one a line; answer with the seconds each took."""
    commands = ours(name, folder) if side == "ours" else torchs(name, folder, side)
    for line in sys.stdin:
        command = line.strip()
        if command == "memory":
            answer: float = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        else:
            started = time.perf_counter()
            commands[command]()
            answer = time.perf_counter() - started
        print(f"answer {answer}", flush=True)


class Side:
    """A worker process."""

    def __init__(self, side: str, name: str, folder: Path):
        command = [sys.executable, __file__, "--serve", side, name, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, command: str) -> float:
        """The seconds that a command took (or what it measures)."""
        time.sleep(0.05)  # the other side's threads stop spinning
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return float(line.split()[1])
        raise RuntimeError(f"the worker ended while it was asked for {command!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def errors(folder: Path) -> dict[str, float]:
    """Root-mean-square errors against float64, relative to the array's size: the output's, and the worst gradient's."""
    exact = dict(np.load(folder / "float64.npz"))
    result = {}
    for side, file in (("ours", "ours.npz"), ("PyTorch", "float32.npz")):
        got = dict(np.load(folder / file))
        if got.keys() != exact.keys():
            raise RuntimeError(f"gradients differ in name: {sorted(got.keys() ^ exact.keys())[:4]}")
        scale = max(np.sqrt((exact[k] ** 2).mean()) for k in exact if k != "output")
        error = {
            k: float(np.sqrt(((got[k] - exact[k]) ** 2).mean()) / max(np.sqrt((exact[k] ** 2).mean()), 1e-4 * scale))
            for k in exact
        }
        result[f"{side}, output"] = error.pop("output")
        result[f"{side}, worst gradient"] = max(error.values())
        result[f"{side}, median gradient"] = float(np.median(list(error.values())))
    return result


def measure(name: str, samples: int, compiled: bool) -> dict[str, Any]:
    """Compare, then time in turns."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        rivals = ["contiguous", "channels last"] + ["compiled"] * compiled
        sides = {side: Side(side, name, folder) for side in rivals}
        try:
            sides["contiguous"].ask("save_weights")
            sides["contiguous"].ask("check")
            sides["ours"] = Side("ours", name, folder)
            sides["ours"].ask("check")
            record: dict[str, Any] = {"errors": errors(folder), "threads": THREADS}
            for what in ("forward", "step"):
                seconds: dict[str, list[float]] = {side: [] for side in sides}
                for side in sides.values():
                    side.ask(what)
                for _ in range(samples):
                    for side_name, side in sides.items():
                        seconds[side_name].append(side.ask(what))
                record[what] = {side: summary(s) for side, s in seconds.items()}
                best = min(rivals, key=lambda side: record[what][side]["median"])
                record[what]["ratio"] = record[what][best]["median"] / record[what]["ours"]["median"]
                record[what]["best rival"] = best
            record["peak bytes"] = {side: s.ask("memory") for side, s in sides.items()}
            return record
        finally:
            for side in sides.values():
                side.close()


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def table(records: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| network | pass | ours (s) | PyTorch (s) | its best way | PyTorch / ours |", "|" + " --- |" * 6]
    for name, r in records.items():
        for what in ("forward", "step"):
            a, b = r[what]["ours"], r[what][r[what]["best rival"]]
            spread = [f"{s['median']:.3f} ({s['low']:.3f}-{s['high']:.3f})" for s in (a, b)]
            lines.append(
                f"| {name} | {what} | {' | '.join(spread)} | {r[what]['best rival']} | {r[what]['ratio']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(map(repr, NETWORKS))}")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also against torch.compile (minutes of compiling)")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve[0], args.serve[1], Path(args.serve[2]))
    path = results_path("unet", "json")
    records = json.loads(path.read_text())["networks"] if path.exists() else {}
    for name in args.names or NETWORKS:
        records[name] = measure(name, args.samples, args.compile)
        print(name, json.dumps(records[name], indent=1), flush=True)
        write_json("unet", {"command": f"bench_unet.py --samples {args.samples}", "networks": records})
        results_path("unet", "md").write_text(table(records))


if __name__ == "__main__":
    main()
