"""Sums, means and maxima over axes: the gradient is spread back over the axes that were reduced."""

from __future__ import annotations

import math

from minidiff.backend import Array, array_module
from minidiff.tensor import Tensor, as_tensor, record

Axes = int | tuple[int, ...] | None


def _axes(name: str, shape: tuple[int, ...], axis: Axes) -> tuple[int, ...]:
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    if any(not -len(shape) <= i < len(shape) for i in axes):
        raise ValueError(f"{name}: axis {axis} is not one of shape {shape}")
    return tuple(i % len(shape) for i in axes)


def _spread(a: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """A reduced array, read as if it still had the full shape."""
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    return array_module(a).broadcast_to(a.reshape(kept), shape)


def sum(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The sum over the axes (all of them for None)."""
    x = as_tensor(x)
    axes = _axes("sum", x.shape, axis)
    y = array_module(x.data).asarray(x.data.sum(axis=axes, keepdims=keepdims))
    return record("sum", y, (x,), lambda dy: (_spread(dy, x.shape, axes),))


def mean(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The mean over the axes (all of them for None)."""
    x = as_tensor(x)
    axes = _axes("mean", x.shape, axis)
    n = math.prod(x.shape[i] for i in axes)
    y = array_module(x.data).asarray(x.data.mean(axis=axes, keepdims=keepdims))
    return record("mean", y, (x,), lambda dy: (_spread(dy / n, x.shape, axes),))


def max(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The maximum over the axes; where several elements attain it, they share its gradient equally."""
    x = as_tensor(x)
    axes = _axes("max", x.shape, axis)
    y = array_module(x.data).asarray(x.data.max(axis=axes, keepdims=keepdims))

    def backward(dy: Array) -> tuple[Array]:
        attains = x.data == _spread(y, x.shape, axes)
        return (attains * _spread(dy, x.shape, axes) / attains.sum(axis=axes, keepdims=True).astype(dy.dtype),)

    return record("max", y, (x,), backward)
