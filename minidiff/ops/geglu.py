"""GEGLU: half of the channels, gated by the GELU of the other half: y = a * gelu(g), x = [a, g].

Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

from minidiff.backend import Array, array_module, kernel
from minidiff.ops.gelu import gelu_forward, normal_cdf
from minidiff.tensor import Tensor, as_tensor, record


@kernel
def geglu_forward(x: Array) -> Array:
    """x (..., 2 D) -> y (..., D): the first half times the (exact) GELU of the second."""
    D = x.shape[-1] // 2
    return x[..., :D] * gelu_forward(x[..., D:], "exact")


@kernel
def geglu_backward(dy: Array, x: Array) -> Array:
    """da = dy * g Phi(g), dg = dy * a * (Phi(g) + g Phi'(g))."""
    D = x.shape[-1] // 2
    a, g = x[..., :D], x[..., D:]
    phi, dphi = normal_cdf(g, "exact")
    return array_module(x).concatenate([dy * g * phi, dy * a * (phi + g * dphi)], axis=-1)


def geglu(x: Tensor) -> Tensor:
    """x (..., 2 D) -> y (..., D): the first half times the (exact) GELU of the second."""
    x = as_tensor(x)
    if x.shape[-1] % 2:
        raise ValueError(f"geglu: the last axis of {x.shape} does not split into two halves")
    return record("geglu", geglu_forward(x.data), (x,), lambda dy: (geglu_backward(dy, x.data),))
