"""Each ladder's ops on small ragged arrays, through one kind of kernels: what the tests of single rungs run."""

from types import SimpleNamespace

import numpy as np
from helpers import COARSER, computing, placed

from minidiff import diffusion, optim  # noqa: F401 - diffusion enters its ops in the table
from minidiff.backend import MODULES, REFERENCE, to_numpy
from minidiff.random import Draw, Purpose

SAME = ((1, 1), (1, 1))


def draw(*shapes):
    """Arrays of normal numbers, where the kernels in use take them."""
    rng = np.random.default_rng(1)
    return [placed(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def conv2d(of):
    for stride, upsample, side in ((1, 1, 9), (2, 1, 8), (1, 2, 5)):
        x, x2, w, b, shift = draw((2, side, side + 1, 5), (2, side, side + 1, 4), (3, 3, 9, 11), (11,), (2, 11))
        y = of.conv2d_forward(x, w, b, stride, SAME, x2, shift, None, upsample, True)
        yield y
        yield from of.conv2d_backward(draw(y.shape)[0], x, w, stride, SAME, x2, upsample)
    x, w = draw((1, 12, 12, 40), (3, 3, 40, 36))
    yield of.conv2d_forward(x, w, None, 1, SAME)
    yield from (a for a in of.conv2d_backward(draw((1, 12, 12, 36))[0], x, w, 1, SAME) if a is not None)


def linear(of):
    for M, K, N, activation in ((70, 37, 66, None), (130, 96, 72, "silu"), (33, 8, 20, "geglu")):
        x, w, b = draw((M, K), (K, N), (N,))
        y, z = of.linear_forward(x, w, b, None, activation, True)
        yield y
        yield from of.linear_backward(draw(y.shape)[0], x, w, True, activation, z)


def group_norm(of):
    for B, N, C, groups in ((2, 37, 12, 3), (1, 300, 64, 8)):
        x, gain, offset, dy = draw((B, N, C), (B, C), (B, C), (B, N, C))
        y, mean, rstd = of.group_norm_forward(x, gain, offset, groups, 1e-5, True)
        yield y
        yield from (a for a in of.group_norm_backward(dy, x, gain, offset, mean, rstd, groups, True) if a is not None)


def layer_norm(of):
    for rows, D in ((5, 33), (40, 128)):
        x, gamma, beta, dy = draw((rows, D), (D,), (D,), (rows, D))
        y, mean, rstd = of.layer_norm_forward(x, gamma, beta, 1e-5)
        yield y
        yield from of.layer_norm_backward(dy, x, gamma, mean, rstd)


def attention(of):
    for Lq, Lk, d, causal in ((33, 77, 32, False), (40, 40, 40, True)):
        q, k, v, dy = draw((2, Lq, 2 * d), (2, Lk, 2 * d), (2, Lk, 2 * d), (2, Lq, 2 * d))
        y, lse = of.attention_forward(q, k, v, 2, d**-0.5, None, causal)
        yield y
        yield from of.attention_backward(dy, y, lse, q, k, v, 2, d**-0.5, None, causal)[:3]


def numbers(of):
    a, b, c = draw((1, 1003), (1, 1003), (1, 4096))
    yield of.mse_forward(a, b)
    yield of.mse_backward(np.float32(0.7), a, b)
    yield of.gradient_norm([a, b, c])
    yield of.normal(3, [5, 6], 2, 1, (35, 3))


def pointwise(of):
    x, dy = draw((3, 347), (3, 347))
    yield of.silu_forward(x)
    yield of.silu_backward(dy, x)
    for kind in ("exact", "tanh", "quick"):
        yield of.gelu_forward(x, kind)
        yield of.gelu_backward(dy, x, kind)


def geglu(of):
    for D in (33, 64):
        x, dy = draw((5, 2 * D), (5, D))
        yield of.geglu_forward(x)
        yield of.geglu_backward(dy, x)


def add(of):
    yield of.accumulate(*draw((3, 347), (3, 347)))


def optimizers(of):
    """Arrays of several pieces, one of them empty."""
    shapes = [(5000,), (3, 7), (0,), (4096,), (9, 1000)]
    p, g, m, v, ema = (draw(*shapes) for _ in range(5))
    v = [a * a for a in v]
    decay = [0.1 * i for i in range(len(shapes))]
    now = placed(optim.step_numbers(0.5, 0.01, 0.9, 0.99, 1e-8, 3, 0.9).astype(np.float32))
    of.adamw_update(p, g, m, v, ema, decay, now)
    yield from (*p, *m, *v, *ema)
    u = of.muon_momentum(g, m, now)
    of.descend(p, u, ema, decay, decay, now)
    yield from (*u, *p, *ema)
    of.adamw_update(p, g, m, v, ema, decay, now * np.float32("nan"))
    of.descend(p, u, ema, decay, decay, now * np.float32("nan"))
    yield from (*p, *m, *ema)


def reverse_step(of):
    for n, z in ((1003, Draw(3, [5], 2, Purpose.STEP_NOISE)), (1024, Draw(3, [5, 6], 2, Purpose.STEP_NOISE))):
        x_t, cond, uncond, noise = draw(*[(len(z.samples), n)] * 4)
        numbers = (2.0, 0.6, 0.8, 0.9, 0.7, 0.5, 0.5)
        yield from of.reverse_step(x_t, cond, uncond, noise, *numbers)
        yield from of.reverse_step_drawn(x_t, cond, uncond, z, *numbers)


def q_sample_drawn(of):
    for n in (1003, 1024):
        x0, signal, noise = draw((2, n), (2,), (2,))
        yield from of.q_sample_drawn(x0, signal, noise, "v", Draw(3, [5, 6], 2, Purpose.TRAIN_NOISE))


CASES = {
    "adamw_update": optimizers, "add": add, "attention": attention, "conv2d": conv2d, "descend": optimizers,
    "geglu": geglu, "gradient_norm": numbers, "group_norm": group_norm, "layer_norm": layer_norm, "linear": linear,
    "mse": numbers, "muon_momentum": optimizers, "normal": numbers, "pointwise": pointwise,
    "q_sample_drawn": q_sample_drawn, "reverse_step": reverse_step,
}  # fmt: skip


def every_rung(module):
    """(case, rung) for all that its ladders have."""
    return [(case, rung) for case in CASES for rung in range(1, max(map(len, climbed(module, case).values())) + 1)]


def climbed(module, case):
    """The ladders {name: rungs} of a case."""
    return {name: rungs for name, rungs in module.ladders().items() if name.startswith(case)}


def standing_on(module, case, rung):
    """Choose a rung of the case's ladders (0: the device's choice); how coarse its products' factors are."""
    coarse = 1
    for name, rungs in climbed(module, case).items():
        module.choose(name, min(rung, len(rungs)))
        coarse = max(coarse, COARSER[rungs[min(rung, len(rungs)) - 1][3]]) if rung else coarse
    return coarse


def results(case, kind):
    """What this kind of kernels makes of a case, as NumPy arrays."""
    with computing(kind, "fp32"):
        return [np.array(to_numpy(a)) for a in CASES[case](MODULES[kind] or SimpleNamespace(**REFERENCE))]


def wrong(case, kind, coarse):
    """The largest error of a case's results against the reference, in shares of what is allowed."""
    worst = 0.0
    for got, wanted in zip(results(case, kind), results(case, "reference"), strict=True):
        error = np.abs(got - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-30)
        worst = max(worst, error / (2e-5 * coarse) if np.isfinite(error) else np.inf)
    return worst
