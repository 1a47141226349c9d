"""Each ladder's ops on ragged arrays, through one kind of kernels: what the tests of single rungs run.

CASES are small, and run on any chip. SIZES make rungs launch otherwise than they do there: with larger tiles, more
registers, longer loops. Which tiles a product chooses depends on the number of multiprocessors, so their arrays grow
with it; the emulator pretends to have one or two.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from helpers import COARSER, computing, placed, stand_on

from minidiff import diffusion, optim  # noqa: F401 - diffusion enters its ops in the table
from minidiff.backend import MODULES, REFERENCE, array_module, to_numpy
from minidiff.compiled import Compiled
from minidiff.random import Draw, Purpose

SAME, NONE = ((1, 1), (1, 1)), ((0, 0), (0, 0))
ALIGNMENT = 4  # floats, of a vector
_offset = None  # how many floats from a vector's boundary arrays begin; None: wherever they come from


def draw(*shapes):
    """Arrays of normal numbers, where the kernels in use take them."""
    rng = np.random.default_rng(1)
    return [_shifted(placed(rng.standard_normal(shape).astype(np.float32))) for shape in shapes]


def _shifted(array):
    """The array, or a copy that begins where `off_boundary` wants it."""
    if _offset is None:
        return array
    xp = array_module(array)
    room = xp.empty(array.size + 2 * ALIGNMENT, np.float32)
    first = (_offset - (room.ctypes.data // 4 if xp is np else 0)) % ALIGNMENT  # a GPU's arrays begin on a boundary
    shifted = room[first : first + array.size].reshape(array.shape)
    shifted[...] = array
    return shifted


@contextlib.contextmanager
def off_boundary(floats):
    """Inside this block inputs and results begin so many floats behind a multiple of 16 bytes."""
    global _offset
    empty = Compiled.empty
    _offset = floats
    Compiled.empty = lambda on, shape: _shifted(empty(on, shape))
    try:
        yield
    finally:
        _offset, Compiled.empty = None, empty


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


@dataclass(frozen=True, eq=False)
class Size:
    """Arrays that make some rungs of a case's ladders launch as CASES does not."""

    case: str
    name: str
    run: Callable[[Any, int], Any]  # like those of CASES, on so many multiprocessors
    rungs: tuple[int, ...]
    kernels: tuple[str, ...] = ()  # that the last of the rungs must launch
    tiles: dict[str, str] = field(default_factory=dict)  # LARGE, TALL, SMALL or NARROW, by the product
    widths: tuple[int, ...] = ()  # of heads or rows
    options: dict[str, int] = field(default_factory=lambda: {"multiprocessors": 1})  # of an emulator


def _product(of, M, K, N, activation=None, residual=False):
    x, w, b, r = draw((M, K), (K, N), (N,), (M, N))
    y, z = of.linear_forward(x, w, b, r if residual else None, activation, True)
    yield y
    yield from of.linear_backward(draw(y.shape)[0], x, w, True, activation, z)


def product(M, K, N, **more):
    """A product that has a large tile a multiprocessor, and no more sides than that on one."""

    def run(of, chip):
        grown = 128 * math.isqrt(chip - 1)
        yield from _product(of, M + grown, K + grown, N + grown, **more)

    return run


def small_product(of, chip):
    yield from _product(of, 70, 37, 66)


def parts_of_k(of, chip):
    """On two multiprocessors each takes one of two parts."""
    K, others = 512 * min(chip, 64) + 4, 128 * ((chip - 1) // 64)
    for N, activation in ((others + 70, "silu"), (others + 120, "geglu")):
        x, w, b = draw((21, K), (K, N), (N,))
        yield of.linear_forward(x, w, b, None, activation, True)[0]


def convolution(image, N, C2=0, kernel=3, stride=1, upsample=1, images=None):
    """A convolution, of as many images as have a tile of 256 rows for each multiprocessor unless it is said."""
    sides, C = SAME if kernel == 3 else NONE, image[2] + C2

    def run(of, chip):
        B = images or max(1, 3 * chip - 2)  # of 90 pixels and more
        x, x2, w, b, shift = draw((B, *image), (B, *image[:2], C2), (kernel, kernel, C, N), (N,), (B, N))
        x2 = x2 if C2 else None
        y = of.conv2d_forward(x, w, b, stride, sides, x2, shift, None, upsample, True)
        yield y
        dy = draw(y.shape)[0]
        for needs in ((True, False), (False, True)):
            gradients = of.conv2d_backward(dy, x, w, stride, sides, x2, upsample, *needs)
            yield from (a for a in gradients if a is not None)

    return run


def heads(case, name, rungs, *widths, Lq=70, Lk=77, bias=None, causal=False, **more):
    """Attention with a head of each width, without a bias, with one a key, or with one a query and key."""

    def run(of, chip):
        for d in widths:
            q, k, v, dy = draw((1, Lq, d), (1, Lk, d), (1, Lk, d), (1, Lq, d))
            b = None if bias is None else draw({"keys": (1, 1, 1, Lk), "all": (1, 1, Lq, Lk)}[bias])[0]
            y, lse = of.attention_forward(q, k, v, 1, d**-0.5, b, causal)
            yield y
            yield from of.attention_backward(dy, y, lse, q, k, v, 1, d**-0.5, b, causal)[:3]

    return Size(case, name, run, rungs, widths=widths, **more)


def rows(case, name, rungs, *widths, **more):
    """Layer norms of so many channels."""

    def run(of, chip):
        for D in widths:
            x, gamma, beta, dy = draw((19, D), (D,), (D,), (19, D))
            y, mean, rstd = of.layer_norm_forward(x, gamma, beta, 1e-5)
            yield y
            yield from of.layer_norm_backward(dy, x, gamma, mean, rstd)

    return Size(case, name, run, rungs, widths=widths, **more)


def groups(*shapes):
    """Group norms of (B, N, C) in so many groups."""

    def run(of, chip):
        for B, N, C, count in shapes:
            x, gain, offset, dy = draw((B, N, C), (B, C), (B, C), (B, N, C))
            y, mean, rstd = of.group_norm_forward(x, gain, offset, count, 1e-5, True)
            yield y
            dx, _, dgain, doffset = of.group_norm_backward(dy, x, gain, offset, mean, rstd, count, True)
            yield from (dx, dgain, doffset)

    return run


def more_than_threads(chip):
    """More numbers than all threads of an elementwise launch take in one turn, four a thread."""
    return 4 * 32 * chip * 256 + 1031


def turns_of_silu(of, chip):
    x, dy = draw(*[(more_than_threads(chip),)] * 2)
    yield of.silu_forward(x)
    yield of.silu_backward(dy, x)


def turns_of_add(of, chip):
    yield of.accumulate(*draw(*[(more_than_threads(chip),)] * 2))


def turns_of_geglu(of, chip):
    D = 36
    count = more_than_threads(chip) // D + 1
    x, dy = draw((count, 2 * D), (count, D))
    yield of.geglu_forward(x)
    yield of.geglu_backward(dy, x)


def turns_of_reverse_step(of, chip):
    arrays = draw(*[(more_than_threads(chip),)] * 4)
    yield from of.reverse_step(*arrays, 2.0, 0.6, 0.8, None, 0.7, 0.5, 0.5)


def turns_of_mse(a_thread):
    """Its threads are as many on every chip, and take one number or four."""

    def run(of, chip):
        yield of.mse_forward(*draw(*[(a_thread * 1024 * 256 + 1031,)] * 2))
        yield of.mse_backward(np.float32(0.7), *draw(*[(more_than_threads(chip),)] * 2))

    return run


def many_gradients(of, chip):
    """More pieces than threads add, and more arrays than a launch takes."""
    yield of.gradient_norm([a for a in draw(*[(1 + i % 5,) for i in range(70)]) for _ in range(16)])


def many_parameters(update):
    """More arrays than a launch takes, and one of two pieces."""

    def run(of, chip):
        shapes = [(1 + i % 5,) for i in range(70)] + [(5000,)]
        p, g, m, v, ema = (draw(*shapes) for _ in range(5))
        share = [0.01 * i for i in range(len(shapes))]
        now = placed(optim.step_numbers(0.5, 0.01, 0.9, 0.99, 1e-8, 3, 0.9).astype(np.float32))
        yield from update(of, p, g, m, [a * a for a in v], ema, share, now)

    return run


def adamw(of, p, g, m, v, ema, share, now):
    of.adamw_update(p, g, m, v, ema, share, now)
    return [*p, *m, *v, *ema]


def momentum(of, p, g, m, v, ema, share, now):
    return [*of.muon_momentum(g, m, now), *m]


def descent(of, p, g, m, v, ema, share, now):
    of.descend(p, g, ema, share, share, now)
    return [*p, *ema]


MANY = [(7 * i) % 1000 for i in range(520)]  # samples: more than a launch takes


def many_drawn(of, chip):
    yield of.normal(3, MANY, 2, 1, (5,))


def many_noised(of, chip):
    x, signal, noise = draw((520, 8), (520,), (520,))
    yield from of.q_sample_drawn(x, signal, noise, "v", Draw(3, MANY, 2, Purpose.TRAIN_NOISE))


def many_steps(of, chip):
    x, eps = draw((520, 8), (520, 8))
    z = Draw(3, MANY, 2, Purpose.STEP_NOISE)
    yield from of.reverse_step_drawn(x, eps, None, z, 1.0, 0.6, 0.8, None, 0.7, 0.5, 0.5)


IMPLICIT, TILED, ANY_CHIP = (3, 4, 5, 6), (4, 5, 6, 7, 8, 9), {}
SIZES = [
    Size("linear", "large tiles", product(130, 37, 140, residual=True), TILED,
         tiles={"y": "LARGE", "dx": "LARGE", "dw": "LARGE"}),
    Size("linear", "large tiles of vectors", product(132, 36, 264, activation="geglu"), TILED,
         tiles={"y": "LARGE", "dx": "LARGE", "dw": "LARGE"}),
    Size("linear", "small tiles", small_product, TILED, tiles={"y": "SMALL", "dx": "SMALL", "dw": "SMALL"},
         options=ANY_CHIP),
    Size("linear", "large tiles, parts of k", parts_of_k, TILED, ("add_parts",), {"y": "LARGE"},
         options={"multiprocessors": 2}),
    Size("conv2d", "large, 20 to 100 channels", convolution((9, 10, 13), 100, C2=7), IMPLICIT,
         tiles={"y": "LARGE", "dw": "LARGE"}),
    Size("conv2d", "large, 70 to 36 channels", convolution((9, 10, 70), 36), IMPLICIT, tiles={"dx": "LARGE"}),
    Size("conv2d", "tall", convolution((12, 12, 28), 36), IMPLICIT, tiles={"y": "TALL", "dx": "TALL", "dw": "TALL"}),
    Size("conv2d", "small", convolution((12, 12, 28), 36, images=1), IMPLICIT,
         tiles={"y": "SMALL", "dx": "SMALL", "dw": "SMALL"}, options=ANY_CHIP),
    Size("conv2d", "narrow", convolution((12, 12, 8), 8), IMPLICIT,
         tiles={"y": "NARROW", "dx": "NARROW", "dw": "NARROW"}),
    Size("conv2d", "large, strided", convolution((18, 17, 8), 72, stride=2), IMPLICIT, tiles={"y": "LARGE"}),
    Size("conv2d", "tall, strided", convolution((24, 25, 20), 36, stride=2), IMPLICIT,
         tiles={"y": "TALL", "dx": "TALL"}),
    Size("conv2d", "large, upsampled", convolution((9, 10, 8), 72, upsample=2), IMPLICIT, tiles={"y": "LARGE"}),
    Size("conv2d", "large, 1x1", convolution((9, 10, 20), 72, kernel=1), IMPLICIT, tiles={"y": "LARGE"}),
    heads("attention", "heads that tensor cores hold", (2, 3, 4, 5), 16, 64),
    heads("attention", "wide heads", (3, 5), 32, 40, 80, 96, 104, 160),
    heads("attention", "the widest heads", (2, 3), 200, Lk=33, kernels=("forward_registers",)),
    heads("attention", "a bias a key", (3, 4, 5), 24, 64, 96, Lk=70, bias="keys", causal=True,
          kernels=("forward_pipelined",)),
    heads("attention", "a bias a query and key", (1, 2, 3, 4, 5), 24, 40, 96, bias="all",
          kernels=("forward_tensor_cores", "forward_registers")),
    rows("layer_norm", "rows of vectors", (3,), 128, 256, 332, 640, 896, 1280, kernels=("forward_registers",)),
    rows("layer_norm", "ragged rows", (3,), 31, 63, 95, 159, 223, 319, kernels=("forward_registers",)),
    rows("layer_norm", "rows too wide for registers", (3,), 321, 1284, kernels=("forward_warp",)),
    Size("group_norm", "groups of twos and ones", groups((2, 37, 6, 1), (2, 37, 15, 3)), (3, 5), ("forward_on_chip",)),
    Size("group_norm", "more channels than threads", groups((1, 9, 2056, 2), (1, 40, 261, 3)), (2, 3, 5)),
    Size("group_norm", "an image at a time", groups((3, 40, 16, 4)), (4,), options={"l2_bytes": 10240}),
    Size("pointwise", "many turns", turns_of_silu, (2, 3)),
    Size("add", "many turns", turns_of_add, (2, 3)),
    Size("geglu", "many turns", turns_of_geglu, (2, 3)),
    Size("reverse_step", "many turns", turns_of_reverse_step, (2, 3)),
    Size("mse", "many turns", turns_of_mse(1), (2, 3)),
    Size("mse", "many turns of vectors", turns_of_mse(4), (4,), ("mse_vectors",)),
    Size("gradient_norm", "many arrays", many_gradients, (1, 2, 3)),
    Size("adamw_update", "many arrays", many_parameters(adamw), (2, 3)),
    Size("muon_momentum", "many arrays", many_parameters(momentum), (2, 3)),
    Size("descend", "many arrays", many_parameters(descent), (2, 3)),
    Size("normal", "many samples", many_drawn, (1, 2, 3)),
    Size("q_sample_drawn", "many samples", many_noised, (1, 2, 3)),
    Size("reverse_step_drawn", "many samples", many_steps, (1, 2, 3)),
]  # fmt: skip


@contextlib.contextmanager
def launching(size, module):
    """Inside this block an emulator pretends to be the chip that the size is for; a GPU is what it is."""
    pretend = getattr(module, "set_options", lambda **options: None)
    pretend(**size.options)
    try:
        yield
    finally:
        pretend()


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
        stand_on(module, name, rungs, min(rung, len(rungs)))
        coarse = max(coarse, COARSER[rungs[min(rung, len(rungs)) - 1][3]]) if rung else coarse
    return coarse


def results(case, kind, through=lambda of: of, chip=None):
    """What this kind of kernels makes of a case, by its name, or of a Size, as NumPy arrays.

    through: what stands between the two; chip: multiprocessors, if not of this kind.
    """
    of = MODULES[kind] or SimpleNamespace(**REFERENCE)
    run = CASES[case] if isinstance(case, str) else partial(case.run, chip=chip or of.module.multiprocessors())
    with computing(kind, "fp32"):
        return [np.array(to_numpy(a)) for a in run(through(of))]


@lru_cache(maxsize=2)
def wanted(case, chip):
    """The reference's results."""
    return results(case, "reference", chip=chip)


def wrong(case, kind, coarse, through=lambda of: of):
    """The largest error of a case's results against the reference, in shares of what is allowed."""
    worst, chip = 0.0, None if isinstance(case, str) else MODULES[kind].module.multiprocessors()
    for got, exact in zip(results(case, kind, through), wanted(case, chip), strict=True):
        error = np.abs(got - exact).max(initial=0) / max(np.abs(exact).max(initial=0), 1e-30)
        worst = max(worst, error / (2e-5 * coarse) if np.isfinite(error) else np.inf)
    return worst
