"""GroupNorm, alone or followed by SiLU: each image's channels are normalised in groups, over all positions.

    xhat = (x - mean) * rstd   per image and group,   z = gain * xhat + offset per channel,   y = z or silu(z)

gain = gamma and offset = beta; or, where a timestep scales and shifts the normalised features, gain = gamma (1 + scale)
and offset = beta (1 + scale) + shift, one for each image.

Wu and He 2018, arXiv 1803.08494; the scale and shift: Dhariwal and Nichol 2021, arXiv 2105.05233.
"""

from __future__ import annotations

import math

from minidiff.backend import Array, array_module, kernel
from minidiff.ops.layernorm import wide
from minidiff.ops.silu import silu_backward, silu_forward
from minidiff.tensor import Tensor, as_tensor, record, unbroadcast


def _group_mean(sums: Array, groups: int, positions: int) -> Array:
    """Sums over the positions (B, 1, C) -> means over positions and each group's channels, repeated to (B, 1, C)."""
    B, _, C = sums.shape
    means = sums.reshape(B, groups, C // groups).sum(axis=2) / (positions * (C // groups))
    return means.repeat(C // groups, axis=1).reshape(B, 1, C).astype(sums.dtype, copy=False)


def _beside(x: Array, x2: Array | None) -> Array:
    return x if x2 is None else array_module(x).concatenate([x, x2], axis=2)


@kernel
def group_norm_forward(
    x: Array, gain: Array, offset: Array, groups: int, eps: float, silu: bool, x2: Array | None = None
) -> tuple[Array, Array, Array]:
    """x (B, N, C), gain and offset (B or 1, C) -> y (B, N, C), and for the backward mean and rstd (B, C).

    x2: more channels beside x's, which count among the C.
    """
    x = _beside(x, x2)
    x_, N = wide(x), x.shape[1]
    mean = _group_mean(x_.sum(axis=1, keepdims=True), groups, N)
    centred = x_ - mean
    var = _group_mean((centred * centred).sum(axis=1, keepdims=True), groups, N)
    rstd = 1 / array_module(x).sqrt(var + eps)
    z = centred * (rstd * gain[:, None]) + offset[:, None]
    y = silu_forward.reference(z) if silu else z
    return y.astype(x.dtype, copy=False), mean[:, 0], rstd[:, 0]


@kernel
def group_norm_backward(
    dy: Array, x: Array, gain: Array, offset: Array, mean: Array, rstd: Array, groups: int, silu: bool,
    x2: Array | None = None,
) -> tuple[Array, Array | None, Array, Array]:  # fmt: skip
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = gain * dz, the means over each image's group.

    dgain = sum(dz * xhat) and doffset = sum(dz) over positions, (B, C); dz = dy, or dy through the SiLU.
    """
    C1, x = x.shape[2], _beside(x, x2)
    N, rstd = x.shape[1], rstd[:, None]
    xhat = (wide(x) - mean[:, None]) * rstd
    gain = gain[:, None]
    dz = silu_backward.reference(wide(dy), xhat * gain + offset[:, None]) if silu else wide(dy)
    doffset = dz.sum(axis=1, keepdims=True)
    dgain = (dz * xhat).sum(axis=1, keepdims=True)
    dx = dz * gain - _group_mean(doffset * gain, groups, N) - xhat * _group_mean(dgain * gain, groups, N)
    dx *= rstd
    dx = dx.astype(x.dtype, copy=False)
    return dx[..., :C1], None if x2 is None else dx[..., C1:], dgain[:, 0], doffset[:, 0]


def group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """Normalise x (B, ..., C) in groups of channels over all positions; gamma and beta (C,); then SiLU if asked.

    scale and shift: both (B, C), or (1, C) for all, or both None; between the two, z <- z (1 + scale) + shift.
    beside: a second input (B, ..., C_2), whose channels count among the C: the same as group_norm(concat(...)).
    """
    x, gamma, beta = as_tensor(x), as_tensor(gamma), as_tensor(beta)
    C = x.shape[-1]
    if beside is not None:
        beside = as_tensor(beside)
        if beside.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"group_norm: {beside.shape} does not lie beside x {x.shape}")
        C += beside.shape[-1]
    if x.ndim < 2 or C % groups:
        raise ValueError(f"group_norm: the {C} channels of x {x.shape} do not split into {groups} groups")
    if gamma.shape != (C,) or beta.shape != (C,):
        raise ValueError(f"group_norm: gamma {gamma.shape} and beta {beta.shape} do not fit x {x.shape}")
    if (scale is None) != (shift is None):
        raise ValueError("group_norm: give both scale and shift, or neither")
    inputs = [x, gamma, beta]
    gain, offset = wide(gamma.data)[None], wide(beta.data)[None]
    if scale is not None and shift is not None:
        scale, shift = as_tensor(scale), as_tensor(shift)
        if scale.shape != shift.shape or scale.shape not in ((x.shape[0], C), (1, C)):
            raise ValueError(
                f"group_norm: scale {scale.shape} and shift {shift.shape} must be {(x.shape[0], C)}, or {(1, C)}"
            )
        inputs += [scale, shift]
        one = 1 + wide(scale.data)
        gain, offset = gain * one, offset * one + wide(shift.data)
    B, N = x.shape[0], math.prod(x.shape[1:-1])
    flat = x.data.reshape(B, N, x.shape[-1])
    flat2 = None if beside is None else beside.data.reshape(B, N, beside.shape[-1])
    y, mean, rstd = group_norm_forward(flat, gain, offset, groups, eps, silu, flat2)

    def backward(dy: Array) -> list[Array]:
        dy = dy.reshape(B, N, C)
        dx, dx2, dgain, doffset = group_norm_backward(dy, flat, gain, offset, mean, rstd, groups, silu, flat2)
        grads = [dx.reshape(x.shape)]
        if scale is None:
            grads += [dgain.sum(axis=0), doffset.sum(axis=0)]
        else:
            grads += [(dgain * one).sum(axis=0), (doffset * one).sum(axis=0)]
            dscale = dgain * wide(gamma.data) + doffset * wide(beta.data)
            grads += [unbroadcast(dscale, scale.shape), unbroadcast(doffset, scale.shape)]
        if beside is not None and dx2 is not None:
            grads.append(dx2.reshape(beside.shape))
        return [g.astype(t.dtype, copy=False) for g, t in zip(grads, inputs, strict=True)]

    if beside is not None:
        inputs.append(beside)
    return record("group_norm_silu" if silu else "group_norm", y.reshape(*x.shape[:-1], C), tuple(inputs), backward)
