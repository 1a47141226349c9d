"""Mean squared error: y = mean of (a - b)^2 over all elements."""

from __future__ import annotations

from typing import Any

from minidiff.backend import Array, array_module, kernel
from minidiff.tensor import Tensor, as_tensor, record


@kernel
def mse_forward(a: Array, b: Array) -> Array:
    """The mean over all elements of (a - b)^2, a scalar of the same dtype."""
    d = a - b
    xp = array_module(d)
    return xp.asarray(xp.mean(d * d, dtype=xp.promote_types(d.dtype, xp.float32)), dtype=d.dtype)


@kernel
def mse_backward(dy: Array, a: Array, b: Array) -> Array:
    """da = 2 (a - b) / n * dy; db is its negative."""
    return (a - b) * (dy * (2 / a.size))


def mse(a: Any, b: Any) -> Tensor:
    """The mean over all elements of (a - b)^2, two Tensors or arrays of the same shape."""
    a, b = as_tensor(a), as_tensor(b)
    if a.shape != b.shape:
        raise ValueError(f"mse: shapes {a.shape} and {b.shape} differ")

    def backward(dy: Array) -> tuple[Array, Array | None]:
        da = mse_backward(dy, a.data, b.data)
        return da, -da if b.requires_grad else None

    return record("mse", mse_forward(a.data, b.data), (a, b), backward)
