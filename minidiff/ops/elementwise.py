"""Arithmetic element by element, with NumPy's broadcasting: the gradient is summed back by `unbroadcast`."""

from __future__ import annotations

from typing import Any

from minidiff.backend import array_module
from minidiff.tensor import Tensor, as_tensor, record, unbroadcast


def _operands(name: str, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both as Tensors; a Python number takes the other's dtype. Raises ValueError if the shapes do not broadcast."""
    a = as_tensor(a, like=b if isinstance(b, Tensor) else None)
    b = as_tensor(b, like=a)
    for m, n in zip(reversed(a.shape), reversed(b.shape), strict=False):
        if m != n and 1 not in (m, n):
            raise ValueError(f"{name}: shapes {a.shape} and {b.shape} do not broadcast")
    return a, b


def add(a: Any, b: Any) -> Tensor:
    """a + b."""
    a, b = _operands("add", a, b)
    return record("add", a.data + b.data, (a, b), lambda dy: (unbroadcast(dy, a.shape), unbroadcast(dy, b.shape)))


def sub(a: Any, b: Any) -> Tensor:
    """a - b."""
    a, b = _operands("sub", a, b)
    return record("sub", a.data - b.data, (a, b), lambda dy: (unbroadcast(dy, a.shape), unbroadcast(-dy, b.shape)))


def mul(a: Any, b: Any) -> Tensor:
    """a * b."""
    a, b = _operands("mul", a, b)

    def backward(dy: Any) -> tuple[Any, Any]:
        da = unbroadcast(dy * b.data, a.shape) if a.requires_grad else None
        db = unbroadcast(dy * a.data, b.shape) if b.requires_grad else None
        return da, db

    return record("mul", a.data * b.data, (a, b), backward)


def div(a: Any, b: Any) -> Tensor:
    """a / b."""
    a, b = _operands("div", a, b)
    y = a.data / b.data

    def backward(dy: Any) -> tuple[Any, Any]:
        da = unbroadcast(dy / b.data, a.shape) if a.requires_grad else None
        db = unbroadcast(-dy * y / b.data, b.shape) if b.requires_grad else None  # d(a / b) = -(a / b) / b db
        return da, db

    return record("div", y, (a, b), backward)


def neg(a: Any) -> Tensor:
    """-a."""
    a = as_tensor(a)
    return record("neg", -a.data, (a,), lambda dy: (-dy,))


def power(a: Any, exponent: float) -> Tensor:
    """a ** exponent, for a fixed number as the exponent."""
    a = as_tensor(a)
    if exponent == 0:  # 0 * x^-1 would be NaN at 0
        return record("power", a.data**0, (a,), lambda dy: (0 * dy,))
    return record("power", a.data**exponent, (a,), lambda dy: (dy * exponent * a.data ** (exponent - 1),))


def exp(a: Any) -> Tensor:
    """e ** a."""
    a = as_tensor(a)
    y = array_module(a.data).exp(a.data)
    return record("exp", y, (a,), lambda dy: (dy * y,))


def log(a: Any) -> Tensor:
    """The natural logarithm."""
    a = as_tensor(a)
    return record("log", array_module(a.data).log(a.data), (a,), lambda dy: (dy / a.data,))


def sqrt(a: Any) -> Tensor:
    """The square root."""
    a = as_tensor(a)
    y = array_module(a.data).sqrt(a.data)
    return record("sqrt", y, (a,), lambda dy: (dy / (2 * y),))


def tanh(a: Any) -> Tensor:
    """The hyperbolic tangent."""
    a = as_tensor(a)
    y = array_module(a.data).tanh(a.data)
    return record("tanh", y, (a,), lambda dy: (dy * (1 - y * y),))
