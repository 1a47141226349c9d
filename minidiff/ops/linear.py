"""Linear layer: y = x W + b, another residual added, and an activation behind it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from minidiff.backend import Array, kernel
from minidiff.ops.geglu import geglu, geglu_forward
from minidiff.ops.gelu import gelu, gelu_forward
from minidiff.ops.silu import silu, silu_forward
from minidiff.tensor import Tensor, as_tensor, record, recording

ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "silu": (silu, silu_forward.reference),
    **{f"gelu_{k}": (partial(gelu, kind=k), partial(gelu_forward.reference, kind=k)) for k in ("exact", "tanh", "quick")},
    "geglu": (geglu, geglu_forward.reference),
}
"""What may stand behind a linear layer: as an op of its own, and its reference forward."""


@kernel
def linear_forward(
    x: Array, w: Array, b: Array | None, residual: Array | None = None, activation: str | None = None
) -> Array:
    """x (..., D_in), w (D_in, D_out), b (D_out,) or None, residual like y or None -> activation(y) (..., D_out)."""
    y = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ w  # one large product, not a small one for each leading index
    if b is not None:
        y += b
    y = y.reshape(*x.shape[:-1], w.shape[1])
    if residual is not None:
        y += residual
    return y if activation is None else ACTIVATIONS[activation][1](y)


@kernel
def linear_backward(dy: Array, x: Array, w: Array, needs_dx: bool) -> tuple[Array | None, Array, Array]:
    """dx = dy W^T, dW = x^T dy, db = the sum of dy over all rows."""
    rows = dy.reshape(-1, dy.shape[-1])
    dx = (rows @ w.T).reshape(x.shape) if needs_dx else None
    dw = x.reshape(-1, x.shape[-1]).T @ rows
    return dx, dw, rows.sum(axis=0)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = activation(x W + b + residual) over the last axis: x (..., D_in), weight (D_in, D_out), bias (D_out,) or None.

    residual: like y, or None. activation: None, "silu", "gelu_exact", "gelu_tanh", "gelu_quick", or "geglu", which halves
    the width and takes no residual; an op of its own where a gradient is wanted, which needs the numbers before it.
    """
    x, weight = as_tensor(x), as_tensor(weight)
    bias, residual = (None if a is None else as_tensor(a) for a in (bias, residual))
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"linear: x {x.shape} does not fit weight {weight.shape}; wanted (..., D_in) and (D_in, D_out)"
        )
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"linear: bias {bias.shape} does not fit weight {weight.shape}")
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[1]):
        raise ValueError(f"linear: residual {residual.shape} must be like the result of {x.shape} and {weight.shape}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if activation == "geglu" and (residual is not None or weight.shape[1] % 2):
        raise ValueError(f"linear: geglu needs an even number of outputs, got {weight.shape[1]}, and takes no residual")
    b, r = (None if a is None else a.data for a in (bias, residual))
    inputs = tuple(t for t in (x, weight, bias, residual) if t is not None)
    fused = None if recording(inputs) else activation
    y = linear_forward(x.data, weight.data, b, r, fused)

    def backward(dy: Array) -> list[Array | None]:
        dx, dw, db = linear_backward(dy, x.data, weight.data, x.requires_grad)
        return [dx, dw] + [db] * (bias is not None) + [dy] * (residual is not None)

    out = record("linear", y, inputs, backward)
    return out if activation is None or fused else ACTIVATIONS[activation][0](out)
