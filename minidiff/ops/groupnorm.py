"""GroupNorm, alone or followed by SiLU: each image's channels are normalised in groups, over all positions.

    xhat = (x - mean) * rstd   per image and group,   z = gamma * xhat + beta per channel,   y = z or silu(z)

Wu and He 2018, arXiv 1803.08494.
"""

from __future__ import annotations

import math

from minidiff.backend import Array, array_module, kernel
from minidiff.ops.layernorm import wide
from minidiff.ops.silu import silu_backward, silu_forward
from minidiff.tensor import Tensor, as_tensor, record


def _group_mean(sums: Array, groups: int, positions: int) -> Array:
    """Sums over the positions (B, 1, C) -> means over positions and each group's channels, repeated to (B, 1, C)."""
    B, _, C = sums.shape
    means = sums.reshape(B, groups, C // groups).sum(axis=2) / (positions * (C // groups))
    return means.repeat(C // groups, axis=1).reshape(B, 1, C).astype(sums.dtype, copy=False)


@kernel
def group_norm_forward(
    x: Array, gamma: Array, beta: Array, groups: int, eps: float, silu: bool
) -> tuple[Array, Array, Array]:
    """x (B, N, C), gamma and beta (C,) -> y (B, N, C), and for the backward mean and rstd (B, 1, C)."""
    x_, N = wide(x), x.shape[1]
    mean = _group_mean(x_.sum(axis=1, keepdims=True), groups, N)
    centred = x_ - mean
    var = _group_mean((centred * centred).sum(axis=1, keepdims=True), groups, N)
    rstd = 1 / array_module(x).sqrt(var + eps)
    z = centred * (rstd * gamma) + beta
    y = silu_forward(z) if silu else z
    return y.astype(x.dtype, copy=False), mean, rstd


@kernel
def group_norm_backward(
    dy: Array, x: Array, gamma: Array, beta: Array, mean: Array, rstd: Array, groups: int, silu: bool
) -> tuple[Array, Array, Array]:
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = gamma * dz, the means over each image's group.

    dgamma = sum(dz * xhat) and dbeta = sum(dz), over images and positions; dz = dy, or dy through the SiLU.
    """
    N = x.shape[1]
    xhat = (wide(x) - mean) * rstd
    dz = silu_backward(wide(dy), xhat * gamma + beta) if silu else wide(dy)
    sum_dz = dz.sum(axis=1, keepdims=True)
    sum_dz_xhat = (dz * xhat).sum(axis=1, keepdims=True)
    dx = dz * gamma - _group_mean(sum_dz * gamma, groups, N) - xhat * _group_mean(sum_dz_xhat * gamma, groups, N)
    dx *= rstd
    dgamma = sum_dz_xhat.sum(axis=(0, 1)).astype(gamma.dtype, copy=False)
    dbeta = sum_dz.sum(axis=(0, 1)).astype(gamma.dtype, copy=False)
    return dx.astype(x.dtype, copy=False), dgamma, dbeta


def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float = 1e-5, silu: bool = False) -> Tensor:
    """Normalise x (B, ..., C) in groups of channels over all positions; gamma and beta (C,); then SiLU if asked."""
    x, gamma, beta = as_tensor(x), as_tensor(gamma), as_tensor(beta)
    C = x.shape[-1]
    if x.ndim < 2 or C % groups:
        raise ValueError(f"group_norm: the {C} channels of x {x.shape} do not split into {groups} groups")
    if gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(f"group_norm: gamma {gamma.shape} and beta {beta.shape} do not fit x {x.shape}")
    flat = x.data.reshape(x.shape[0], math.prod(x.shape[1:-1]), C)
    y, mean, rstd = group_norm_forward(flat, gamma.data, beta.data, groups, eps, silu)

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        dx, dgamma, dbeta = group_norm_backward(
            dy.reshape(flat.shape), flat, gamma.data, beta.data, mean, rstd, groups, silu
        )
        return dx.reshape(x.shape), dgamma, dbeta

    return record("group_norm_silu" if silu else "group_norm", y.reshape(x.shape), (x, gamma, beta), backward)
