"""Nearest-neighbour upsampling: every pixel becomes a square of the same value."""

from __future__ import annotations

from minidiff.backend import Array, array_module, kernel
from minidiff.tensor import Tensor, as_tensor, record


@kernel
def upsample_nearest_forward(x: Array, factor: int) -> Array:
    """x (B, H, W, C) -> y (B, factor H, factor W, C), y[i, j] = x[i // factor, j // factor]."""
    B, H, W, C = x.shape
    y = array_module(x).broadcast_to(x[:, :, None, :, None, :], (B, H, factor, W, factor, C))
    return y.reshape(B, H * factor, W * factor, C)


@kernel
def upsample_nearest_backward(dy: Array, factor: int) -> Array:
    """dx is the sum of dy over the square that each pixel became."""
    B, H, W, C = dy.shape
    return dy.reshape(B, H // factor, factor, W // factor, factor, C).sum(axis=(2, 4))


def upsample_nearest(x: Tensor, factor: int = 2) -> Tensor:
    """x (B, H, W, C) -> (B, factor H, factor W, C)."""
    x = as_tensor(x)
    if x.ndim != 4:
        raise ValueError(f"upsample_nearest: wanted x (B, H, W, C), got {x.shape}")
    y = upsample_nearest_forward(x.data, factor)
    return record("upsample_nearest", y, (x,), lambda dy: (upsample_nearest_backward(dy, factor),))
