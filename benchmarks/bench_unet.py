"""Whole U-Nets against the same networks of diffusers on PyTorch: forward, training step, sampling, memory, errors.

    python benchmarks/bench_unet.py [NAME ...] --samples 9    (needs torch and diffusers: pip install -e '.[compare]')

Both sides have the same weights and inputs, and a process of their own that waits while the other is asked. First the
outputs and all gradients of a small batch are compared with PyTorch's in float64; then the times are taken in turns.
PyTorch runs eagerly in both of its layouts (inference mode for forward and sampling, fused AdamW for the step), and
through torch.compile; the fastest counts. Writes results/unet-DEVICE.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    PYTORCH,
    THREADS,
    Worker,
    best_rival,
    in_turns,
    results_path,
    serve,
    spread,
    timed,
    write_json,
)  # fmt: skip

from minidiff import plotting
from minidiff.threads import peak_memory

PASSES = ("forward", "step")
STEPS, GUIDANCE = 50, 1.5  # of sampling
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
    "Stable Diffusion 1.5 860 M": {
        "batch": 1, "tokens": (77, 768), "model": "UNet2DConditionModel", "passes": ("forward",),
        "config": dict(
            sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=768, attention_head_dim=8,
        ),
    },
    "the demo's": {  # 64 pictures, each with and without its caption
        "batch": 128, "tokens": (12, 64), "model": "UNet2DConditionModel", "passes": ("sampling",),
        "config": dict(
            sample_size=8, in_channels=48, out_channels=48, block_out_channels=(48, 64), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8,
        ),
    },
}  # fmt: skip


def passes(name: str) -> tuple[str, ...]:
    """What is timed of a network."""
    return NETWORKS[name].get("passes", PASSES)


def inputs(name: str, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """x_t, t counted from 0, tokens, and the target of the loss."""
    rng, network = np.random.default_rng(0), NETWORKS[name]
    size, channels = network["config"]["sample_size"], network["config"].get("in_channels", 3)
    x, target = (rng.standard_normal((batch, size, size, channels), dtype=np.float32) for _ in range(2))
    tokens = network["tokens"] and rng.standard_normal((batch, *network["tokens"]), dtype=np.float32)
    return x, rng.integers(0, 1000, batch), tokens, target


# ---- the two sides: each returns its commands, functions of a batch size


def ours(name: str, folder: Path) -> dict[str, Callable[[int], Any]]:
    """On minidiff's Tensors and kernels."""
    from minidiff import no_grad, ops, samplers, schedule
    from minidiff.models import UNet, UNetConfig
    from minidiff.optim import AdamW

    config = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads((folder / "config.json").read_text()).items()
    }
    model = UNet(UNetConfig(**config), seed=None)
    with np.load(folder / "weights.npz") as weights:
        model.load(dict(weights))
    parameters = dict(model.named_parameters())
    optimizer = AdamW(parameters) if "step" in passes(name) else None

    def backward(batch: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        x, t, tokens, target = inputs(name, batch)
        y = model(x, t + 1, None if tokens is None else (tokens, None))
        ops.mse(y, target).backward()
        grads = {key: p.grad for key, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        return y.data, grads

    def forward(batch: int) -> np.ndarray:
        x, t, tokens, _ = inputs(name, batch)
        with no_grad():
            return model(x, t + 1, None if tokens is None else (tokens, None)).data

    def step(batch: int) -> None:
        assert optimizer
        optimizer.step(1e-6, backward(batch)[1])

    def sampling(batch: int) -> np.ndarray:
        x, _, tokens, _ = inputs(name, batch)
        n, levels = batch // 2, samplers.spaced_timesteps(1000, STEPS)
        conds = (tokens[:n], None), (tokens[n:], None)
        return list(samplers.ddim(model, x[:n], *conds, GUIDANCE, levels, schedule.linear(1000)))[-1].x_prev

    def check(batch: int) -> None:
        if "step" in passes(name):
            output, grads = backward(batch)
        else:
            output, grads = (sampling if "sampling" in passes(name) else forward)(batch), {}
        np.savez(folder / "ours.npz", output=output, **grads)

    return {"check": check, "forward": forward, "step": step, "sampling": sampling}


def torchs(name: str, folder: Path, way: str) -> dict[str, Callable[[int], Any]]:
    """diffusers' model. way: contiguous, channels last, compiled; or exact: writes weights and float64 results."""
    import diffusers
    import torch

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from helpers import in_our_layout, plain

    from minidiff.pretrained.configs import unet_config

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    memory = torch.channels_last if way == "channels last" else torch.contiguous_format
    model = getattr(diffusers, NETWORKS[name]["model"])(**NETWORKS[name]["config"]).to(memory_format=memory)
    called = torch.compile(model) if way == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def given(batch: int, dtype: Any = torch.float32) -> Any:
        x, t, tokens, target = inputs(name, batch)
        x, target = (
            torch.tensor(a, dtype=dtype).permute(0, 3, 1, 2).contiguous(memory_format=memory) for a in (x, target)
        )
        return x, torch.tensor(t), () if tokens is None else (torch.tensor(tokens, dtype=dtype),), target

    def backward(batch: int, dtype: Any = torch.float32) -> Any:
        x, t, tokens, target = given(batch, dtype)
        y = called(x, t, *tokens).sample
        torch.nn.functional.mse_loss(y, target).backward()
        return y

    def forward(batch: int, dtype: Any = torch.float32) -> Any:
        x, t, tokens, _ = given(batch, dtype)
        with torch.inference_mode():
            return called(x, t, *tokens).sample

    def step(batch: int) -> None:
        backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    def sampling(batch: int, dtype: Any = torch.float32) -> Any:
        scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(STEPS)
        x, _, (tokens,), _ = given(batch, dtype)
        x = x[: batch // 2]
        with torch.inference_mode():
            for t in scheduler.timesteps:
                cond, uncond = called(torch.cat([x, x]), t, tokens).sample.chunk(2)
                x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
        return x

    def exact_time(t: Any) -> Any:
        """diffusers makes the waves of t in float32 whatever the network's type, off by 1e-5 where t is large."""
        half, shift = model.time_proj.num_channels // 2, model.time_proj.downscale_freq_shift
        waves = t[:, None].double() * torch.exp(-np.log(10000) * torch.arange(half).double() / (half - shift))
        sin_cos = [waves.sin(), waves.cos()]
        return torch.cat(sin_cos[::-1] if model.time_proj.flip_sin_to_cos else sin_cos, dim=-1)

    def weights(batch: int) -> None:
        np.savez(folder / "weights.npz", **in_our_layout(model.state_dict()))
        config = unet_config({**plain(model.config), "_class_name": NETWORKS[name]["model"]})
        (folder / "config.json").write_text(json.dumps(vars(config)))

    def check(batch: int) -> None:
        weights(batch)
        for precision, dtype in (("float32", torch.float32), ("float64", torch.float64)):
            model.to(dtype)
            if dtype == torch.float64:
                model.time_proj.forward = exact_time
            run = {"step": backward, "sampling": sampling}.get(passes(name)[-1], forward)
            y = run(batch, dtype).detach().permute(0, 2, 3, 1).numpy()
            grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
            np.savez(folder / f"{precision}.npz", output=y, **in_our_layout(grads))
            model.zero_grad()

    return {"weights": weights, "check": check, "forward": forward, "step": step, "sampling": sampling}


class Side:
    """A worker's state: one network."""

    def __init__(self, side: str, name: str, folder: str):
        self.commands = ours(name, Path(folder)) if side == "ours" else torchs(name, Path(folder), side)

    def __call__(self, command: str, batch: int = 0) -> float:
        """Seconds of a command; or the most memory that the process ever had, in bytes."""
        if command == "memory":
            return peak_memory()
        return timed(lambda: self.commands[command](batch))


LIMIT = 3.0  # an array's error should not be more times PyTorch's
WORST = 1e-4  # the relative error of results that are not worth timing


def errors(folder: Path) -> dict[str, float]:
    """Root-mean-square errors against float64, relative to the array's size: of the output and of every gradient.

    A gradient's size counts as at least 1e-4 of the largest one's: beside that it is noise on both sides.
    """
    exact = dict(np.load(folder / "float64.npz"))
    sizes = {key: float(np.sqrt((a**2).mean())) for key, a in exact.items()}
    largest = max((size for key, size in sizes.items() if key != "output"), default=0.0)
    error: dict[str, dict[str, float]] = {}
    for side, file in (("ours", "ours.npz"), ("PyTorch", "float32.npz")):
        got = dict(np.load(folder / file))
        if got.keys() != exact.keys():
            raise RuntimeError(f"gradients differ in name: {sorted(got.keys() ^ exact.keys())[:4]}")
        error[side] = {
            key: float(np.sqrt(((a - exact[key]) ** 2).mean())) / max(sizes[key], 1e-4 * largest * (key != "output"))
            for key, a in got.items()
        }
    if not all(e <= WORST for of_side in error.values() for e in of_side.values()):
        raise RuntimeError(f"results are not those of float64: {error}")
    result = {f"{side}, output": e.pop("output") for side, e in error.items()}
    ours, theirs = error["ours"], error["PyTorch"]
    if ours:
        for side, e in error.items():
            result |= {f"{side}, worst gradient": max(e.values())}
            result |= {f"{side}, median gradient": float(np.median(list(e.values())))}
        ratios = [ours[key] / theirs[key] for key in ours]
        result |= {"gradients": len(ratios), "ours / PyTorch, gradient by gradient, worst": max(ratios)}
        result |= {f"gradients over {LIMIT:g} times": sum(not r <= LIMIT for r in ratios)}
    return result


def measure(name: str, samples: int, compiled: bool) -> dict[str, Any]:
    """Compare, then time in turns."""
    batch = NETWORKS[name]["batch"]
    with tempfile.TemporaryDirectory() as tmp:
        workers: dict[str, Worker] = {}
        try:
            workers["exact"] = Worker("exact", name, tmp)
            workers["exact"].ask(command="check", batch=batch)
            workers.pop("exact").close()
            workers["ours"] = Worker("ours", name, tmp)
            workers["ours"].ask(command="check", batch=batch)
            record: dict[str, Any] = {"errors": errors(Path(tmp)), "threads": THREADS}
            workers |= {way: Worker(way, name, tmp) for way in PYTORCH if compiled or way != "compiled"}
            for what in passes(name):
                ask = {side: (lambda w=w, c=what: w.ask(command=c, batch=batch)) for side, w in workers.items()}
                for warm_up in ask.values():
                    warm_up()
                seconds = in_turns(ask, samples)
                best = best_rival(seconds)
                assert best
                ratio = seconds[best]["median"] / seconds["ours"]["median"]
                record[what] = {"seconds": seconds, "best rival": best, "ratio": ratio}
            record["peak bytes"] = {side: w.ask(command="memory") for side, w in workers.items()}
            return record
        finally:
            for worker in workers.values():
                worker.close()


def table(records: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = [
        "network",
        "pass",
        "ours (ms)",
        "PyTorch (ms)",
        "its best way",
        "PyTorch / ours",
        "peak memory, ours / PyTorch's best",
    ]
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for name, r in records.items():
        memory = {side: b / 1e9 for side, b in r["peak bytes"].items()}
        told = f"{memory['ours']:.2f} / {min(memory[w] for w in PYTORCH if w in memory):.2f} GB"
        for what in passes(name):
            s, best = r[what]["seconds"], r[what]["best rival"]
            cells = [name, what, spread(s["ours"]), spread(s[best]), best, f"{r[what]['ratio']:.2f}", told]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Errors against float64 (rms, relative), ours / PyTorch's:", ""]
    for name, r in records.items():
        e = r["errors"]
        told = [
            f"{k} {e[f'ours, {k}']:.1e} / {v:.1e}" for s, v in e.items() if s.startswith("PyTorch") for k in [s[9:]]
        ]
        if "gradients" in e:
            told += [
                f"gradient by gradient at most {e['ours / PyTorch, gradient by gradient, worst']:.2f} times PyTorch's",
                f"{e[f'gradients over {LIMIT:g} times']} of {e['gradients']} over {LIMIT:g} times",
            ]
        lines.append(f"- {name}: {', '.join(told)}")
    return "\n".join(lines) + "\n"


def draw(records: dict[str, Any]) -> None:
    """How many times as fast as each of PyTorch's ways."""
    rows, ratios = [], {w: [] for w in PYTORCH}
    for name, r in records.items():
        for what in passes(name):
            s = r[what]["seconds"]
            rows.append(f"{name}\n{what}")
            for way, values in ratios.items():
                values.append(s[way]["median"] / s["ours"]["median"] if way in s else 0.0)
    values = {f"PyTorch {way}": v for way, v in ratios.items()}
    title = "Time of PyTorch / time of minidiff, whole networks"
    plotting.save(plotting.bars(rows, values, "times as long", ("minidiff", 1.0), title), results_path("unet", "png"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(map(repr, NETWORKS))}")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (minutes of compiling)")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(Side(*args.serve))
    path = results_path("unet", "json")
    records = json.loads(path.read_text())["networks"] if path.exists() and args.names else {}
    for name in args.names or NETWORKS:
        records[name] = measure(name, args.samples, not args.no_compile)
        print(name, json.dumps(records[name], indent=1), flush=True)
        records = {n: records[n] for n in NETWORKS if n in records}
        write_json("unet", {"command": f"bench_unet.py --samples {args.samples}", "networks": records})
        results_path("unet", "md").write_text(table(records))
        draw(records)


if __name__ == "__main__":
    main()
