"""Is a gradient right? Compare it with what the function really does when its input moves a little.

The Jacobian J is never written down. `backward` answers questions of the form dx = J^T dy; moving the input
by a small step h along v shows J v. Both must agree on the number <dy, J v> = <J^T dy, v>, for any dy and v:

    <dy, (f(x + h v) - f(x - h v)) / 2h>  =  <dx, v>  + O(h^2)

A random dy and a random v reach every entry of J at once. (All ones as dy would be blind: the outputs of a
softmax add up to one, so the gradient of their sum is zero.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minidiff.backend import Array, array_module
from minidiff.tensor import Tensor, as_array, no_grad


def gradcheck(
    fn: Callable[..., Tensor], *inputs: Any, seed: int = 0, step: float = 1e-5, tolerance: float = 1e-6
) -> float:
    """Check the backward of `fn(*inputs)` for each input alone and for all of them together.

    fn:        Tensors -> a Tensor of any shape; it must give the same values every time.
    inputs:    arrays, Tensors or numbers, taken in float64: single precision drowns the difference.
    step:      h, for inputs whose elements are of size 1 or so.
    tolerance: the largest error, relative to the size of the gradient.

    Returns the largest error found. Raises TypeError for float32 or float16, AssertionError for a value or
    gradient that is not finite, and a gradient that is missing, of another shape or dtype, or wrong.
    """
    xs = [_float64(i, x) for i, x in enumerate(inputs)]
    xp = array_module(*xs)
    rng = np.random.default_rng([seed, 1])  # not the plain seed: x may come from that, and dy must not be x

    leaves = [Tensor(x, requires_grad=True) for x in xs]
    y = fn(*leaves)
    op = y.node.name if y.node else getattr(fn, "__name__", "the function")
    if y.dtype != np.float64:
        raise TypeError(f"gradcheck: {op} made {y.dtype} out of float64")
    assert xp.isfinite(y.data).all(), f"{op}: the result is not finite"
    dy = xp.asarray(rng.standard_normal(y.shape))
    y.backward(dy)
    dxs = [_gradient(f"{op}, input {i}", leaf) for i, leaf in enumerate(leaves)]
    directions = [xp.asarray(rng.standard_normal(x.shape)) for x in xs]

    def f(h: float, moved: list[int]) -> Array:
        shifted = [x + h * directions[i] if i in moved else x for i, x in enumerate(xs)]
        with no_grad():
            return fn(*map(Tensor, shifted)).data

    rounding = np.finfo(np.float64).eps * float(abs(dy * y.data).sum()) / step
    worst = 0.0
    everything = list(range(len(xs)))
    for moved in [[i] for i in everything] + [everything]:
        numeric = float((dy * (f(step, moved) - f(-step, moved))).sum()) / (2 * step)
        analytic = sum(float((dxs[i] * directions[i]).sum()) for i in moved)
        # The norm of dx is the typical size of <dx, v>, which may be much smaller by chance.
        norm = sum(float((dxs[i] ** 2).sum()) for i in moved) ** 0.5
        size = max(abs(numeric), norm) + rounding / tolerance
        error = abs(numeric - analytic) / size if size else 0.0
        if not error <= tolerance:  # and not `error > tolerance`, which lets NaN through
            i = moved[0]
            which = f"input {i} of shape {xs[i].shape}" if len(moved) == 1 else "all inputs together"
            raise AssertionError(
                f"{op}: wrong gradient for {which}: moving it gives {numeric:.10g}, "
                f"backward {analytic:.10g} (error {error:.1e}, allowed {tolerance:.0e})"
            )
        worst = max(worst, error)
    return worst


def _float64(i: int, x: Any) -> Array:
    x = as_array(x)
    if getattr(x, "dtype", None) in (np.float32, np.float16):
        raise TypeError(f"gradcheck: input {i} is {x.dtype}; finite differences need float64")
    return array_module(x).asarray(x, dtype=np.float64)


def _gradient(name: str, leaf: Tensor) -> Array:
    dx = leaf.grad
    assert dx is not None, f"{name}: no gradient arrived"
    assert dx.shape == leaf.shape, f"{name}: gradient of shape {dx.shape} for shape {leaf.shape}"
    assert dx.dtype == leaf.dtype, f"{name}: gradient in {dx.dtype} for {leaf.dtype}"
    assert array_module(dx).isfinite(dx).all(), f"{name}: the gradient is not finite"
    return dx
