"""AdamW, Muon, the moving average of the parameters, gradient clipping, and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minidiff.backend import Array, array_module, kernel
from minidiff.nn import Parameter
from minidiff.threads import num_threads, parallel_map


def clip_factor(norm: float, limit: float) -> float:
    """What gradients are multiplied by so that their common norm is at most `limit`."""
    return min(1.0, limit / norm) if norm > 0 else 1.0


def gradient_norm(grads: Sequence[Array]) -> float:
    """The Euclidean norm of all gradients together, summed in float64."""
    return math.sqrt(sum(float((g * g).sum(dtype=np.float64)) for g in grads))


def orthogonalised(g: Array, steps: int = 5) -> Array:
    """A matrix with the singular vectors of g (n, m) and singular values near 1 (about 0.7 to 1.2).

    Newton and Schulz's iteration in products alone: X <- a X + (b A + c A^2) X, A = X X^T, from X = g / |g|. It moves
    every singular value s to a s + b s^3 + c s^5. Coefficients: Jordan 2024, "Muon: an optimizer for hidden layers".
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g if g.shape[0] <= g.shape[1] else g.T  # A is the smaller of the two squares
    x = x / (array_module(g).sqrt((x * x).sum()) + 1e-7)
    for _ in range(steps):
        A = x @ x.T
        x = a * x + (b * A + c * (A @ A)) @ x
    return x if g.shape[0] <= g.shape[1] else x.T


@kernel
def muon_update(
    p: Array, g: Array, m: Array, ema: Array, lr: float, momentum: float, decay: float, ema_decay: float
) -> None:
    """One step for one matrix, or kernel as a matrix (kh * kw * C_in, C_out), in place.

    m <- momentum m + (1 - momentum) g
    u = orthogonalised((1 - momentum) g + momentum m) * sqrt(max(rows, columns)): its numbers are about 1 in size
    p <- p - lr (u + decay p),  ema <- ema + (1 - ema_decay) (p - ema)
    Jordan 2024; the scale as in Liu et al. 2025, arXiv 2502.16982, without their factor of 0.2.
    """
    m += (1 - momentum) * (g - m)
    u = orthogonalised(((1 - momentum) * g + momentum * m).reshape(-1, g.shape[-1]))
    u *= math.sqrt(max(u.shape))
    p -= lr * (u.reshape(p.shape) + decay * p)
    ema += (1 - ema_decay) * (p - ema)


@kernel
def adamw_update(
    p: Array, g: Array, m: Array, v: Array, ema: Array,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int, ema_decay: float,
) -> None:  # fmt: skip
    """One step for one parameter, in place, step = 1, 2, ... Loshchilov and Hutter 2017, arXiv 1711.05101.

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (mhat / (sqrt(vhat) + eps) + decay p),  mhat = m / (1 - beta1^step), vhat = v / (1 - beta2^step)
    ema <- ema + (1 - ema_decay) (p - ema)
    """
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    denominator = array_module(p).sqrt(v / (1 - beta2**step)) + eps
    p -= lr * (m / (1 - beta1**step) / denominator + decay * p)
    ema += (1 - ema_decay) * (p - ema)


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

    def step(self, lr: float, grads: dict[str, Array]) -> None:
        """Update every parameter and its average from its gradient."""
        self.step_number += 1
        names = list(self.parameters)
        on_cpu = isinstance(self.parameters[names[0]].data, np.ndarray)
        threads = num_threads() if on_cpu else 1

        def update_some(first: int) -> None:
            for name in names[first::threads]:
                self.update(name, lr, grads[name])

        for _ in parallel_map(update_some, range(threads)):
            pass

    def update(self, name: str, lr: float, g: Array) -> None:
        """Update one parameter and its average."""
        p, n = self.parameters[name], self.step_number
        adamw_update(
            p.data, g, self.m[name], self.v[name], self.ema[name],
            lr, *self.betas, self.eps, self._decay(p), n, self._ema_decay(),
        )  # fmt: skip

    def _decay(self, p: Parameter) -> float:
        return self.weight_decay if p.ndim > 1 else 0.0

    def _ema_decay(self) -> float:
        return min(self.ema_decay, (1 + self.step_number) / (10 + self.step_number))


class Muon(AdamW):
    """Muon for the matrices and kernels between a network's first and last layers, AdamW for everything else.

    AdamW lets the few directions in which a layer's gradient is large decide its step. Muon makes all directions of the
    step equally long, so that what shows faintly in the loss (here: the shapes, beside the colours) is learned too.
    """

    momentum = 0.95

    def update(self, name: str, lr: float, g: Array) -> None:
        """Update one parameter and its average."""
        p = self.parameters[name]
        if p.ndim == 1 or not p.hidden:
            return super().update(name, lr, g)
        muon_update(p.data, g, self.m[name], self.ema[name], lr, self.momentum, self._decay(p), self._ema_decay())


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}


def learning_rate(step: int, steps: int, peak: float, warmup: int, final: float = 0.0) -> float:
    """At step 1..steps: rises linearly to the peak over `warmup` steps, then falls along half a cosine to `final`."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
