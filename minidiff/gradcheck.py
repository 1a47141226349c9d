"""Is a gradient right? Compare it with what the function really does when its input moves a little.

A Jacobian J is never written down. `backward` answers questions of the form dx = J^T dy; moving the input by a
small h along v shows J v. Both must agree on the number <dy, J v> = <J^T dy, v>, for any dy and any v:

    <dy, (f(x + h v) - f(x - h v)) / 2h>  =  <dx, v>  + O(h^2)

A random dy and a random v reach every entry of J at once. (All ones as dy would be blind: the outputs of a softmax
add up to one, so the gradient of their sum is zero.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minidiff.backend import Array, array_module
from minidiff.tensor import Tensor, as_array, no_grad


def gradcheck(
    fn: Callable[..., Tensor], *inputs: Any, seed: int = 0, step: float = 1e-4, tolerance: float = 1e-6
) -> float:
    """Check the backward of `fn(*inputs)` for each input alone and for all of them together.

    fn:        Tensors -> a Tensor of any shape; it must give the same values every time.
    inputs:    arrays, Tensors or numbers, taken in float64: single precision drowns a difference of size h.
    step:      h, for inputs whose elements are of size 1 or so.
    tolerance: the largest error, relative to the larger of the two numbers.

    Returns the largest error found. Raises TypeError for float32 or float16, AssertionError for a value or gradient
    that is not finite, a gradient that is missing or of another shape or dtype, and one that is wrong.
    """
    xs = [_float64(i, x) for i, x in enumerate(inputs)]
    xp = array_module(*xs)
    rng = np.random.default_rng(seed)

    leaves = [Tensor(x, requires_grad=True) for x in xs]
    y = fn(*leaves)
    name = y.node.name if y.node else getattr(fn, "__name__", "the function")
    if y.dtype != np.float64:
        raise TypeError(f"gradcheck: {name} made {y.dtype} out of float64")
    assert xp.isfinite(y.data).all(), f"{name}: the result is not finite"
    dy = xp.asarray(rng.standard_normal(y.shape))
    y.backward(dy)
    for i, leaf in enumerate(leaves):
        _check_form(f"{name}, input {i}", leaf)

    def difference(vs: list[Array]) -> float:
        with no_grad():
            ahead = fn(*(Tensor(x + step * v) for x, v in zip(xs, vs, strict=True))).data
            behind = fn(*(Tensor(x - step * v) for x, v in zip(xs, vs, strict=True))).data
        return float((dy * (ahead - behind)).sum()) / (2 * step)

    # Differences this small are rounding. A derivative of zero is compared with it; any other is far above it.
    rounding = step * float(abs(dy * y.data).sum()) + np.finfo(np.float64).tiny
    worst = 0.0
    directions = [xp.asarray(rng.standard_normal(x.shape)) for x in xs]
    for moved in [[i] for i in range(len(xs))] + [list(range(len(xs)))]:
        vs = [v if i in moved else xp.zeros_like(v) for i, v in enumerate(directions)]
        numeric = difference(vs)
        analytic = sum(float((leaf.grad * v).sum()) for leaf, v in zip(leaves, vs, strict=True))
        error = abs(numeric - analytic) / max(abs(numeric), abs(analytic), rounding)
        which = f"input {moved[0]} of shape {xs[moved[0]].shape}" if len(moved) == 1 else "all inputs together"
        if not error <= tolerance:  # and not `error > tolerance`, which NaN would pass
            raise AssertionError(
                f"{name}: wrong gradient for {which}: moving it gives {numeric:.10g}, "
                f"backward {analytic:.10g} (error {error:.1e}, allowed {tolerance:.0e})"
            )
        worst = max(worst, error)
    return worst


def _float64(i: int, x: Any) -> Array:
    x = as_array(x)
    if getattr(x, "dtype", None) in (np.float32, np.float16):
        raise TypeError(f"gradcheck: input {i} is {x.dtype}; finite differences need float64")
    return array_module(x).asarray(x, dtype=np.float64)


def _check_form(name: str, leaf: Tensor) -> None:
    dx = leaf.grad
    assert dx is not None, f"{name}: no gradient arrived"
    assert dx.shape == leaf.shape, f"{name}: gradient of shape {dx.shape} for shape {leaf.shape}"
    assert dx.dtype == leaf.dtype, f"{name}: gradient in {dx.dtype} for {leaf.dtype}"
    assert array_module(dx).isfinite(dx).all(), f"{name}: the gradient is not finite"
