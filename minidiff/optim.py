"""AdamW, Muon, the moving average of the parameters, gradient clipping, and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minidiff.backend import Array, array_module, kernel
from minidiff.nn import Parameter
from minidiff.threads import num_workers, parallel_map


def clip_factor(norm: Array | float, limit: float) -> Array:
    """What gradients are multiplied by so that their common norm is at most `limit`; NaN where it is not finite."""
    xp = array_module(norm)
    return xp.where(xp.isfinite(norm), xp.minimum(1.0, limit / xp.maximum(norm, 1e-30)), xp.nan)


@kernel
def gradient_norm(grads: Sequence[Array]) -> Array:
    """The Euclidean norm of all gradients together, one number; the squares are summed in float64."""
    return array_module(*grads).sqrt(sum((g * g).sum(dtype=np.float64) for g in grads))


def step_numbers(
    g_factor: float, lr: float, beta1: float, beta2: float, eps: float, step: int, ema_decay: float
) -> np.ndarray:
    """What differs from one step of an optimizer to the next, as an array (8,); step = 1, 2, ...

    g_factor, lr, beta1, beta2, eps, 1 / (1 - beta1^step), 1 / (1 - beta2^step), 1 - ema_decay. An array, because a GPU
    that repeats a recorded step reads it anew.
    """
    return np.array([g_factor, lr, beta1, beta2, eps, 1 / (1 - beta1**step), 1 / (1 - beta2**step), 1 - ema_decay])


@kernel
def orthogonalised(matrices: Sequence[Array], steps: int = 5) -> list[Array]:
    """Of each matrix g one with its singular vectors, and singular values near 1 (about 0.7 to 1.2).

    Newton and Schulz's iteration in products alone, X <- P X with P = a + b A + c A^2 and A = X X^T, moves every
    singular value s to a s + b s^3 + c s^5. As A and P commute, the small square matrices are enough: A <- P^2 A, and
    the product of all P meets g once, at the end. Those of one size are iterated together. Coefficients: Jordan 2024,
    "Muon: an optimizer for hidden layers".
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    xp = array_module(*matrices)
    wide = [g if g.shape[0] <= g.shape[1] else g.T for g in matrices]  # A is the smaller of the two squares
    results: list[Array] = list(matrices)
    for n in {len(x) for x in wide}:
        places = [i for i, x in enumerate(wide) if len(x) == n]
        A = xp.stack([wide[i] @ wide[i].T for i in places])
        norm = xp.sqrt(xp.trace(A, axis1=1, axis2=2))[:, None, None] + 1e-7  # |g|
        A /= norm * norm
        one = xp.eye(n, dtype=A.dtype)
        product = one / norm
        for _ in range(steps):
            P = a * one + b * A + c * (A @ A)
            product = P @ product
            A = P @ A @ P
        for i, each in zip(places, product, strict=True):
            x = each @ wide[i]
            results[i] = x if wide[i] is matrices[i] else x.T
    return results


@kernel
def adamw_update(
    p: Sequence[Array], g: Sequence[Array], m: Sequence[Array], v: Sequence[Array], ema: Sequence[Array],
    decay: Sequence[float], numbers: Array,
) -> None:  # fmt: skip
    """One step for a list of parameters, in place. Loshchilov and Hutter 2017, arXiv 1711.05101.

    numbers: `step_numbers`, in the arrays' dtype; nothing is changed where g_factor is NaN.
    g <- g_factor g (the clipping)
    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (mhat / (sqrt(vhat) + eps) + decay p),  mhat = m / (1 - beta1^step), vhat = v / (1 - beta2^step)
    ema <- ema + (1 - ema_decay) (p - ema)
    """
    g_factor, lr, beta1, beta2, eps, m_factor, v_factor, ema_share = numbers
    if g_factor != g_factor:
        return
    for p_, g_, m_, v_, ema_, decay_ in zip(p, g, m, v, ema, decay, strict=True):
        g_ = g_ * g_factor
        m_ += (1 - beta1) * (g_ - m_)
        v_ += (1 - beta2) * (g_ * g_ - v_)
        p_ -= lr * (m_ * m_factor / (array_module(p_).sqrt(v_ * v_factor) + eps) + decay_ * p_)
        ema_ += ema_share * (p_ - ema_)


@kernel
def muon_momentum(g: Sequence[Array], m: Sequence[Array], numbers: Array) -> list[Array]:
    """m <- mu m + (1 - mu) g_factor g, in place, mu = beta1; the directions (1 - mu) g_factor g + mu m.

    Where g_factor is NaN nothing is changed, and the directions are of no use.
    """
    g_factor, _, mu, *_ = numbers
    if g_factor != g_factor:
        return list(g)
    directions = []
    for g_, m_ in zip(g, m, strict=True):
        g_ = g_ * g_factor
        m_ += (1 - mu) * (g_ - m_)
        directions.append((1 - mu) * g_ + mu * m_)
    return directions


@kernel
def descend(
    p: Sequence[Array], u: Sequence[Array], ema: Sequence[Array], length: Sequence[float], decay: Sequence[float],
    numbers: Array,
) -> None:  # fmt: skip
    """One step along each u, in place: p <- p - lr (length u + decay p),  ema <- ema + (1 - ema_decay) (p - ema).

    Nothing is changed where g_factor is NaN.
    """
    g_factor, lr, *_, ema_share = numbers
    if g_factor != g_factor:
        return
    for p_, u_, ema_, length_, decay_ in zip(p, u, ema, length, decay, strict=True):
        p_ -= lr * (length_ * u_ + decay_ * p_)
        ema_ += ema_share * (p_ - ema_)


class AdamW:
    """AdamW over named parameters, with an exponential moving average (EMA) of them beside it.

    Only matrices and kernels decay; biases, gains and other vectors do not. The EMA's decay warms up as
    (1 + step) / (10 + step), at most `ema_decay`, so that it does not remember the noise it began from.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        ema_decay: float = 0.999,
    ):
        self.parameters = parameters
        self.betas, self.eps, self.weight_decay, self.ema_decay = betas, eps, weight_decay, ema_decay
        self.m = {name: array_module(p.data).zeros_like(p.data) for name, p in parameters.items()}
        self.v = {name: array_module(p.data).zeros_like(p.data) for name, p in parameters.items()}
        self.ema = {name: p.data.copy() for name, p in parameters.items()}
        self.step_number = 0

    def step(self, lr: float, grads: dict[str, Array], factor: float = 1.0) -> None:
        """Update every parameter and its average from its gradient, which is first multiplied by `factor`."""
        self.update(grads, self.next_numbers(lr, factor))

    def next_numbers(self, lr: float, factor: float = 1.0) -> Array:
        """Count a step; what `update` needs to know of it (rows, 8), on the parameters' device."""
        self.step_number += 1
        data = next(iter(self.parameters.values())).data
        rows = [step_numbers(factor, *row, self.step_number, self._ema_decay()) for row in self._rows(lr)]
        return array_module(data).asarray(np.array(rows).astype(data.dtype))

    def _rows(self, lr: float) -> list[tuple[float, float, float, float]]:
        return [(lr, *self.betas, self.eps)]

    def update(self, grads: dict[str, Array], numbers: Array) -> None:
        """The step itself: nothing but arrays."""
        names = list(self.parameters)
        workers = num_workers(array_module(numbers))
        parts = (names[i::workers] for i in range(workers))
        for _ in parallel_map(lambda part: self._update(part, grads, numbers), parts, workers):
            pass

    def _update(self, names: Sequence[str], grads: dict[str, Array], numbers: Array) -> None:
        parameters = [self.parameters[name] for name in names]
        g, m, v, ema = ([table[name] for name in names] for table in (grads, self.m, self.v, self.ema))
        adamw_update([p.data for p in parameters], g, m, v, ema, [self._decay(p) for p in parameters], numbers[0])

    def _decay(self, p: Parameter) -> float:
        return self.weight_decay if p.ndim > 1 else 0.0

    def _ema_decay(self) -> float:
        return min(self.ema_decay, (1 + self.step_number) / (10 + self.step_number))


class Muon(AdamW):
    """Muon for the matrices and kernels between a network's first and last layers, AdamW for everything else.

    AdamW lets the few directions in which a layer's gradient is large decide its step. Muon makes all directions of the
    step equally long, so that what shows faintly in the gradient is not left to the end.
    Its learning rate is `ratio` times AdamW's: it is the length of a step in every direction, not of every number.

    m <- momentum m + (1 - momentum) g,  u = orthogonalised((1 - momentum) g + momentum m) sqrt(max(1, columns / rows))
    p <- p - ratio lr u - lr decay p;  a kernel is the matrix (kh * kw * C_in, C_out).
    Jordan 2024, as for `orthogonalised`.
    """

    momentum = 0.95
    ratio = 10.0

    def _rows(self, lr: float) -> list[tuple[float, float, float, float]]:
        return [*super()._rows(lr), (self.ratio * lr, self.momentum, 0.0, 0.0)]

    def _update(self, names: Sequence[str], grads: dict[str, Array], numbers: Array) -> None:
        hidden = [name for name in names if self.parameters[name].hidden]
        super()._update([name for name in names if not self.parameters[name].hidden], grads, numbers)
        parameters = [self.parameters[name] for name in hidden]
        u = muon_momentum([grads[name] for name in hidden], [self.m[name] for name in hidden], numbers[1])
        u = orthogonalised([a.reshape(-1, a.shape[-1]) for a in u])
        lengths = [math.sqrt(max(1, a.shape[1] / a.shape[0])) for a in u]
        descend(
            [p.data for p in parameters], [a.reshape(p.shape) for a, p in zip(u, parameters, strict=True)],
            [self.ema[name] for name in hidden], lengths, [self._decay(p) / self.ratio for p in parameters], numbers[1],
        )  # fmt: skip


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """At step 1..steps: rises linearly to the peak over `warmup` steps, then falls along half a cosine to 0."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
