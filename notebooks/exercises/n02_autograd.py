"""Checkers for notebook 2. Gradients are compared with central differences, as gradcheck does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from course import Verdict, close, unanswered

TOLERANCE = 1e-6  # of central differences in float64


def bell(backward: Callable[[np.ndarray, np.ndarray], Any]) -> Verdict:
    """2.1: the backward of y = exp(-x^2)."""
    x, dy = np.random.default_rng(1).standard_normal((2, 3, 4))
    got = _called(backward, dy, x)
    if verdict := _refused(got):
        return verdict
    wanted = dy * _slope(lambda x: np.exp(-x * x), x)
    y = np.exp(-x * x)
    if fault := _malformed("dx", got, x.shape):
        return fault
    if close(got, wanted, TOLERANCE):
        return Verdict(True, "The outer derivative, the inner derivative, and dy.")
    for wrong, told in {
        "The sign is wrong: right of 0 the bell falls as x grows.": -wanted,
        "A factor is missing: what is the derivative of x^2?": wanted / 2,
        "dy is missing: you give the derivative of the op alone, not of what comes after it.": (
            -2 * x * y
        ),
        "dy is missing, and the sign is wrong.": 2 * x * y,
        "The inner derivative is missing: the exponent is not x, but a function of x.": dy * y,
        "You pass dy on times -2 x. Where is the derivative of the exponential, which is itself?": (
            -2 * x * dy
        ),
        "e^(-x^2) stays in the derivative as it is; its exponent does not go down by one.": (
            dy * -(x**2) * np.exp(-x * x - 1)
        ),
    }.items():
        if close(got, told, TOLERANCE):
            return Verdict(False, wrong)
    i = np.unravel_index(np.argmax(np.abs(np.asarray(got, float) - wanted)), x.shape)
    return Verdict(
        False,
        f"At x = {x[i]:.3f} with dy = {dy[i]:.3f}, moving x a little gives {wanted[i]:.4f}, your backward "
        f"{np.asarray(got, float)[i]:.4f}. Write y = e^u with u = -x^2, and use the chain rule.",
    )


def product(backward: Callable[[np.ndarray, np.ndarray, np.ndarray], Any]) -> Verdict:
    """2.2: the backward of y = a b^T."""
    rng = np.random.default_rng(2)
    a, b, dy = (rng.standard_normal(shape) for shape in [(4, 3), (5, 3), (4, 5)])
    got = _called(backward, dy, a, b)
    if verdict := _refused(got):
        return verdict
    if not isinstance(got, tuple | list) or len(got) != 2:
        return Verdict(False, "Return the two gradients, da and db, in this order.")
    for each in got:
        if verdict := unanswered(each):
            return verdict
    wanted = {
        "da": _gradient(lambda a: a @ b.T, a, dy),
        "db": _gradient(lambda b: a @ b.T, b, dy),
    }
    for name, g in zip(wanted, got, strict=True):
        if fault := _malformed(name, g):
            return fault
    if all(close(g, w, TOLERANCE) for g, w in zip(got, wanted.values(), strict=True)):
        return Verdict(
            True,
            "And of these shapes no other product would have been possible: (M, N) (N, K) and (N, M) (M, K).",
        )
    if np.shape(got[0]) == b.shape and np.shape(got[1]) == a.shape:
        return Verdict(
            False,
            "da has the shape of b and db that of a: you return them the wrong way round.",
        )
    for (name, w), g in zip(wanted.items(), got, strict=True):
        if np.shape(g) == w.T.shape and close(np.asarray(g).T, w, TOLERANCE):
            return Verdict(
                False,
                f"{name} is transposed: a gradient has the shape of its input, here {w.shape}.",
            )
        if fault := _malformed(name, g, w.shape):
            return fault
        if close(g, w, TOLERANCE):
            continue
        if close(g, -w, TOLERANCE):
            return Verdict(False, f"{name} has the wrong sign.")
        ones = np.ones_like(dy)
        if close(g, ones @ b if name == "da" else ones.T @ a, TOLERANCE):
            return Verdict(False, f"{name} lacks dy: the outputs do not all count the same.")
        ratio = np.asarray(g, float) / w
        if np.ptp(ratio) < 1e-3:
            return Verdict(False, f"{name} is {ratio.mean():.3g} times what it should be.")
        return Verdict(
            False,
            f"{name} has the right shape, but moving the input a little gives other numbers. "
            "Which rows and columns of dy does one number of the input reach?",
        )
    raise AssertionError("one of the two gradients is wrong")


def walk(order: Sequence[Any], gradient: Any) -> Verdict:
    """2.3: the order of the visits for u = w^2, v = u w, y = v + u, and dy/dw at w = 3."""
    if not isinstance(order, list | tuple):
        return Verdict(False, "`order` must be a list of names, such as ['y', 'u'].")
    if not order or any(unanswered(name) for name in order):
        return Verdict(False, "Replace the `...` in `order` by names, and run the cell again.")
    if fault := _wrong_order([str(name) for name in order]):
        return Verdict(False, fault)
    if unanswered(gradient):
        return Verdict(
            False, "The order is right. Now replace the `...` of `gradient` by a number."
        )
    try:
        got = float(gradient)
    except (TypeError, ValueError):
        return Verdict(False, f"The gradient of w is a number, not {gradient!r}.")
    if close(got, 33.0):
        return Verdict(True, "y = w³ + w², and 3 w² + 2 w at w = 3 says the same.")
    told = {
        9.0: "That is what reaches w directly, through v = u w. The way through u is missing.",
        24.0: "That is what reaches w through u. v = u w uses w as well.",
        27.0: "u is used twice, by v and by y. You have counted only its use in v.",
        15.0: "u is used twice, by v and by y. You have counted only its use in y.",
        18.0: "That is one of three ways from y to w: through v and u. Add the others.",
        6.0: "That is one of three ways from y to w: straight to u and on. Add the others.",
        36.0: "That is the value of y at w = 3. Its gradient with respect to w is wanted.",
    }
    for value, message in told.items():
        if close(got, value):
            return Verdict(False, message)
    return Verdict(
        False,
        f"The order is right, but the gradient is not {got:g}. Go in that order, write down one number "
        "for each, and add where two arrows leave a box.",
    )


def _wrong_order(order: list[str]) -> str | None:
    names, uses = ["y", "v", "u", "w"], {"v": ["y"], "u": ["y", "v"], "w": ["v", "u"]}
    unknown = [name for name in order if name not in names]
    if unknown:
        return f"{unknown[0]!r} is none of 'y', 'v', 'u', 'w'."
    for name in names:
        if order.count(name) != 1:
            often = "not visited at all" if name not in order else "visited more than once"
            return f"{name} is {often}; each of the four must be visited exactly once."
    for name, users in uses.items():
        for user in users:
            if order.index(name) < order.index(user):
                return f"{name} is visited before {user}, which was made of it and still owes it a gradient."
    return None


def _called(backward: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """What it returns; what it raises, turned into a verdict."""
    try:
        return backward(*arrays)
    except Exception as e:
        return Verdict(
            False,
            f"Your function raises {type(e).__name__}: {e} (for shapes {', '.join(str(a.shape) for a in arrays)}).",
        )


def _refused(got: Any) -> Verdict | None:
    return got if isinstance(got, Verdict) else unanswered(got)


def _malformed(name: str, got: Any, shape: tuple[int, ...] | None = None) -> Verdict | None:
    try:
        got = np.asarray(got, np.float64)
    except (TypeError, ValueError):
        return Verdict(False, f"{name} must be an array of numbers, not {got!r}.")
    if shape is not None and got.shape != shape:
        return Verdict(
            False, f"{name} has the shape {got.shape}; it must have that of its input, {shape}."
        )
    if not np.isfinite(got).all():
        return Verdict(False, f"{name} holds NaN or infinity.")
    return None


def _slope(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    return (f(x + h) - f(x - h)) / (2 * h)


def _gradient(
    f: Callable[[np.ndarray], np.ndarray], x: np.ndarray, dy: np.ndarray, h: float = 1e-5
) -> np.ndarray:
    """d<dy, f(x)> / dx, moving one number of x at a time."""
    dx = np.empty_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        dx[i] = (dy * (f(x + step) - f(x - step))).sum() / (2 * h)
    return dx
