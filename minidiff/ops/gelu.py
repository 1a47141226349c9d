"""GELU: y = x * Phi(x), with Phi the standard normal distribution function, and its two approximations.

    exact  Phi(x) = (1 + erf(x / sqrt(2))) / 2
    tanh   Phi(x) ~ (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2
    quick  Phi(x) ~ sigmoid(1.702 x)                                  (CLIP)

Hendrycks and Gimpel 2016, arXiv 1606.08415.
"""

from __future__ import annotations

import math

import numpy as np

from minidiff.backend import Array, array_module, kernel
from minidiff.ops.silu import sigmoid
from minidiff.tensor import Tensor, as_tensor, record

KINDS = ("exact", "tanh", "quick")
_TANH_SCALE, _TANH_CUBE, _QUICK = math.sqrt(2 / math.pi), 0.044715, 1.702


def erf(x: Array) -> Array:
    """The error function, elementwise; NumPy has none.

    In float64 to full precision: below |x| = 2 by the series 2/sqrt(pi) e^(-x^2) sum_n 2^n x^(2n+1) / (2n+1)!!, beyond
    by the continued fraction of 1 - erf. Otherwise within 5e-7 (1.5e-7 and float32's rounding) by a rational function.
    Abramowitz and Stegun 1964, 7.1.6, 7.1.14 and 7.1.26.
    """
    xp = array_module(x)
    a = xp.minimum(xp.abs(x), 6)  # 1 - erf(6) is 2e-17
    gauss = xp.exp(-a * a)
    if x.dtype == np.float64:
        return xp.sign(x) * xp.where(a < 2, _erf_series(a, gauss), 1 - _erfc_fraction(xp.maximum(a, 2), gauss))
    t = 1 / (1 + 0.3275911 * a)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return xp.copysign(1 - p * gauss, x)


def _erf_series(a: Array, gauss: Array) -> Array:
    term = total = a
    for n in range(1, 40):
        term = term * (2 * a * a / (2 * n + 1))
        total = total + term
    return 2 / math.sqrt(math.pi) * gauss * total


def _erfc_fraction(a: Array, gauss: Array) -> Array:
    fraction = a
    for n in range(60, 0, -1):
        fraction = a + n / 2 / fraction
    return gauss / (math.sqrt(math.pi) * fraction)


def normal_cdf(x: Array, kind: str) -> tuple[Array, Array]:
    """Phi(x) and its derivative, exact or in one of the approximations."""
    xp = array_module(x)
    if kind == "exact":
        return 0.5 + 0.5 * erf(x * math.sqrt(0.5)), xp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    if kind == "tanh":
        th = xp.tanh(_TANH_SCALE * (x + _TANH_CUBE * x * x * x))
        return 0.5 + 0.5 * th, 0.5 * (1 - th * th) * (_TANH_SCALE * (1 + 3 * _TANH_CUBE * x * x))
    s = sigmoid(_QUICK * x)
    return s, _QUICK * s * (1 - s)


@kernel
def gelu_forward(x: Array, kind: str) -> Array:
    """y = x * Phi(x), any shape."""
    return x * normal_cdf(x, kind)[0]


@kernel
def gelu_backward(dy: Array, x: Array, kind: str) -> Array:
    """dx = dy * (Phi(x) + x * Phi'(x))."""
    phi, dphi = normal_cdf(x, kind)
    return dy * (phi + x * dphi)


def gelu(x: Tensor, kind: str = "exact") -> Tensor:
    """y = x * Phi(x), any shape; kind is "exact", "tanh" or "quick"."""
    x = as_tensor(x)
    if kind not in KINDS:
        raise ValueError(f"gelu: kind {kind!r} is not one of {KINDS}")
    return record("gelu", gelu_forward(x.data, kind), (x,), lambda dy: (gelu_backward(dy, x.data, kind),))
