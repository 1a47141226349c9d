"""The compiled kernels under the names and arguments of the ops' own functions, whichever module computes.

Each function here allocates the results and calls the kernel of csrc/ops.h; the reference beside the equation, in
minidiff/ops, says what is computed. Kernels compute in float32, on their module's arrays: others go to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from minidiff.backend import REFERENCE, Array, array_module, gpu_kernel
from minidiff.random import Draw, Purpose, check_counters

F = TypeVar("F", bound=Callable[..., Any])
CHOOSE = -1  # the convolution's algorithm: by shape (on a CPU 0: direct, 2 and 4: Winograd)
PLAIN = frozenset((type(None), bool, int, float, str, tuple, np.float32, Draw))  # what is no array
MAX_TAPS = 1024  # of a convolution's kernel, as in csrc/kernels.h
NEEDS = {  # the kernel of an op's function, where it has another name
    "silu_forward": "pointwise_forward", "silu_backward": "pointwise_backward",
    "gelu_forward": "pointwise_forward", "gelu_backward": "pointwise_backward",
    "accumulate": "add", "orthogonalised": "orthogonalise",
}  # fmt: skip
OPS: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Compiled:
    """A compiled module, and the array module whose arrays it takes."""

    module: Any
    xp: ModuleType
    begin: Callable[[], None] | None = None  # before each call

    def empty(self, shape: int | tuple[int, ...]) -> Array:
        """An array for a result."""
        return self.xp.empty(shape, np.float32)


def offered(on: Compiled, **more: Any) -> SimpleNamespace:
    """The ops that the module has, as one kind of kernels; more: what else to keep there."""
    names = [name for name in OPS if hasattr(on.module, NEEDS.get(name, name))]
    return SimpleNamespace(**{name: _bound(on, name) for name in names}, **more)


def _bound(on: Compiled, name: str) -> Callable[..., Any]:
    """The op's function on this module; arrays come in C order; those that are not its float32 go to the reference."""
    function, float32, array, begin = OPS[name], np.dtype(np.float32), on.xp.ndarray, on.begin

    @wraps(function)
    def call(*args: Any) -> Any:
        if begin:
            begin()
        for a in args:
            kind = type(a)
            if kind is array:
                if a.dtype is not float32 or not a.flags.c_contiguous:
                    return careful(*args)
            elif kind not in PLAIN:
                return careful(*args)
        return function(on, *args)

    def careful(*args: Any) -> Any:
        gaps = []
        for i, a in enumerate(args):
            kind = type(a)
            if kind is array:
                if a.dtype != float32:
                    return elsewhere(args)
                if not a.flags.c_contiguous:
                    gaps.append(i)
            elif kind not in PLAIN:
                first = a[0] if kind is list and a else a
                if hasattr(first, "dtype") and (type(first) is not array or first.dtype != float32):
                    return elsewhere(args)
        return function(on, *(on.xp.ascontiguousarray(a) if i in gaps else a for i, a in enumerate(args)))

    def elsewhere(args: Any) -> Any:
        """CuPy's arrays go to the GPU's kernels; what these cannot take, and all other arrays, to the reference."""
        return ((on.xp is np and gpu_kernel(name, args)) or REFERENCE[name])(*args)

    return call


def _op(function: F) -> F:
    """Enter a function in OPS."""
    OPS[function.__name__] = function
    return function


def _rows(a: Array, width: int | None = None) -> Array:
    """The array with its leading axes joined."""
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1] if width is None else width)  # -1 cannot tell 0 rows of 0


def _samples(a: Array) -> Array:
    """The array (B, ...) as a row of numbers a sample."""
    return a.reshape(len(a), math.prod(a.shape[1:]))


def _checked(draw: Draw) -> tuple[int, list[int], int, int]:
    check_counters(draw.seed, draw.samples, draw.step)
    return draw.seed, list(draw.samples), draw.step, int(draw.purpose)


@_op
def conv2d_forward(
    on: Compiled,
    x: Array, w: Array, b: Array | None, stride: int, sides: Any,
    x2: Array | None = None, shift: Array | None = None, residual: Array | None = None, upsample: int = 1,
    silu: bool = False,
) -> Array:  # fmt: skip
    if w.shape[0] * w.shape[1] > MAX_TAPS:
        return REFERENCE["conv2d_forward"](x, w, b, stride, sides, x2, shift, residual, upsample, silu)
    H, W = (n * upsample + sum(s) - k for n, s, k in zip(x.shape[1:3], sides, w.shape[:2], strict=True))
    y = on.empty((x.shape[0], H // stride + 1, W // stride + 1, w.shape[3]))
    on.module.conv2d_forward(y, x, x2, w, b, shift, residual, stride, sides, upsample, silu, None, CHOOSE)
    return y


@_op
def conv2d_backward(
    on: Compiled,
    dy: Array, x: Array, w: Array, stride: int, sides: Any,
    x2: Array | None = None, upsample: int = 1, needs_dx: bool = True, needs_dw: bool = True,
) -> Any:  # fmt: skip
    if w.shape[0] * w.shape[1] > MAX_TAPS:
        return REFERENCE["conv2d_backward"](dy, x, w, stride, sides, x2, upsample, needs_dx, needs_dw)
    dx = on.xp.empty_like(x) if needs_dx else None
    dx2 = on.xp.empty_like(x2) if needs_dx and x2 is not None else None
    dw = on.xp.empty_like(w) if needs_dw else None
    dshift = on.empty((dy.shape[0], dy.shape[3]))
    on.module.conv2d_backward(dx, dx2, dw, dshift, dy, x, x2, w, stride, sides, upsample, CHOOSE)
    return dx, dx2, dw, dshift


@_op
def linear_forward(
    on: Compiled,
    x: Array,
    w: Array,
    b: Array | None,
    residual: Array | None = None,
    activation: str | None = None,
    keep: bool = False,
) -> Any:
    width = w.shape[1] // 2 if activation == "geglu" else w.shape[1]
    y = on.empty((*x.shape[:-1], width))
    z = on.empty((*x.shape[:-1], w.shape[1])) if keep and activation else None
    rows, sums = (None if a is None else _rows(a, w.shape[1]) for a in (residual, z))
    on.module.linear_forward(_rows(y, width), sums, _rows(x, w.shape[0]), w, b, rows, activation or "")
    return y, z


@_op
def linear_backward(
    on: Compiled, dy: Array, x: Array, w: Array, needs_dx: bool, activation: str | None = None, z: Array | None = None
) -> Any:
    dx = on.empty(x.shape) if needs_dx else None
    dw, db = on.empty(w.shape), on.empty(w.shape[1])
    into, sums = (None if a is None else _rows(a, n) for a, n in ((dx, w.shape[0]), (z, w.shape[1])))
    on.module.linear_backward(into, dw, db, _rows(dy, dy.shape[-1]), sums, _rows(x, w.shape[0]), w, activation or "")
    return dx, dw, db


@_op
def group_norm_forward(
    on: Compiled, x: Array, gain: Array, offset: Array, groups: int, eps: float, silu: bool, x2: Array | None = None
) -> Any:
    B, N, C = x.shape[0], x.shape[1], gain.shape[1]
    y, stats = on.empty((B, N, C)), on.empty((2, B, C))
    on.module.group_norm_forward(y, *stats, x, x2, gain, offset, groups, eps, silu)
    return y, stats[0], stats[1]


@_op
def group_norm_backward(
    on: Compiled,
    dy: Array, x: Array, gain: Array, offset: Array, mean: Array, rstd: Array, groups: int, silu: bool,
    x2: Array | None = None,
) -> Any:  # fmt: skip
    dx, dx2 = on.xp.empty_like(x), None if x2 is None else on.xp.empty_like(x2)
    sums = on.empty((2, *mean.shape))
    on.module.group_norm_backward(dx, dx2, *sums, dy, x, x2, gain, offset, mean, rstd, groups, silu)
    return dx, dx2, sums[0], sums[1]


@_op
def layer_norm_forward(on: Compiled, x: Array, gamma: Array, beta: Array, eps: float) -> Any:
    y = on.empty(x.shape)
    stats = on.empty((2, *x.shape[:-1], 1))
    mean, rstd = (s.reshape(-1) for s in stats)
    on.module.layer_norm_forward(_rows(y), mean, rstd, _rows(x), gamma, beta, eps)
    return y, stats[0], stats[1]


@_op
def layer_norm_backward(on: Compiled, dy: Array, x: Array, gamma: Array, mean: Array, rstd: Array) -> Any:
    dx, dgamma, dbeta = on.empty(x.shape), on.xp.empty_like(gamma), on.xp.empty_like(gamma)
    stats = (s.reshape(-1) for s in (mean, rstd))
    on.module.layer_norm_backward(_rows(dx), dgamma, dbeta, _rows(dy), _rows(x), gamma, *stats)
    return dx, dgamma, dbeta


def _bias(on: Compiled, bias: Array | None, q: Array, k: Array, heads: int) -> Array | None:
    return None if bias is None else on.xp.broadcast_to(bias, (q.shape[0], heads, q.shape[1], k.shape[1]))


@_op
def attention_forward(
    on: Compiled,
    q: Array,
    k: Array,
    v: Array,
    heads: int,
    scale: float,
    bias: Array | None,
    causal: bool,
    keep: bool = True,
) -> tuple[Array, Array | None]:
    y = on.empty((*q.shape[:2], v.shape[2]))
    lse = on.empty((q.shape[0], heads, q.shape[1])) if keep else None
    on.module.attention_forward(y, lse, q, k, v, _bias(on, bias, q, k, heads), heads, scale, causal)
    return y, lse


@_op
def attention_backward(
    on: Compiled,
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
    dq, dk, dv = (on.empty(a.shape) for a in (q, k, v))
    on.module.attention_backward(dq, dk, dv, dy, y, lse, q, k, v, _bias(on, bias, q, k, heads), heads, scale, causal)
    return dq, dk, dv, None


def _pointwise(on: Compiled, kind: str, x: Array) -> Array:
    y = on.empty(x.shape)
    on.module.pointwise_forward(y.reshape(-1), x.reshape(-1), kind)
    return y


def _pointwise_slope(on: Compiled, kind: str, dy: Array, x: Array) -> Array:
    dx = on.empty(x.shape)
    on.module.pointwise_backward(dx.reshape(-1), dy.reshape(-1), x.reshape(-1), kind)
    return dx


@_op
def silu_forward(on: Compiled, x: Array) -> Array:
    return _pointwise(on, "silu", x)


@_op
def silu_backward(on: Compiled, dy: Array, x: Array) -> Array:
    return _pointwise_slope(on, "silu", dy, x)


@_op
def gelu_forward(on: Compiled, x: Array, kind: str) -> Array:
    return _pointwise(on, f"gelu_{kind}", x)


@_op
def gelu_backward(on: Compiled, dy: Array, x: Array, kind: str) -> Array:
    return _pointwise_slope(on, f"gelu_{kind}", dy, x)


@_op
def geglu_forward(on: Compiled, x: Array) -> Array:
    y = on.empty((*x.shape[:-1], x.shape[-1] // 2))
    on.module.geglu_forward(_rows(y), _rows(x))
    return y


@_op
def geglu_backward(on: Compiled, dy: Array, x: Array) -> Array:
    dx = on.empty(x.shape)
    on.module.geglu_backward(_rows(dx), _rows(dy, x.shape[-1] // 2), _rows(x))
    return dx


@_op
def mse_forward(on: Compiled, a: Array, b: Array) -> Array:
    if not a.size:
        return REFERENCE["mse_forward"](a, b)
    y = on.empty(1)
    on.module.mse_forward(y, a.reshape(-1), b.reshape(-1))
    return y[0]


@_op
def mse_backward(on: Compiled, dy: Array, a: Array, b: Array) -> Array:
    da = on.empty(a.shape)
    on.module.mse_backward(da.reshape(-1), on.xp.asarray(dy, np.float32).reshape(1), a.reshape(-1), b.reshape(-1))
    return da


@_op
def accumulate(on: Compiled, a: Array, b: Array) -> Array:
    y = on.empty(a.shape)
    on.module.add(y.reshape(-1), a.reshape(-1), b.reshape(-1))
    return y


@_op
def gradient_norm(on: Compiled, grads: Sequence[Array]) -> Array:
    y = on.empty(1)
    on.module.gradient_norm(y, [on.xp.ascontiguousarray(g) for g in grads])
    return y[0]


@_op
def adamw_update(
    on: Compiled,
    p: Sequence[Array], g: Sequence[Array], m: Sequence[Array], v: Sequence[Array], ema: Sequence[Array],
    decay: Sequence[float], numbers: Array,
) -> None:  # fmt: skip
    on.module.adamw_update(p, [on.xp.ascontiguousarray(a) for a in g], m, v, ema, decay, numbers)


@_op
def orthogonalised(on: Compiled, matrices: Sequence[Array], steps: int = 5) -> list[Array]:
    if steps != 5:
        return REFERENCE["orthogonalised"](matrices, steps)
    results = [on.empty(g.shape) for g in matrices]
    on.module.orthogonalise(results, [on.xp.ascontiguousarray(g) for g in matrices])
    return results


@_op
def muon_momentum(on: Compiled, g: Sequence[Array], m: Sequence[Array], numbers: Array) -> list[Array]:
    u = [on.empty(a.shape) for a in g]
    on.module.muon_momentum(u, [on.xp.ascontiguousarray(a) for a in g], m, numbers)
    return u


@_op
def descend(
    on: Compiled,
    p: Sequence[Array], u: Sequence[Array], ema: Sequence[Array], length: Sequence[float], decay: Sequence[float],
    numbers: Array,
) -> None:  # fmt: skip
    on.module.descend(p, [on.xp.ascontiguousarray(a) for a in u], ema, length, decay, numbers)


@_op
def reverse_step(
    on: Compiled,
    x_t: Array, eps_cond: Array, eps_uncond: Array | None, z: Array | None, w: float, signal: float, noise: float,
    clip: float | None, of_x0: float, of_eps: float, of_z: float,
) -> Any:  # fmt: skip
    results = tuple(on.empty(x_t.shape) for _ in range(3))
    arrays = (None if a is None else a.reshape(-1) for a in (*results, x_t, eps_cond, eps_uncond, z))
    on.module.reverse_step(*arrays, w, signal, noise, clip or 0.0, of_x0, of_eps, of_z)
    return results


@_op
def reverse_step_drawn(
    on: Compiled,
    x_t: Array, eps_cond: Array, eps_uncond: Array | None, z: Draw, w: float, signal: float, noise: float,
    clip: float | None, of_x0: float, of_eps: float, of_z: float,
) -> Any:  # fmt: skip
    results = tuple(on.empty(x_t.shape) for _ in range(3))
    arrays = (None if a is None else _samples(a) for a in (*results, x_t, eps_cond, eps_uncond))
    on.module.reverse_step_drawn(*arrays, w, signal, noise, clip or 0.0, of_x0, of_eps, of_z, *_checked(z))
    return results


@_op
def q_sample_drawn(on: Compiled, x0: Array, signal: Array, noise: Array, prediction: str, draw: Draw) -> Any:
    x_t, target = on.empty(x0.shape), None if prediction == "x0" else on.empty(x0.shape)
    into = None if target is None else _samples(target)
    of_v = prediction == "v"
    on.module.q_sample_drawn(_samples(x_t), into, _samples(x0), signal, noise, of_v, *_checked(draw))
    return x_t, target


@_op
def normal(
    on: Compiled,
    seed: int, samples: Sequence[int], step: int, purpose: Purpose, shape: tuple[int, ...], like: Array | None = None,
) -> Array:  # fmt: skip
    if array_module(like) is not on.xp:
        return REFERENCE["normal"](seed, samples, step, purpose, shape, like)
    out = on.empty((len(samples), *shape))
    on.module.normal(_samples(out), *_checked(Draw(seed, samples, step, purpose)))
    return out
