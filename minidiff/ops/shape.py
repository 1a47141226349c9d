"""Rearrangements: nothing is computed, so the gradient takes the same way back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from minidiff.backend import Array, array_module
from minidiff.tensor import Tensor, as_tensor, record


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The same elements in the same order, in another shape (one of its entries may be -1)."""
    x = as_tensor(x)
    try:
        y = x.data.reshape(tuple(shape))
    except ValueError:
        raise ValueError(f"reshape: {x.size} elements of shape {x.shape} do not fit {tuple(shape)}") from None
    return record("reshape", y, (x,), lambda dy: (dy.reshape(x.shape),))


def transpose(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The axes in another order: axis i of the result is axis axes[i] of x."""
    x = as_tensor(x)
    if sorted(axes) != list(range(x.ndim)):
        raise ValueError(f"transpose: {tuple(axes)} is not an order of the axes of shape {x.shape}")
    inverse = sorted(range(x.ndim), key=lambda i: axes[i])
    return record("transpose", x.data.transpose(axes), (x,), lambda dy: (dy.transpose(inverse),))


def concat(xs: Sequence[Tensor], axis: int = -1) -> Tensor:
    """Tensors side by side along one axis; all other axes must agree."""
    xs = [as_tensor(x) for x in xs]
    shapes = [x.shape for x in xs]
    if not -len(shapes[0]) <= axis < len(shapes[0]):
        raise ValueError(f"concat: axis {axis} is not one of shape {shapes[0]}")
    axis %= len(shapes[0])
    if len({(*s[:axis], *s[axis + 1 :]) for s in shapes}) != 1 or len({len(s) for s in shapes}) != 1:
        raise ValueError(f"concat: shapes {shapes} differ in more than axis {axis}")
    xp = array_module(xs[0].data)

    def backward(dy: Array) -> list[Array]:
        ends = list(accumulate((shape[axis] for shape in shapes), initial=0))
        before = (slice(None),) * axis
        return [dy[before + (slice(a, b),)] for a, b in pairwise(ends)]

    return record("concat", xp.concatenate([x.data for x in xs], axis=axis), tuple(xs), backward)


def pad(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros around x: (before, after) for each axis."""
    x = as_tensor(x)
    if len(widths) != x.ndim or any(w < 0 for pair in widths for w in pair):
        raise ValueError(f"pad: widths {tuple(widths)} do not suit shape {x.shape}")
    inside = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
    return record("pad", array_module(x.data).pad(x.data, widths), (x,), lambda dy: (dy[inside],))


def index(x: Tensor, key: Any) -> Tensor:
    """x[key], for any NumPy index; an element that is read twice gets both gradients."""
    x = as_tensor(x)
    xp = array_module(x.data)
    keys = key if isinstance(key, tuple) else (key,)
    reads_once = all(isinstance(k, int | slice) or k is None or k is Ellipsis for k in keys)

    def backward(dy: Array) -> tuple[Array]:
        dx = xp.zeros_like(x.data)
        if reads_once:
            dx[key] = dy
        else:
            xp.add.at(dx, key, dy)
        return (dx,)

    return record("index", xp.asarray(x.data[key]), (x,), backward)
