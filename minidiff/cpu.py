"""The compiled CPU kernels under the names and arguments of the ops' own functions.

Each function here allocates the results and calls the kernel of csrc/ops.h; the reference beside the equation, in
minidiff/ops, says what is computed. Kernels compute in float32: other numbers go to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

import minidiff._cpu as _cpu
from minidiff.backend import REFERENCE, Array
from minidiff.random import check_counters
from minidiff.threads import num_threads

F = TypeVar("F", bound=Callable[..., Any])
CHOOSE = -1  # the convolution's algorithm: by shape (0: direct, 2 and 4: Winograd)
PLAIN = frozenset((type(None), bool, int, float, str, tuple))  # what is no array
MAX_TAPS = 1024  # of a convolution's kernel, as in csrc/kernels.h
OPS: dict[str, Callable[..., Any]] = {}

_cpu.set_num_threads(num_threads())
_cpu.install_allocator()


def kinds() -> dict[str, SimpleNamespace]:
    """The kinds of kernels that run here: "cpu", the best instruction set, and the others as "cpu_NAME"."""
    names = _cpu.instruction_sets()
    return {
        "cpu" if i == 0 else f"cpu_{name}": SimpleNamespace(
            instruction_set=name, activate=partial(_cpu.use_instruction_set, name), **OPS
        )
        for i, name in enumerate(names)
    }


def _op(function: F) -> F:
    """Enter a function in OPS: arrays come in C order; those that are not NumPy's float32 go to the reference."""

    name, float32, array = function.__name__, np.dtype(np.float32), np.ndarray

    @wraps(function)
    def call(*args: Any) -> Any:
        for a in args:
            kind = type(a)
            if kind is array:
                if a.dtype is not float32 or not a.flags.c_contiguous:
                    return careful(*args)
            elif kind not in PLAIN:
                return careful(*args)
        return function(*args)

    def careful(*args: Any) -> Any:
        gaps = []
        for i, a in enumerate(args):
            kind = type(a)
            if kind is array:
                if a.dtype != float32:
                    return REFERENCE[name](*args)
                if not a.flags.c_contiguous:
                    gaps.append(i)
            elif kind not in PLAIN:
                first = a[0] if kind is list and a else a
                if hasattr(first, "dtype") and (type(first) is not array or first.dtype != float32):
                    return REFERENCE[name](*args)
        return function(*(np.ascontiguousarray(a) if i in gaps else a for i, a in enumerate(args)))

    OPS[function.__name__] = call
    return function


def _flat(arrays: Sequence[Array]) -> list[Array]:
    """Each array as one row of numbers in its own memory: results are written there."""
    for a in arrays:
        if not a.flags.c_contiguous:
            raise ValueError(f"an array of shape {a.shape} that is updated in place must be in C order")
    return [a.reshape(-1) for a in arrays]


def _rows(a: Array, width: int | None = None) -> Array:
    """The array with its leading axes joined."""
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1] if width is None else width)  # -1 cannot tell 0 rows of 0


@_op
def conv2d_forward(
    x: Array, w: Array, b: Array | None, stride: int, sides: Any,
    x2: Array | None = None, shift: Array | None = None, residual: Array | None = None, upsample: int = 1,
    silu: bool = False,
) -> Array:  # fmt: skip
    if w.shape[0] * w.shape[1] > MAX_TAPS:
        return REFERENCE["conv2d_forward"](x, w, b, stride, sides, x2, shift, residual, upsample, silu)
    H, W = (n * upsample + sum(s) - k for n, s, k in zip(x.shape[1:3], sides, w.shape[:2], strict=True))
    y = np.empty((x.shape[0], H // stride + 1, W // stride + 1, w.shape[3]), np.float32)
    _cpu.conv2d_forward(y, x, x2, w, b, shift, residual, stride, sides, upsample, silu, None, CHOOSE)
    return y


@_op
def conv2d_backward(
    dy: Array, x: Array, w: Array, stride: int, sides: Any,
    x2: Array | None = None, upsample: int = 1, needs_dx: bool = True, needs_dw: bool = True,
) -> Any:  # fmt: skip
    if w.shape[0] * w.shape[1] > MAX_TAPS:
        return REFERENCE["conv2d_backward"](dy, x, w, stride, sides, x2, upsample, needs_dx, needs_dw)
    dx = np.empty_like(x) if needs_dx else None
    dx2 = np.empty_like(x2) if needs_dx and x2 is not None else None
    dw = np.empty_like(w) if needs_dw else None
    dshift = np.empty((dy.shape[0], dy.shape[3]), np.float32)
    _cpu.conv2d_backward(dx, dx2, dw, dshift, dy, x, x2, w, stride, sides, upsample, CHOOSE)
    return dx, dx2, dw, dshift


@_op
def linear_forward(
    x: Array,
    w: Array,
    b: Array | None,
    residual: Array | None = None,
    activation: str | None = None,
    keep: bool = False,
) -> Any:
    width = w.shape[1] // 2 if activation == "geglu" else w.shape[1]
    y = np.empty((*x.shape[:-1], width), np.float32)
    z = np.empty((*x.shape[:-1], w.shape[1]), np.float32) if keep and activation else None
    rows, sums = (None if a is None else _rows(a, w.shape[1]) for a in (residual, z))
    _cpu.linear_forward(_rows(y, width), sums, _rows(x, w.shape[0]), w, b, rows, activation or "")
    return y, z


@_op
def linear_backward(
    dy: Array, x: Array, w: Array, needs_dx: bool, activation: str | None = None, z: Array | None = None
) -> Any:
    dx = np.empty(x.shape, np.float32) if needs_dx else None
    dw, db = np.empty(w.shape, np.float32), np.empty(w.shape[1], np.float32)
    into, sums = (None if a is None else _rows(a, n) for a, n in ((dx, w.shape[0]), (z, w.shape[1])))
    _cpu.linear_backward(into, dw, db, _rows(dy, dy.shape[-1]), sums, _rows(x, w.shape[0]), w, activation or "")
    return dx, dw, db


@_op
def group_norm_forward(
    x: Array, gain: Array, offset: Array, groups: int, eps: float, silu: bool, x2: Array | None = None
) -> Any:
    B, N, C = x.shape[0], x.shape[1], gain.shape[1]
    y, stats = np.empty((B, N, C), np.float32), np.empty((2, B, C), np.float32)
    _cpu.group_norm_forward(y, *stats, x, x2, gain, offset, groups, eps, silu)
    return y, stats[0], stats[1]


@_op
def group_norm_backward(
    dy: Array, x: Array, gain: Array, offset: Array, mean: Array, rstd: Array, groups: int, silu: bool,
    x2: Array | None = None,
) -> Any:  # fmt: skip
    dx, dx2 = np.empty_like(x), None if x2 is None else np.empty_like(x2)
    sums = np.empty((2, *mean.shape), np.float32)
    _cpu.group_norm_backward(dx, dx2, *sums, dy, x, x2, gain, offset, mean, rstd, groups, silu)
    return dx, dx2, sums[0], sums[1]


@_op
def layer_norm_forward(x: Array, gamma: Array, beta: Array, eps: float) -> Any:
    y = np.empty(x.shape, np.float32)
    stats = np.empty((2, *x.shape[:-1], 1), np.float32)
    mean, rstd = (s.reshape(-1) for s in stats)
    _cpu.layer_norm_forward(_rows(y), mean, rstd, _rows(x), gamma, beta, eps)
    return y, stats[0], stats[1]


@_op
def layer_norm_backward(dy: Array, x: Array, gamma: Array, mean: Array, rstd: Array) -> Any:
    dx, dgamma, dbeta = np.empty(x.shape, np.float32), np.empty_like(gamma), np.empty_like(gamma)
    stats = (s.reshape(-1) for s in (mean, rstd))
    _cpu.layer_norm_backward(_rows(dx), dgamma, dbeta, _rows(dy), _rows(x), gamma, *stats)
    return dx, dgamma, dbeta


def _bias(bias: Array | None, q: Array, k: Array, heads: int) -> Array | None:
    return None if bias is None else np.broadcast_to(bias, (q.shape[0], heads, q.shape[1], k.shape[1]))


@_op
def attention_forward(
    q: Array, k: Array, v: Array, heads: int, scale: float, bias: Array | None, causal: bool, keep: bool = True
) -> tuple[Array, Array | None]:
    y = np.empty((*q.shape[:2], v.shape[2]), np.float32)
    lse = np.empty((q.shape[0], heads, q.shape[1]), np.float32) if keep else None
    _cpu.attention_forward(y, lse, q, k, v, _bias(bias, q, k, heads), heads, scale, causal)
    return y, lse


@_op
def attention_backward(
    dy: Array,
    y: Array,
    lse: Array,
    q: Array,
    k: Array,
    v: Array,
    heads: int,
    scale: float,
    bias: Array | None,
    causal: bool,
) -> Any:
    dq, dk, dv = (np.empty(a.shape, np.float32) for a in (q, k, v))
    _cpu.attention_backward(dq, dk, dv, dy, y, lse, q, k, v, _bias(bias, q, k, heads), heads, scale, causal)
    return dq, dk, dv, None


def _pointwise(kind: str, x: Array) -> Array:
    y = np.empty(x.shape, np.float32)
    _cpu.pointwise_forward(y.reshape(-1), x.reshape(-1), kind)
    return y


def _pointwise_slope(kind: str, dy: Array, x: Array) -> Array:
    dx = np.empty(x.shape, np.float32)
    _cpu.pointwise_backward(dx.reshape(-1), dy.reshape(-1), x.reshape(-1), kind)
    return dx


@_op
def silu_forward(x: Array) -> Array:
    return _pointwise("silu", x)


@_op
def silu_backward(dy: Array, x: Array) -> Array:
    return _pointwise_slope("silu", dy, x)


@_op
def gelu_forward(x: Array, kind: str) -> Array:
    return _pointwise(f"gelu_{kind}", x)


@_op
def gelu_backward(dy: Array, x: Array, kind: str) -> Array:
    return _pointwise_slope(f"gelu_{kind}", dy, x)


@_op
def geglu_forward(x: Array) -> Array:
    y = np.empty((*x.shape[:-1], x.shape[-1] // 2), np.float32)
    _cpu.geglu_forward(_rows(y), _rows(x))
    return y


@_op
def geglu_backward(dy: Array, x: Array) -> Array:
    dx = np.empty(x.shape, np.float32)
    _cpu.geglu_backward(_rows(dx), _rows(dy, x.shape[-1] // 2), _rows(x))
    return dx


@_op
def mse_forward(a: Array, b: Array) -> Array:
    if not a.size:
        return REFERENCE["mse_forward"](a, b)
    y = np.empty(1, np.float32)
    _cpu.mse_forward(y, a.reshape(-1), b.reshape(-1))
    return y[0]


@_op
def mse_backward(dy: Array, a: Array, b: Array) -> Array:
    da = np.empty(a.shape, np.float32)
    _cpu.mse_backward(da.reshape(-1), np.asarray(dy, np.float32).reshape(1), a.reshape(-1), b.reshape(-1))
    return da


@_op
def accumulate(a: Array, b: Array) -> Array:
    y = np.empty(a.shape, np.float32)
    _cpu.add(y.reshape(-1), a.reshape(-1), b.reshape(-1))
    return y


@_op
def gradient_norm(grads: Sequence[Array]) -> float:
    y = np.empty(1, np.float32)
    _cpu.gradient_norm(y, [np.ascontiguousarray(g) for g in grads])
    return float(y[0])


@_op
def adamw_update(
    p: Sequence[Array], g: Sequence[Array], m: Sequence[Array], v: Sequence[Array], ema: Sequence[Array],
    g_factor: float, lr: float, beta1: float, beta2: float, eps: float, decay: Sequence[float], step: int,
    ema_decay: float,
) -> None:  # fmt: skip
    grads = [np.ascontiguousarray(a).reshape(-1) for a in g]
    _cpu.adamw_update(
        _flat(p), grads, _flat(m), _flat(v), _flat(ema), decay, g_factor, lr, beta1, beta2, eps, step, ema_decay
    )


@_op
def orthogonalised(matrices: Sequence[Array], steps: int = 5) -> list[Array]:
    if steps != 5:
        return REFERENCE["orthogonalised"](matrices, steps)
    results = [np.empty(g.shape, np.float32) for g in matrices]
    _cpu.orthogonalise(results, [np.ascontiguousarray(g) for g in matrices])
    return results


@_op
def muon_momentum(g: Sequence[Array], m: Sequence[Array], g_factor: float, mu: float) -> list[Array]:
    u = [np.empty(a.shape, np.float32) for a in g]
    grads = [np.ascontiguousarray(a).reshape(-1) for a in g]
    _cpu.muon_momentum(_flat(u), grads, _flat(m), g_factor, mu)
    return u


@_op
def descend(
    p: Sequence[Array], u: Sequence[Array], ema: Sequence[Array], lr: float, length: Sequence[float],
    decay: Sequence[float], ema_decay: float,
) -> None:  # fmt: skip
    along = [np.ascontiguousarray(a).reshape(-1) for a in u]
    _cpu.descend(_flat(p), along, _flat(ema), lr, length, decay, ema_decay)


@_op
def reverse_step(
    x_t: Array, eps_cond: Array, eps_uncond: Array | None, z: Array | None, w: float, signal: float, noise: float,
    clip: float | None, of_x0: float, of_eps: float, of_z: float,
) -> Any:  # fmt: skip
    results = tuple(np.empty(x_t.shape, np.float32) for _ in range(3))
    arrays = (None if a is None else a.reshape(-1) for a in (*results, x_t, eps_cond, eps_uncond, z))
    _cpu.reverse_step(*arrays, w, signal, noise, clip or 0.0, of_x0, of_eps, of_z)
    return results


@_op
def normal(seed: int, samples: Sequence[int], step: int, purpose: int, shape: tuple[int, ...]) -> np.ndarray:
    check_counters(seed, samples, step)
    out = np.empty((len(samples), *shape), np.float32)
    _cpu.normal(out.reshape(len(samples), math.prod(shape)), list(samples), seed, step, int(purpose))
    return out
