"""Linear layer: y = x W + b, another residual added, and an activation behind it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from minidiff.backend import Array, kernel
from minidiff.ops.geglu import geglu_backward, geglu_forward
from minidiff.ops.gelu import KINDS, gelu_backward, gelu_forward
from minidiff.ops.silu import silu_backward, silu_forward
from minidiff.tensor import Tensor, as_tensor, record, recording

ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "silu": (silu_forward.reference, silu_backward.reference),
    **{f"gelu_{k}": (partial(gelu_forward.reference, kind=k), partial(gelu_backward.reference, kind=k)) for k in KINDS},
    "geglu": (geglu_forward.reference, geglu_backward.reference),
}
"""What may stand behind a linear layer: forward (z) and backward (dy, z)."""


@kernel
def linear_forward(
    x: Array,
    w: Array,
    b: Array | None,
    residual: Array | None = None,
    activation: str | None = None,
    keep: bool = False,
) -> tuple[Array, Array | None]:
    """x (..., D_in), w (D_in, D_out), b (D_out,) or None, residual like z or None -> y = activation(z) and z.

    z = x w + b + residual (..., D_out) is returned beside y if there is an activation and the backward will want it.
    """
    z = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ w  # one large product, not a small one for each leading index
    if b is not None:
        z += b
    z = z.reshape(*x.shape[:-1], w.shape[1])
    if residual is not None:
        z += residual
    return (z, None) if activation is None else (ACTIVATIONS[activation][0](z), z if keep else None)


@kernel
def linear_backward(
    dy: Array, x: Array, w: Array, needs_dx: bool, activation: str | None = None, z: Array | None = None
) -> tuple[Array | None, Array, Array]:
    """dz = dy through the activation at z; dx = dz W^T, dW = x^T dz, db = the sum of dz over all rows."""
    M, (K, N) = math.prod(x.shape[:-1]), w.shape
    rows = (dy if activation is None else ACTIVATIONS[activation][1](dy, z)).reshape(M, N)
    dx = (rows @ w.T).reshape(x.shape) if needs_dx else None
    dw = x.reshape(M, K).T @ rows
    return dx, dw, rows.sum(axis=0)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = activation(x W + b + residual) over the last axis: x (..., D_in), weight (D_in, D_out), bias (D_out,).

    bias and residual, which is like the sum, may be None. activation: None, or one of "silu", "gelu_exact",
    "gelu_tanh", "gelu_quick", "geglu" (which halves the width); it and a residual exclude each other.
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
    if activation is not None and residual is not None:
        raise ValueError("linear: give a residual or an activation, not both")
    if activation == "geglu" and weight.shape[1] % 2:
        raise ValueError(f"linear: geglu needs an even number of outputs, got {weight.shape[1]}")
    b, r = (None if a is None else a.data for a in (bias, residual))
    inputs = tuple(t for t in (x, weight, bias, residual) if t is not None)
    y, z = linear_forward(x.data, weight.data, b, r, activation, recording(inputs))

    def backward(dy: Array) -> list[Array | None]:
        dx, dw, db = linear_backward(dy, x.data, weight.data, x.requires_grad, activation, z)
        return [dx, dw] + [db] * (bias is not None) + [dy] * (residual is not None)

    return record("linear", y, inputs, backward)
