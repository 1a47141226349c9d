"""Every rung of every CUDA ladder on a GPU, beside PyTorch, and the share of what the device can do.

    python benchmarks/bench_gpu.py [--only conv2d] [--seconds 400]
    python benchmarks/bench_gpu.py --rehearsal      # tiny arrays on the emulator and PyTorch's CPU: does it work?

Results are compared with float64 first (of drawn noise only ours: PyTorch draws other); what is wrong is not timed.
Inputs rotate among sets that together have five times the size of the L2 cache, so every call finds them cold. Times
are CUDA events around one call, all of them queued before the first begins; median and the 20th and 80th percentile.
Memory-bound ops are given as a share of a measured copy, products as a share of the best measured matrix product of
their precision. PyTorch runs eagerly in float32 without and with TF32 and in bfloat16 (channels last; bfloat16 goes in
and out, where ours has float32), and in what time is left compiled (default and max-autotune). Its optimizers are its
fused AdamW and lists of arrays at once. Writes results/DEVICE/ops.json and ops.md, after every case.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from minidiff import diffusion  # noqa: F401 - it enters its ops in the table
from minidiff.backend import MODULES
from minidiff.optim import step_numbers
from minidiff.random import Draw, Purpose, normal

RESULTS = Path(__file__).parent / "results"
WRONG = {"fp32": 1e-4, "tf32": 3e-3, "bf16": 2e-2}  # rms error, relative; beyond it a result is wrong
REPEATS, SECONDS = 30, 0.3  # of one row


@dataclass
class Case:
    """One op on one shape: ours and PyTorch's as functions of the same tensors."""

    op: str  # as in ops.h
    ladder: str
    shape: str
    inputs: list[tuple[int, ...]]
    ours: Callable[..., Any]  # (kernels, *arrays) -> array or arrays
    torchs: Callable[..., Any]  # (*tensors) -> tensor or tensors; also run in float64 as the reference
    for_torch: Callable[..., Any] = lambda *tensors: tensors  # its inputs in PyTorch's own layout
    flops: float = 0.0  # of a product; 0: bound by memory
    numbers: float = 0.0  # read and written, as few as can be, where the op is bound by memory
    prepare: Callable[..., Any] = lambda *tensors: None  # writes into normal numbers what must not be such
    in_place: bool = False  # it changes its inputs: checked on copies
    drawn: Callable[..., Any] | None = None  # exact results of ours; PyTorch draws others, which are not compared


# ---- cases


def cases(small: bool) -> Iterator[Case]:
    """Shapes of the U-Nets that minidiff trains, large enough to fill a GPU; small: to rehearse."""
    for B, H, C, N in [(1, 6, 8, 12)] if small else [(32, 32, 128, 128), (16, 64, 192, 192), (64, 16, 512, 512)]:
        yield from convolution(B, H, C, N, 1)
    yield from convolution(*((1, 6, 8, 8, 2) if small else (32, 64, 128, 128, 2)))
    for M, K, N in [(33, 20, 24)] if small else [(16384, 1024, 1024), (65536, 320, 320), (8192, 640, 5120)]:
        yield linear_forward(M, K, N)
        yield linear_backward(M, K, N)
    for B, P, C, G in [(2, 9, 16, 4)] if small else [(32, 4096, 192, 32), (64, 1024, 256, 32), (1, 4096, 320, 32)]:
        yield group_norm_forward(B, P, C, G)
        yield group_norm_backward(B, P, C, G)
    for rows, D in [(7, 24)] if small else [(131072, 320), (16384, 1280)]:
        yield layer_norm_forward(rows, D)
        yield layer_norm_backward(rows, D)
    shapes = [(1, 9, 7, 2, 8)] if small else [(16, 1024, 1024, 8, 64), (32, 4096, 77, 8, 40), (64, 256, 256, 4, 32)]
    for B, Lq, Lk, heads, d in shapes:
        yield attention_forward(B, Lq, Lk, heads, d)
        yield attention_backward(B, Lq, Lk, heads, d)
    n = 1003 if small else 1 << 26
    yield Case("silu_forward", "pointwise", f"{n}", [(n,)], lambda k, x: k.silu_forward(x), F.silu, numbers=2 * n)
    yield Case("accumulate", "add", f"{n}", [(n,)] * 2, lambda k, a, b: k.accumulate(a, b), torch.add, numbers=3 * n)
    yield Case("mse_forward", "mse", f"{n}", [(n,)] * 2, lambda k, a, b: k.mse_forward(a, b), F.mse_loss, numbers=2 * n)
    yield from optimizers([(3, 3, 5, 4)] * 3 + [(7,)] * 2 if small else [(3, 3, 256, 256)] * 36 + [(256,)] * 60)
    yield from samplers(*((2, 103) if small else (64, 1 << 20)))
    yield from geglu(*((7, 12) if small else (32768, 1280)))
    yield convolution_around(*((2, 6, 8, 12) if small else (32, 32, 128, 128)))
    for activation in ("gelu_exact", "geglu", None):
        yield linear_around(*((33, 20, 24) if small else (16384, 640, 5120)), activation)
    yield from convolution(*((1, 6, 8, 12) if small else (1, 64, 320, 320)), 1)
    yield from convolution(*((2, 5, 8, 12) if small else (32, 32, 512, 256)), 1, kernel=1)


def convolution(B: int, H: int, C: int, N: int, stride: int, kernel: int = 3) -> Iterator[Case]:
    """A convolution, forward and backward."""
    size = "" if kernel == 3 else f", {kernel}x{kernel}"
    shape, out, margin = f"{B}x {H}x{H}, {C} -> {N}, stride {stride}{size}", (H - 1) // stride + 1, kernel // 2
    flops, sides = 2.0 * B * out * out * kernel**2 * C * N, ((margin, margin),) * 2

    def channels_last(x: Any, w: Any, *dy: Any) -> Any:
        x, *dy = (a.permute(0, 3, 1, 2) for a in (x, *dy))
        return x, w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last), *dy

    def torchs(x: Any, w: Any) -> Any:
        return F.conv2d(x, w, None, stride, margin).permute(0, 2, 3, 1)

    def backward(x: Any, w: Any, dy: Any) -> Any:
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, [stride] * 2, [margin] * 2, [1, 1], False, [0, 0], 1, [True, True, False],
        )  # fmt: skip

    def both(x: Any, w: Any, dy: Any) -> Any:
        dx, dw, _ = backward(x, w, dy)
        return dx.permute(0, 2, 3, 1), dw.permute(2, 3, 1, 0)

    def ours_backward(k: Any, x: Any, w: Any, dy: Any) -> Any:
        dx, _, dw, _ = k.conv2d_backward(dy, x, w, stride, sides)
        return dx, dw

    arrays = [(B, H, H, C), (kernel, kernel, C, N), (B, out, out, N)]
    yield Case(
        "conv2d_forward", "conv2d", shape, arrays[:2], lambda k, x, w: k.conv2d_forward(x, w, None, stride, sides),
        torchs, channels_last, flops,
    )  # fmt: skip
    yield Case("conv2d_backward", "conv2d", shape, arrays, ours_backward, both, channels_last, 2 * flops)


def convolution_around(B: int, H: int, C: int, N: int) -> Case:
    """A 3x3 convolution and what stands around it: a bias, a shift for each image, a residual, SiLU."""

    def ours(k: Any, x: Any, w: Any, b: Any, shift: Any, residual: Any) -> Any:
        return k.conv2d_forward(x, w, b, 1, ((1, 1), (1, 1)), None, shift, residual, 1, True)

    def channels_last(x: Any, w: Any, b: Any, shift: Any, residual: Any) -> Any:
        w = w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        return x.permute(0, 3, 1, 2), w, b, shift, residual.permute(0, 3, 1, 2)

    def torchs(x: Any, w: Any, b: Any, shift: Any, residual: Any) -> Any:
        return F.silu(F.conv2d(x, w, b, 1, 1) + shift[:, :, None, None] + residual).permute(0, 2, 3, 1)

    return Case(
        "conv2d_forward + bias, shift, residual, SiLU", "conv2d", f"{B}x {H}x{H}, {C} -> {N}",
        [(B, H, H, C), (3, 3, C, N), (N,), (B, N), (B, H, H, N)], ours, torchs, channels_last, 18.0 * B * H * H * C * N,
    )  # fmt: skip


def linear_around(M: int, K: int, N: int, activation: str | None) -> Case:
    """x W + b, and an activation or a residual."""

    def ours(k: Any, x: Any, w: Any, b: Any, *residual: Any) -> Any:
        return k.linear_forward(x, w, b, *(residual or (None,)), activation)[0]

    def torchs(x: Any, w: Any, b: Any, *residual: Any) -> Any:
        y = torch.addmm(b, x, w)
        if activation == "geglu":
            return _geglu(y)
        return F.gelu(y) if activation else y + residual[0]

    name = {"geglu": "GEGLU", "gelu_exact": "GELU", None: "residual"}[activation]
    inputs = [(M, K), (K, N), (N,)] + ([] if activation else [(M, N)])
    return Case(f"linear_forward + bias, {name}", "linear", f"({M}, {K}) ({K}, {N})", inputs, ours, torchs,
                flops=2.0 * M * K * N)  # fmt: skip


def _geglu(x: Any) -> Any:
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)


def geglu(rows: int, D: int) -> Iterator[Case]:
    """GEGLU of (rows, 2 D), and its gradient."""
    shape, wide, narrow = f"({rows}, {D})", (rows, 2 * D), (rows, D)
    yield Case("geglu_forward", "geglu", shape, [wide], lambda k, x: k.geglu_forward(x), _geglu, numbers=3 * rows * D)

    def torchs(x: Any, dy: Any) -> Any:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = _geglu(leaf)
        return torch.autograd.grad(y, leaf, dy)[0]

    def ours(k: Any, x: Any, dy: Any) -> Any:
        k.geglu_forward(x)
        return k.geglu_backward(dy, x)

    yield Case("geglu forward + backward", "geglu", shape, [wide, narrow], ours, torchs, numbers=8 * rows * D)


def optimizers(shapes: list[tuple[int, ...]]) -> Iterator[Case]:
    """The optimizers' passes over parameters of these shapes, and the norm of the gradients."""
    count, n = len(shapes), sum(math.prod(shape) for shape in shapes)
    lr, beta1, beta2, eps, decay, average, step = 1e-2, 0.9, 0.999, 1e-8, 0.01, 0.99, 3
    now = torch.tensor(step_numbers(1.0, lr, beta1, beta2, eps, step, average))
    about, numbers = f"{count} arrays, {n} numbers", [(len(now),)]

    def lists(arrays: Any) -> list[list[Any]]:
        return [list(arrays[i : i + count]) for i in range(0, len(arrays), count)]

    def prepare(*tensors: Any) -> None:
        tensors[-1].copy_(now)
        for v in tensors[3 * count : 4 * count]:  # of squares: it is not negative
            v.abs_()

    @functools.cache
    def counted(device: Any) -> list[Any]:
        return [torch.tensor(float(step), device=device) for _ in shapes]

    def adamw(k: Any, *arrays: Any) -> Any:
        p, g, m, v, ema = lists(arrays[:-1])
        k.adamw_update(p, g, m, v, ema, [decay] * count, arrays[-1])
        return [*p, *m, *v, *ema]

    def torchs_adamw(*tensors: Any) -> Any:
        p, g, m, v, ema = lists(tensors[:-1])
        torch._fused_adamw_(
            p, g, m, v, [], counted(p[0].device), lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        torch._foreach_lerp_(ema, p, 1 - average)
        return [*p, *m, *v, *ema]

    def momentum(k: Any, *arrays: Any) -> Any:
        g, m = lists(arrays[:-1])
        return [*k.muon_momentum(g, m, arrays[-1]), *m]

    def torchs_momentum(*tensors: Any) -> Any:
        g, m = lists(tensors[:-1])
        torch._foreach_lerp_(m, g, 1 - beta1)
        return [*torch._foreach_lerp(g, m, beta1), *m]

    def descend(k: Any, *arrays: Any) -> Any:
        p, u, ema = lists(arrays[:-1])
        k.descend(p, u, ema, [0.5] * count, [decay] * count, arrays[-1])
        return [*p, *ema]

    def torchs_descend(*tensors: Any) -> Any:
        p, u, ema = lists(tensors[:-1])
        torch._foreach_mul_(p, 1 - lr * decay)
        torch._foreach_add_(p, u, alpha=-0.5 * lr)
        torch._foreach_lerp_(ema, p, 1 - average)
        return [*p, *ema]

    for op, ladder, ours, torchs, arrays, moved in (
        ("adamw_update + average", "adamw_update", adamw, torchs_adamw, 5, 9),
        ("muon_momentum", "muon_momentum", momentum, torchs_momentum, 2, 4),
        ("descend + average", "descend", descend, torchs_descend, 3, 5),
    ):
        yield Case(op, ladder, about, arrays * shapes + numbers, ours, torchs, numbers=moved * n, prepare=prepare,
                   in_place=True)  # fmt: skip
    norm = lambda *g: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)))  # noqa: E731
    yield Case("gradient_norm", "gradient_norm", about, shapes, lambda k, *g: k.gradient_norm(list(g)), norm, numbers=n)


def samplers(B: int, n: int) -> Iterator[Case]:
    """Noise of B samples of n numbers, training's first step and a sampler's step: the noise read, or drawn there."""
    samples, about, shape = list(range(B)), f"({B}, {n})", (B, n)
    few, step = samples[:2], (2.0, 0.6, 0.8, 1.5, 0.7, 0.5, 0.4)  # w, signal, noise, clip; of x0, of eps, of z

    def noise(purpose: Purpose, like: Any) -> Any:
        return torch.as_tensor(normal.reference(3, few, 2, purpose, (n,))).to(like)

    def mixed(x0: Any, signal: Any, noise: Any, eps: Any) -> Any:
        signal, noise = signal[:, None], noise[:, None]
        return signal * x0 + noise * eps, signal * eps - noise * x0

    def stepped(x_t: Any, cond: Any, uncond: Any, z: Any) -> Any:
        w, signal, noise, clip, of_x0, of_eps, of_z = step
        x0 = ((x_t - noise * (uncond + w * (cond - uncond))) / signal).clamp(-clip, clip)
        eps = (x_t - signal * x0) / noise
        return of_x0 * x0 + of_eps * eps + of_z * z, x0, eps

    def signals(*tensors: Any) -> None:
        for t in tensors[1:]:
            t.abs_()

    yield Case(
        "normal", "normal", about, [shape],
        lambda k, x: k.normal(3, samples, 2, Purpose.TRAIN_NOISE, (n,), x), torch.randn_like, numbers=B * n,
        drawn=lambda x: noise(Purpose.TRAIN_NOISE, x),
    )  # fmt: skip
    yield Case(
        "q_sample_drawn", "q_sample_drawn", about, [shape, (B,), (B,)],
        lambda k, *a: k.q_sample_drawn(*a, "v", Draw(3, samples, 2, Purpose.TRAIN_NOISE)),
        lambda *t: mixed(*t, torch.randn_like(t[0])), numbers=3 * B * n, prepare=signals,
        drawn=lambda *t: mixed(*(a[:2] for a in t), noise(Purpose.TRAIN_NOISE, t[0])),
    )  # fmt: skip
    yield Case("reverse_step", "reverse_step", about, [shape] * 4, lambda k, *a: k.reverse_step(*a, *step), stepped,
               numbers=7 * B * n)  # fmt: skip
    yield Case(
        "reverse_step_drawn", "reverse_step_drawn", about, [shape] * 3,
        lambda k, *a: k.reverse_step_drawn(*a, Draw(3, samples, 2, Purpose.STEP_NOISE), *step),
        lambda *t: stepped(*t, torch.randn_like(t[0])), numbers=6 * B * n,
        drawn=lambda *t: stepped(*(a[:2] for a in t), noise(Purpose.STEP_NOISE, t[0])),
    )  # fmt: skip


def linear_forward(M: int, K: int, N: int) -> Case:
    """x W."""
    ours = lambda k, x, w: k.linear_forward(x, w, None)[0]  # noqa: E731
    return Case(
        "linear_forward",
        "linear",
        f"({M}, {K}) ({K}, {N})",
        [(M, K), (K, N)],
        ours,
        torch.matmul,
        flops=2.0 * M * K * N,
    )


def linear_backward(M: int, K: int, N: int) -> Case:
    """dy W^T and x^T dy."""
    ours = lambda k, x, w, dy: k.linear_backward(dy, x, w, True)  # noqa: E731
    torchs = lambda x, w, dy: (dy @ w.T, x.T @ dy, dy.sum(0))  # noqa: E731
    return Case(
        "linear_backward",
        "linear",
        f"({M}, {K}) ({K}, {N})",
        [(M, K), (K, N), (M, N)],
        ours,
        torchs,
        flops=4.0 * M * K * N,
    )


def _normalised(x: Any, groups: int) -> Any:
    return F.group_norm(x.permute(0, 2, 1), groups).permute(0, 2, 1)


def group_norm_forward(B: int, P: int, C: int, G: int) -> Case:
    """GroupNorm + SiLU of (B, P, C)."""
    ours = lambda k, x, gain, offset: k.group_norm_forward(x, gain, offset, G, 1e-5, True)[0]  # noqa: E731
    torchs = lambda x, gain, offset: F.silu(_normalised(x, G) * gain + offset)  # noqa: E731
    return Case(
        "group_norm_forward", "group_norm", f"{B}x {P}, {C} in {G}", [(B, P, C), (1, C), (1, C)], ours, torchs,
        numbers=2 * B * P * C,
    )  # fmt: skip


def group_norm_backward(B: int, P: int, C: int, G: int) -> Case:
    """The gradients of x, gain and offset, one an image."""

    def ours(k: Any, x: Any, gain: Any, offset: Any, dy: Any) -> Any:
        _, mean, rstd = k.group_norm_forward(x, gain, offset, G, 1e-5, True)
        dx, _, dgain, doffset = k.group_norm_backward(dy, x, gain, offset, mean, rstd, G, True)
        return dx, dgain, doffset

    def torchs(x: Any, gain: Any, offset: Any, dy: Any) -> Any:
        each = gain.expand(B, C), offset.expand(B, C)
        with torch.enable_grad():
            leaves = [a.detach().requires_grad_() for a in (x, *each)]
            y = F.silu(_normalised(leaves[0], G) * leaves[1][:, None] + leaves[2][:, None])
        return torch.autograd.grad(y, leaves, dy)

    return Case(
        "group_norm forward + backward", "group_norm", f"{B}x {P}, {C} in {G}",
        [(B, P, C), (1, C), (1, C), (B, P, C)], ours, torchs, numbers=5 * B * P * C,
    )  # fmt: skip


def layer_norm_forward(rows: int, D: int) -> Case:
    """LayerNorm of (rows, D)."""
    ours = lambda k, x, g, b: k.layer_norm_forward(x, g, b, 1e-5)[0]  # noqa: E731
    torchs = lambda x, g, b: F.layer_norm(x, (D,), g, b)  # noqa: E731
    return Case("layer_norm_forward", "layer_norm", f"({rows}, {D})", [(rows, D), (D,), (D,)], ours, torchs,
                numbers=2 * rows * D)  # fmt: skip


def layer_norm_backward(rows: int, D: int) -> Case:
    """All its gradients."""

    def ours(k: Any, x: Any, g: Any, b: Any, dy: Any) -> Any:
        _, mean, rstd = k.layer_norm_forward(x, g, b, 1e-5)
        return k.layer_norm_backward(dy, x, g, mean, rstd)

    def torchs(x: Any, g: Any, b: Any, dy: Any) -> Any:
        with torch.enable_grad():
            leaves = [a.detach().requires_grad_() for a in (x, g, b)]
            y = F.layer_norm(leaves[0], (D,), leaves[1], leaves[2])
        return torch.autograd.grad(y, leaves, dy)

    inputs = [(rows, D), (D,), (D,), (rows, D)]
    return Case(
        "layer_norm forward + backward", "layer_norm", f"({rows}, {D})", inputs, ours, torchs, numbers=5 * rows * D
    )


def _heads(a: Any, heads: int) -> Any:
    B, L, D = a.shape
    return a.view(B, L, heads, D // heads).transpose(1, 2)


def attention_forward(B: int, Lq: int, Lk: int, heads: int, d: int) -> Case:
    """softmax(q k^T / sqrt(d)) v."""
    D = heads * d
    ours = lambda k, q, kk, v: k.attention_forward(q, kk, v, heads, d**-0.5, None, False, False)[0]  # noqa: E731

    def torchs(q: Any, k: Any, v: Any) -> Any:
        y = F.scaled_dot_product_attention(*(_heads(a, heads) for a in (q, k, v)))
        return y.transpose(1, 2).reshape(B, Lq, D)

    shape = f"{B}x {heads} heads of {d}, {Lq} to {Lk}"
    return Case("attention_forward", "attention", shape, [(B, Lq, D), (B, Lk, D), (B, Lk, D)], ours, torchs,
                flops=4.0 * B * Lq * Lk * D)  # fmt: skip


def attention_backward(B: int, Lq: int, Lk: int, heads: int, d: int) -> Case:
    """Forward, and the gradients of q, k and v."""
    forward = attention_forward(B, Lq, Lk, heads, d)

    def ours(on: Any, q: Any, k: Any, v: Any, dy: Any) -> Any:
        y, lse = on.attention_forward(q, k, v, heads, d**-0.5, None, False, True)
        return on.attention_backward(dy, y, lse, q, k, v, heads, d**-0.5, None, False)[:3]

    def torchs(q: Any, k: Any, v: Any, dy: Any) -> Any:
        with torch.enable_grad():
            leaves = [a.detach().requires_grad_() for a in (q, k, v)]
            y = forward.torchs(*leaves)
        return torch.autograd.grad(y, leaves, dy)

    inputs = [*forward.inputs, forward.inputs[0]]
    return Case(
        "attention forward + backward", "attention", forward.shape, inputs, ours, torchs, flops=3.5 * forward.flops
    )


# ---- the machine


class Gpu:
    """CuPy and PyTorch on one GPU, sharing memory and the stream."""

    kind = "cuda"

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.name = properties["name"].decode()
        self.l2 = properties["l2CacheSize"]
        self.device = "cuda"
        self.free = 0

    def ours(self, tensor: Any) -> Any:
        """The same memory as CuPy's."""
        return self.cupy.asarray(tensor)

    def captured(self, function: Callable[..., Any]) -> Any:
        """The function as a CUDA graph."""
        from minidiff.cuda import Captured

        return Captured(function)

    def time(self, calls: list[Callable[[], Any]]) -> list[float]:
        """Milliseconds of calls, taken in turn from the list: up to REPEATS in about SECONDS."""
        with self.cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            calls[0]()
            first = self._events(calls[-1:], 1)[0]
            repeats = int(np.clip(1000 * SECONDS / first, 2, REPEATS))
            self._events(calls, min(repeats, 5))
            return self._events(calls, repeats)

    def _events(self, calls: list[Callable[[], Any]], repeats: int) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which the calls queue up
        for i, (start, end) in enumerate(pairs):
            start.record()
            calls[i % len(calls)]()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def forget(self) -> None:
        """Give back what is cached, and count memory from here."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.cupy.get_default_memory_pool().free_all_blocks()
        self.free = self.cupy.cuda.runtime.memGetInfo()[0]

    def memory(self) -> float:
        """Gigabytes taken from the device since `forget`."""
        return (self.free - self.cupy.cuda.runtime.memGetInfo()[0]) / 1e9


class Launched:
    """What is a graph on a GPU, as the function that it is: capturing it only calls it."""

    def __init__(self, function: Callable[..., Any]):
        self.capture = self.function = function

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class Rehearsal:
    """The emulator and PyTorch on the CPU: every line of this file runs, no number means anything."""

    kind, name, l2, device = "emulated", "rehearsal", 4096, "cpu"

    def ours(self, tensor: Any) -> Any:
        """The same memory as NumPy's."""
        return tensor.numpy()

    def captured(self, function: Callable[..., Any]) -> Any:
        """No graph."""
        return Launched(function)

    def time(self, calls: list[Callable[[], Any]]) -> list[float]:
        """Milliseconds of a few calls."""
        times = []
        for i in range(2):
            started = time.perf_counter()
            calls[i % len(calls)]()
            times.append(1000 * (time.perf_counter() - started))
        return times

    def forget(self) -> None:
        """Nothing is counted here."""

    def memory(self) -> float:
        """Not measured."""
        return 0.0


def results_folder(machine: Any) -> Path:
    """Where a device's results lie."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ceilings(machine: Any, small: bool) -> dict[str, float]:
    """Bytes a second of a large copy (read and written), and operations a second of square products by precision."""
    n = 1 << 12 if small else 1 << 28
    a, b = (torch.empty(n, dtype=torch.float32, device=machine.device) for _ in range(2))
    found = {"copy": 8 * n / (1e-3 * min(machine.time([lambda: b.copy_(a)])))}
    side = 64 if small else 8192
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, y = (torch.randn(side, side, device=machine.device).to(dtype) for _ in range(2))
        best = min(machine.time([lambda x=x, y=y: x @ y]))
        found[name] = 2.0 * side**3 / (1e-3 * best)
    return found


# ---- one case


class Inputs:
    """A case's inputs, as many sets as leave the cache cold, and its exact results."""

    def __init__(self, case: Case, machine: Any):
        floats = sum(math.prod(shape) for shape in case.inputs)
        sets = max(2, math.ceil(5 * machine.l2 / (4 * floats)) + 1)
        torch.manual_seed(0)
        self.tensors = [[torch.randn(s, device=machine.device) for s in case.inputs] for _ in range(sets)]
        for one in self.tensors:
            case.prepare(*one)
        with torch.no_grad():
            exact = case.drawn or case.torchs
            self.exact = flat(exact(*case.for_torch(*(t.double() for t in self.tensors[0]))))


def ours(case: Case, inputs: Inputs, machine: Any, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each rung."""
    module = MODULES[machine.kind].module
    arrays = [[machine.ours(t) for t in one] for one in inputs.tensors]
    call = functools.partial(case.ours, MODULES[machine.kind])
    ladders = {n: r for n, r in module.ladders().items() if n.startswith(case.ladder)}
    if case.ladder == "reverse_step":
        ladders.pop("reverse_step_drawn")
    for rung in range(1, max(map(len, ladders.values())) + 1):
        here = {name: min(rung, len(rungs)) for name, rungs in ladders.items()}
        for name, number in here.items():
            module.choose(name, number)
        steps = [ladders[name][number - 1] for name, number in here.items()]
        operands = max((step[3] for step in steps), key=list(WRONG).index)
        yield row(case, machine, limits, f"{rung} {steps[0][0]}", operands, call, arrays, inputs.exact)
    for name in ladders:
        module.choose(name, 0)


def rivals(
    case: Case, inputs: Inputs, machine: Any, limits: dict[str, float], compiled: bool
) -> Iterator[dict[str, Any]]:
    """PyTorch's ways: eager, or compiled."""
    torch.backends.cudnn.benchmark = True
    for operands in ("bf16", "fp32", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = operands == "tf32"
        dtype = torch.bfloat16 if operands == "bf16" else torch.float32
        sets = [[t.to(dtype, copy=case.in_place) for t in case.for_torch(*one)] for one in inputs.tensors]
        for mode in ("default", "max-autotune-no-cudagraphs") if compiled else (None,):
            if mode:
                torch._dynamo.reset()  # after a few shapes it would fall back to eager code
            function = torch.compile(case.torchs, mode=mode, dynamic=False) if mode else case.torchs

            call = torch.no_grad()(function)
            way = f"PyTorch compiled {operands} {mode}" if mode else f"PyTorch eager {operands}"
            yield row(case, machine, limits, way, operands, call, sets, None if case.drawn else inputs.exact)


def row(
    case: Case, machine: Any, limits: dict[str, float], way: str, operands: str, call: Callable[..., Any],
    sets: list[list[Any]], exact: list[Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Error first, unless there is nothing to compare with; then the times, if it is right.

    What works in place is compared on copies of the first set, and timed on the others.
    """
    result: dict[str, Any] = {"op": case.op, "shape": case.shape, "way": way, "operands": operands}
    try:
        if exact is not None:
            got = flat(call(*([_copy(a) for a in sets[0]] if case.in_place else sets[0])))
            if case.drawn:
                got = [g[: len(want)] for g, want in zip(got, exact, strict=True)]
            result["error"] = max(error(g, want) for g, want in zip(got, exact, strict=True))
            if not result["error"] <= WRONG[operands]:
                return {**result, "wrong": True}
            del got
        times = np.array(machine.time([functools.partial(call, *one) for one in sets[case.in_place :]]))
    except Exception as e:  # one way that fails does not end the others, unless it has broken the device
        if any(word in str(e) for word in ("illegal", "misaligned", "unspecified launch failure", "assert")):
            raise
        return {**result, "failed": f"{type(e).__name__}: {e}"[:300]}
    result |= dict(zip(("ms", "p20", "p80"), np.percentile(times, (50, 20, 80)).tolist(), strict=True))
    if case.flops:
        result["tflops"] = case.flops / result["ms"] * 1e-9
        result["share"] = case.flops / (1e-3 * result["ms"]) / limits[operands]
    else:
        size = 2 if way.startswith("PyTorch") and "bf16" in way else 4
        result["gbs"] = size * case.numbers / result["ms"] * 1e-6
        result["share"] = size * case.numbers / (1e-3 * result["ms"]) / limits["copy"]
    return result


def _copy(array: Any) -> Any:
    return array.clone() if isinstance(array, torch.Tensor) else array.copy()


def flat(results: Any) -> list[Any]:
    """Results as tensors in float64, where they are."""
    results = results if isinstance(results, tuple | list) else (results,)
    return [torch.as_tensor(r).detach().double() for r in results]


def error(got: Any, want: Any) -> float:
    """Root mean square of the difference, relative; a gradient that the other keeps an image is summed."""
    if got.shape != want.shape:
        got = got.reshape(-1, *want.shape).sum(0) if got.numel() > want.numel() else got.reshape(want.shape)
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a way, with its speed against the best of PyTorch in the same precision."""
    lines = ["| op | shape | way | ms (p20-p80) | share of the ceiling | PyTorch's best / this | error |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        if "ms" not in r:
            lines.append(f"| {r['op']} | {r['shape']} | {r['way']} | {'wrong' if r.get('wrong') else 'failed'} | | | |")
            continue
        same = [s["ms"] for s in rows if "ms" in s and s["way"].startswith("PyTorch")
                and (s["op"], s["shape"], s["operands"]) == (r["op"], r["shape"], r["operands"])]  # fmt: skip
        ratio = f"{min(same) / r['ms']:.2f}" if same else ""
        off = f"{r['error']:.1e}" if "error" in r else "other noise"
        lines.append(
            f"| {r['op']} | {r['shape']} | {r['way']} | {r['ms']:.3g} ({r['p20']:.3g}-{r['p80']:.3g}) | "
            f"{r['share']:.0%} | {ratio} | {off} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ops whose name begins so")
    parser.add_argument("--seconds", type=float, default=400, help="begin no case after so many seconds")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes the most time")
    parser.add_argument("--rehearsal", action="store_true", help="tiny arrays on the emulator")
    args = parser.parse_args()
    machine = Rehearsal() if args.rehearsal else Gpu()
    started = time.time()
    limits = ceilings(machine, args.rehearsal)
    print({name: f"{value:.3g}" for name, value in limits.items()}, flush=True)
    rows: list[dict[str, Any]] = []
    for compiled in (False,) if args.no_compile or args.rehearsal else (False, True):
        for case in cases(args.rehearsal):
            if not case.op.startswith(args.only) or time.time() - started > args.seconds:
                continue
            inputs = Inputs(case, machine)
            if not compiled:
                rows += ours(case, inputs, machine, limits)
            rows += rivals(case, inputs, machine, limits, compiled)
            if not args.rehearsal:
                about = {"device": machine.name, "torch": torch.__version__, "ceilings": limits, "rows": rows}
                (results_folder(machine) / "ops.json").write_text(json.dumps(about, indent=1) + "\n")
                (results_folder(machine) / "ops.md").write_text(table(rows))
            print(case.op, case.shape, "compiled" * compiled, f"{time.time() - started:.0f} s", flush=True)
    print(table(rows))
    broken = [r for r in rows if "ms" not in r and not r["way"].startswith("PyTorch")]
    if broken:
        raise SystemExit(f"bench_gpu.py: {len(broken)} rungs are wrong or fail: {broken[:3]}")


if __name__ == "__main__":
    main()
