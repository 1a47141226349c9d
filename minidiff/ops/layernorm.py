"""LayerNorm: every token is brought to mean 0 and variance 1 over its channels, then scaled and shifted.

    xhat = (x - mean) * rstd,   rstd = 1 / sqrt(var + eps),   y = gamma * xhat + beta

Ba et al. 2016, arXiv 1607.06450.
"""

from __future__ import annotations

from minidiff.backend import Array, array_module, kernel
from minidiff.tensor import Tensor, as_tensor, record


def wide(x: Array) -> Array:
    """x in at least single precision: statistics of half-precision numbers are taken in float32."""
    return x.astype("float32") if x.dtype.itemsize < 4 else x


@kernel
def layer_norm_forward(x: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array, Array]:
    """x (..., D), gamma and beta (D,) -> y (..., D), and for the backward mean and rstd (..., 1)."""
    x_ = wide(x)
    mean = x_.mean(axis=-1, keepdims=True)
    centred = x_ - mean
    var = (centred * centred).mean(axis=-1, keepdims=True)
    rstd = 1 / array_module(x).sqrt(var + eps)
    y = centred * rstd * gamma + beta
    return y.astype(x.dtype, copy=False), mean, rstd


@kernel
def layer_norm_backward(dy: Array, x: Array, gamma: Array, mean: Array, rstd: Array) -> tuple[Array, Array, Array]:
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = gamma * dy; dgamma = sum(dy * xhat), dbeta = sum(dy)."""
    dy_ = wide(dy)
    xhat = (wide(x) - mean) * rstd
    g = dy_ * gamma
    dx = g - g.mean(axis=-1, keepdims=True) - xhat * (g * xhat).mean(axis=-1, keepdims=True)
    dx *= rstd
    leading = tuple(range(x.ndim - 1))
    dgamma = (dy_ * xhat).sum(axis=leading).astype(gamma.dtype, copy=False)
    dbeta = dy_.sum(axis=leading).astype(gamma.dtype, copy=False)
    return dx.astype(x.dtype, copy=False), dgamma, dbeta


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise x (..., D) over its last axis; gamma and beta (D,)."""
    x, gamma, beta = as_tensor(x), as_tensor(gamma), as_tensor(beta)
    if gamma.shape != x.shape[-1:] or beta.shape != x.shape[-1:]:
        raise ValueError(f"layer_norm: gamma {gamma.shape} and beta {beta.shape} do not fit x {x.shape}")
    y, mean, rstd = layer_norm_forward(x.data, gamma.data, beta.data, eps)
    return record("layer_norm", y, (x, gamma, beta), lambda dy: layer_norm_backward(dy, x.data, gamma.data, mean, rstd))
