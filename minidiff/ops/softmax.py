"""Softmax over the last axis: p_i = e^(x_i) / sum_j e^(x_j)."""

from __future__ import annotations

from minidiff.backend import Array, array_module, kernel
from minidiff.tensor import Tensor, as_tensor, record


@kernel
def softmax_forward(x: Array) -> Array:
    """x (..., D) -> p (..., D). The maximum is taken off first, so that no exponential overflows."""
    e = array_module(x).exp(x - x.max(axis=-1, keepdims=True))
    e /= e.sum(axis=-1, keepdims=True)
    return e


@kernel
def softmax_backward(dp: Array, p: Array) -> Array:
    """dx = p * (dp - sum_j p_j dp_j)."""
    return p * (dp - (p * dp).sum(axis=-1, keepdims=True))


def softmax(x: Tensor) -> Tensor:
    """Softmax of x (..., D) over its last axis."""
    x = as_tensor(x)
    p = softmax_forward(x.data)
    return record("softmax", p, (x,), lambda dp: (softmax_backward(dp, p),))
