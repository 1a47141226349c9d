"""Whole training steps of three U-Nets on a GPU, beside PyTorch: forward, backward and AdamW.

    python benchmarks/bench_gpu_steps.py [--only NAME] [--seconds 240]
    python benchmarks/bench_gpu_steps.py --rehearsal      # a tiny network on the emulator and PyTorch's CPU

Both sides have the same weights and inputs. The losses and all gradients of a small batch are first compared with
PyTorch's in float64, and what two captured steps do to the parameters with what two launched ones do (the errors of the
table); what is wrong is not timed. Ours runs launch by launch and captured, as one CUDA graph, with factors of products
in float32, TF32 and bfloat16; its AdamW also keeps the moving average. PyTorch runs eagerly (channels last) and
compiled, by default and max-autotune (which captures too), in the same three precisions, with its fused AdamW. Times
are CUDA events around a step, median and the 20th and 80th percentile. Writes results/DEVICE/steps.json and steps.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_gpu import WRONG, Gpu, Rehearsal, results_folder
from torch_unet import TorchUNet, load, our_layout

from minidiff import kernels, ops
from minidiff.backend import MODULES, to_numpy
from minidiff.models import UNet, UNetConfig
from minidiff.models.unet import parameter_count
from minidiff.optim import AdamW

PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Network:
    """A U-Net and what it is trained on."""

    config: UNetConfig
    size: int
    batch: int
    tokens: tuple[int, int] | None = None

    def inputs(self, batch: int) -> dict[str, np.ndarray | None]:
        """x_t, t counted from 1, the target, and the text."""
        rng = np.random.default_rng(0)
        x, target = rng.standard_normal((2, batch, self.size, self.size, 3), dtype=np.float32)
        text = None if self.tokens is None else rng.standard_normal((batch, *self.tokens), dtype=np.float32)
        return {"x": x, "t": rng.integers(1, 1001, batch), "target": target, "tokens": text}


NETWORKS = {
    "64x64 (as unet.cu times it)": Network(
        UNetConfig(
            channels=(64, 128, 192, 256), attention=("none", "none", "self", "self"), mid_attention="self",
            heads=(4, 4, 4, 4), transformer_layers=(1, 1, 1, 1),
        ), 64, 32,
    ),
    "conditional 10 M": Network(UNetConfig(), 32, 128, (16, 128)),
    "DDPM CIFAR-10 35.7 M": Network(
        UNetConfig(
            channels=(128, 256, 256, 256), attention=("none", "self", "none", "none"), mid_attention="self",
            heads=(1, 1, 1, 1), transformer_layers=(1, 1, 1, 1), norm_eps=1e-6, downsample_padding=0, sin_first=True,
            frequency_shift=1.0,
        ), 32, 128,
    ),
}  # fmt: skip
TINY = {
    "tiny": Network(
        UNetConfig(channels=(8, 16), blocks=1, attention=("none", "cross"), heads=(2, 2), transformer_layers=(1, 1),
                   text_width=8, norm_groups=4), 8, 2, (5, 8),
    )
}  # fmt: skip


# ---- the two sides: a step as a function without arguments, and the loss and gradients of a batch


class Ours:
    """minidiff on the machine's kernels."""

    def __init__(self, network: Network, machine: Any, state: dict[str, np.ndarray]):
        self.network, self.machine, self.state = network, machine, state
        self.model = UNet(network.config, seed=None)
        self.load()
        self.parameters = dict(self.model.named_parameters())

    def load(self) -> None:
        """Begin where the measurements begin."""
        self.model.load({name: self.array(a) for name, a in self.state.items()})

    def array(self, a: Any) -> Any:
        """On the machine's device, in memory of its own."""
        return None if a is None else self.machine.ours(torch.tensor(a, device=self.machine.device)).copy()

    def given(self, batch: int) -> list[Any]:
        """x, t, target, tokens."""
        return [self.array(a) for a in self.network.inputs(batch).values()]

    def gradients(self, x: Any, t: Any, target: Any, tokens: Any) -> tuple[Any, dict[str, Any]]:
        """The loss, and its gradient by parameter."""
        loss = ops.mse(self.model(x, t, None if tokens is None else (tokens, None)), target)
        loss.backward()
        grads = {name: p.grad for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.grad = None
        return loss.data, grads

    def step(self, captured: bool, lr: float = 1e-6) -> Callable[[], None]:
        """One training step."""
        optimizer, given = AdamW(self.parameters), self.given(self.network.batch)

        def whole(numbers: Any, *given: Any) -> None:
            optimizer.update(self.gradients(*given)[1], numbers)

        if not captured:
            return lambda: whole(optimizer.next_numbers(lr), *given)
        graph, numbers = self.machine.captured(whole), optimizer.next_numbers(lr)
        graph.capture(numbers * np.nan, *given)  # its rehearsal changes nothing
        optimizer.step_number -= 1
        return lambda: graph(optimizer.next_numbers(lr), *given)

    def moved(self, captured: bool) -> dict[str, np.ndarray]:
        """By how much two steps change each parameter."""
        self.load()
        step = self.step(captured, 1e-3)
        for _ in range(2):
            step()
        moves = {name: to_numpy(p.data).astype(np.float64) - self.state[name] for name, p in self.parameters.items()}
        self.load()
        return moves


class Torchs:
    """PyTorch's plain twin."""

    def __init__(self, network: Network, machine: Any, state: dict[str, np.ndarray]):
        self.network, self.machine, self.state = network, machine, state

    def model(self, dtype: Any = torch.float32, memory: Any = torch.channels_last) -> TorchUNet:
        """A new one with the same weights."""
        model = TorchUNet(self.network.config)
        load(model, self.state)
        return model.to(device=self.machine.device, dtype=dtype).to(memory_format=memory)

    def given(self, batch: int, dtype: Any = torch.float32) -> tuple[Any, ...]:
        """x, t, target, tokens."""

        def tensor(a: Any) -> Any:
            if a is None or a.dtype != np.float32:
                return None if a is None else torch.tensor(a, device=self.machine.device)
            a = torch.tensor(a, device=self.machine.device, dtype=dtype)
            return a.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a

        return tuple(tensor(a) for a in self.network.inputs(batch).values())

    def exact(self, batch: int) -> tuple[float, dict[str, np.ndarray]]:
        """The loss and all gradients in float64, in our layouts."""
        model = self.model(torch.float64)
        x, t, target, tokens = self.given(batch, torch.float64)
        loss = F.mse_loss(model(x, t, tokens), target)
        loss.backward()
        return loss.item(), {name: our_layout(p.grad) for name, p in model.named_parameters()}

    def step(self, precision: str, mode: str | None) -> Callable[[], None]:
        """One training step; mode of torch.compile, None: eager."""
        model, given = self.model(), self.given(self.network.batch)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        x, t, target, tokens = given

        def loss_of(x: Any, t: Any, target: Any, tokens: Any) -> Any:
            with torch.autocast(self.machine.device, torch.bfloat16, enabled=precision == "bf16"):
                return F.mse_loss(model(x, t, tokens).float(), target)

        if mode:
            torch._dynamo.reset()
        called = torch.compile(loss_of, mode=mode, dynamic=False) if mode else loss_of

        def step() -> None:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
            torch.backends.cudnn.benchmark = True
            called(x, t, target, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


# ---- measuring


def measure(name: str, network: Network, machine: Any, seconds: float, compiled: bool) -> Iterator[dict[str, Any]]:
    """A row for each way; no more of PyTorch's are begun after `seconds`."""
    started = time.time()
    model = UNet(network.config, seed=0)
    rng = np.random.default_rng(1)
    state = {  # nothing may stay zero: it would hide what lies behind it
        n: a if a.any() else 0.05 * rng.standard_normal(a.shape, dtype=np.float32) for n, a in model.state().items()
    }
    ours, torchs = Ours(network, machine, state), Torchs(network, machine, state)
    few = min(4, network.batch)
    exact = torchs.exact(few)
    module = MODULES[machine.kind].module
    about = {"network": name, "parameters": parameter_count(model), "batch": network.batch}

    for precision in PRECISIONS:
        module.allow(precision)
        with kernels(machine.kind):
            launched = max(errors(ours.gradients(*ours.given(few)), exact).values())
            for way, error in (("launched", lambda e=launched: e), ("captured", lambda: error_of_capture(ours))):
                row = {**about, "side": "minidiff", "way": way, "precision": precision}
                try:
                    row["error"] = error()
                except Exception as e:  # one way that fails does not end the others
                    yield row | {"failed": f"{type(e).__name__}: {e}"[:300]}
                    continue
                if row["error"] <= WRONG[precision] * 10:  # it grows through the layers
                    yield row | timed(machine, lambda way=way: ours.step(way == "captured"))
                else:
                    yield row | {"wrong": True}
        module.allow("fp32")
    for precision in PRECISIONS[::-1]:  # the goal first
        for mode in (None, "default", "max-autotune") if compiled else (None,):
            row = {**about, "side": "PyTorch", "way": mode or "eager", "precision": precision}
            if time.time() - started > seconds:
                yield row | {"failed": "no time left"}
            else:
                yield row | timed(machine, lambda p=precision, m=mode: torchs.step(p, m))


def errors(got: tuple[Any, dict[str, Any]], want: tuple[float, dict[str, np.ndarray]]) -> dict[str, float]:
    """The loss's relative error, and every gradient's root mean square against the largest of the network's."""
    largest = max(float(np.sqrt(np.mean(w**2))) for w in want[1].values())
    found = {"loss": abs(float(got[0]) / want[0] - 1)}
    for name, wanted in want[1].items():
        g = got[1][name]
        g = np.asarray(g.get() if hasattr(g, "get") else g, np.float64)
        scale = max(float(np.sqrt(np.mean(wanted**2))), 1e-2 * largest)
        found[name] = float(np.sqrt(np.mean((g - wanted) ** 2))) / scale
    return found


def error_of_capture(ours: Ours) -> float:
    """Of what two captured steps do to the parameters against two launched ones: root mean squares, relative.

    Both launch the same kernels in the same order; this is small, or the graph is not the step that it was made from.
    """
    want, got = ours.moved(False), ours.moved(True)
    difference, size = (
        sum(float(np.sum(np.square(a))) for a in arrays) for arrays in ([got[n] - want[n] for n in want], want.values())
    )
    return float(np.sqrt(difference / size)) if size else float("nan")


def timed(machine: Any, make: Callable[[], Callable[[], None]]) -> dict[str, Any]:
    """Milliseconds of a step, and the most memory that it took beside what was there."""
    try:
        machine.forget()
        step = make()
        times = machine.time([step])
        memory = machine.memory()
    except Exception as e:  # one way that fails does not end the others
        return {"failed": f"{type(e).__name__}: {e}"[:300]}
    return dict(zip(("ms", "p20", "p80"), np.percentile(times, (50, 20, 80)).tolist(), strict=True)) | {"gb": memory}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: every way, with PyTorch's best of the same precision and of all against it."""
    lines = [
        "| network | batch | way | precision | ms a step (p20-p80) | images/s | GB | PyTorch's best / this | error |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        way = f"{r['side']} {r['way']}"
        if "ms" not in r:
            told = "wrong" if r.get("wrong") else f"failed: {r['failed']}"
            lines.append(f"| {r['network']} | {r['batch']} | {way} | {r['precision']} | {told} | | | | |")
            continue
        same = [s["ms"] for s in rows if "ms" in s and s["side"] == "PyTorch"
                and (s["network"], s["precision"]) == (r["network"], r["precision"])]  # fmt: skip
        ratio = f"{min(same) / r['ms']:.2f}" if same else ""
        error = f"{r['error']:.1e}" if "error" in r else ""
        spread = f"{r['p20']:.3g}-{r['p80']:.3g}"
        lines.append(
            f"| {r['network']} | {r['batch']} | {way} | {r['precision']} | {r['ms']:.3g} ({spread}) | "
            f"{1000 * r['batch'] / r['ms']:.0f} | {r['gb']:.2f} | {ratio} | {error} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name begins so")
    parser.add_argument("--seconds", type=float, default=240, help="begin nothing after so many seconds")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes the most time")
    parser.add_argument("--rehearsal", action="store_true", help="a tiny network on the emulator")
    args = parser.parse_args()
    machine = Rehearsal() if args.rehearsal else Gpu()
    networks = {n: w for n, w in (TINY if args.rehearsal else NETWORKS).items() if n.startswith(args.only)}
    rows: list[dict[str, Any]] = []
    started = time.time()
    for i, (name, network) in enumerate(networks.items()):
        share = (args.seconds - (time.time() - started)) / (len(networks) - i)
        for row in measure(name, network, machine, share, not (args.no_compile or args.rehearsal)):
            rows.append(row)
            print(json.dumps(row), f"{time.time() - started:.0f} s", flush=True)
            if not args.rehearsal:
                about = {"device": machine.name, "torch": torch.__version__, "rows": rows}
                (results_folder(machine) / "steps.json").write_text(json.dumps(about, indent=1) + "\n")
                (results_folder(machine) / "steps.md").write_text(table(rows))
    print(table(rows))
    broken = [r for r in rows if "ms" not in r and r["side"] == "minidiff"]
    if broken:
        raise SystemExit(f"bench_gpu_steps.py: {len(broken)} ways are wrong or fail: {broken[:3]}")


if __name__ == "__main__":
    main()
