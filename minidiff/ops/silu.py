"""SiLU, also called swish: y = x * sigmoid(x)."""

from __future__ import annotations

import numpy as np

from minidiff.backend import Array, array_module, kernel
from minidiff.tensor import Tensor, as_tensor, record


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x). Where e^-x overflows the quotient is the right limit, 0."""
    with np.errstate(over="ignore"):
        return 1 / (1 + array_module(x).exp(-x))


@kernel
def silu_forward(x: Array) -> Array:
    """y = x * sigmoid(x), any shape."""
    return x * sigmoid(x)


@kernel
def silu_backward(dy: Array, x: Array) -> Array:
    """dy/dx = s + x * s * (1 - s) = s * (1 + x * (1 - s)), with s = sigmoid(x)."""
    s = sigmoid(x)
    return dy * s * (1 + x * (1 - s))


def silu(x: Tensor) -> Tensor:
    """y = x * sigmoid(x), any shape. Elfwing et al. 2017, arXiv 1702.03118."""
    x = as_tensor(x)
    return record("silu", silu_forward(x.data), (x,), lambda dy: (silu_backward(dy, x.data),))
