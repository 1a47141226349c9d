"""The compiled CPU kernels beyond what every op's test asks: blocking, algorithms, threads, memory, bad arguments.

Sizes here cross the kernels' blocks (16 channels, panels of 8 to 32, tiles, passes); the ops' own tests are small.
"""

import itertools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import assert_close

from minidiff.backend import MODULES, REFERENCE, kernels
from minidiff.threads import num_threads, set_num_threads

_cpu = pytest.importorskip("minidiff._cpu", reason="the compiled kernels are not built here; see: minidiff doctor")

KINDS = [kind for kind in MODULES if kind.startswith("cpu")]
SAME = ((1, 1), (1, 1))
TOLERANCE = 5  # times the tests' usual one: sums are long, and Winograd's transforms magnify a little


@pytest.fixture(params=KINDS)
def kind(request):
    with kernels(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads for the test; afterwards it is what it was."""
    before = num_threads()
    yield set_num_threads
    set_num_threads(before)


def draw(rng, *shapes):
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def wide(*arrays):
    return [None if a is None else a.astype(np.float64) for a in arrays]


def blank(shape):
    """What a kernel must overwrite wholly."""
    return np.full(shape, np.nan, np.float32)


def close(actual, reference, name):
    assert_close(actual, reference, condition=TOLERANCE, name=name)


CONVOLUTIONS = [
    # B, H, W, C, C2, N, kernel, stride, sides, upsample
    (2, 8, 8, 32, 0, 32, 3, 1, SAME, 1),
    (3, 5, 7, 17, 0, 33, 3, 1, SAME, 1),
    (1, 4, 4, 48, 0, 48, 3, 1, SAME, 1),
    (2, 9, 4, 3, 0, 40, 3, 1, SAME, 1),
    (1, 1, 1, 5, 0, 3, 3, 1, SAME, 1),
    (2, 6, 6, 24, 13, 50, 3, 1, SAME, 1),
    (40, 12, 12, 40, 0, 72, 3, 1, SAME, 1),
    (1, 16, 16, 70, 0, 600, 3, 1, SAME, 1),
    (2, 6, 5, 20, 0, 34, 3, 1, ((0, 1), (2, 0)), 1),
    (2, 4, 4, 32, 0, 48, 3, 1, SAME, 2),
    (1, 3, 5, 18, 7, 33, 3, 1, SAME, 3),
    (2, 9, 8, 18, 0, 35, 3, 2, SAME, 1),
    (2, 8, 8, 64, 0, 96, 3, 2, ((0, 1), (0, 1)), 1),
    (1, 6, 10, 16, 7, 3, 1, 1, ((0, 0), (0, 0)), 1),
    (2, 9, 8, 300, 0, 35, 1, 1, ((0, 0), (0, 0)), 1),
    (2, 9, 8, 18, 0, 35, 1, 2, ((0, 0), (0, 0)), 1),
    (2, 9, 8, 18, 0, 35, 5, 3, ((2, 2), (1, 2)), 1),
    (2, 9, 8, 600, 0, 35, 2, 2, ((0, 0), (0, 0)), 1),
    (2, 7, 6, 20, 0, 3, 3, 1, ((1, 0), (2, 1)), 1),
    (1, 5, 6, 33, 0, 5, 5, 1, ((3, 3), (0, 2)), 1),
    (2, 9, 8, 3, 0, 20, 3, 2, SAME, 1),
    (1, 4, 5, 2, 0, 17, 3, 1, SAME, 2),
    (3, 66, 66, 500, 0, 20, (1, 2), 1, ((0, 0), (0, 1)), 1),  # too large to be packed at once
]


@pytest.mark.parametrize("algorithm", [-1, 0, 2, 4])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(kind, case, algorithm, rng):
    """Every algorithm that can serve the shape, with everything around the convolution, forward and backward."""
    B, H, W, C, C2, N, k, stride, sides, up = case
    if algorithm > 0 and (k, stride) != (3, 1):
        pytest.skip("Winograd's algorithm is for 3x3 kernels with stride 1")
    kernel = k if isinstance(k, tuple) else (k, k)
    x, x2, w, b, shift = draw(rng, (B, H, W, C), (B, H, W, C2), (*kernel, C + C2, N), (N,), (B, N))
    x2 = x2 if C2 else None
    exact = REFERENCE["conv2d_forward"](*wide(x, w, b), stride, sides, *wide(x2, shift), None, up)
    (residual,) = draw(rng, exact.shape)
    y, with_silu = blank(exact.shape), blank(exact.shape)
    _cpu.conv2d_forward(y, x, x2, w, b, shift, residual, stride, sides, up, False, None, algorithm)
    close(y, exact + residual, "y")
    _cpu.conv2d_forward(with_silu, x, x2, w, b, shift, residual, stride, sides, up, True, None, algorithm)
    close(with_silu, (exact + residual) / (1 + np.exp(-(exact + residual))), "y")
    size = _cpu.conv2d_prepared_size(w, B, H, W, stride, sides, up) if algorithm < 0 and not C2 else 0
    if size:
        prepared = blank(size)
        _cpu.conv2d_prepare(prepared, w, B, H, W, stride, sides, up)
        again = blank(exact.shape)
        _cpu.conv2d_forward(again, x, x2, w, b, shift, residual, stride, sides, up, False, prepared, algorithm)
        assert np.array_equal(again, y)

    (dy,) = draw(rng, exact.shape)
    wanted = REFERENCE["conv2d_backward"](*wide(dy, x, w), stride, sides, *wide(x2), up, True, True)
    dx, dx2, dw, dshift = blank(x.shape), None if x2 is None else blank(x2.shape), blank(w.shape), blank((B, N))
    _cpu.conv2d_backward(dx, dx2, dw, dshift, dy, x, x2, w, stride, sides, up, algorithm)
    for name, actual, reference in zip(("dx", "dx2", "dw", "dshift"), (dx, dx2, dw, dshift), wanted, strict=True):
        if actual is not None:
            close(actual, reference, name)


@pytest.mark.parametrize("channels, times", [(48, 2.1), (64, 1.65), (128, 1.25), (320, 1.0)])
def test_winograds_rounding_is_near_the_direct_algorithms(kind, channels, times, rng):
    """Products are summed in short chains: one sum over all 64 to 320 channels would be off 1.7 to 1.9 times as far."""
    x, w = draw(rng, (4, 32, 32, channels), (3, 3, channels, 32))
    exact = REFERENCE["conv2d_forward"](*wide(x, w), None, 1, SAME)
    direct, winograd = blank(exact.shape), blank(exact.shape)
    for y, algorithm in ((direct, 0), (winograd, 4)):
        _cpu.conv2d_forward(y, x, None, w, None, None, None, 1, SAME, 1, False, None, algorithm)
    assert np.linalg.norm(winograd - exact) <= times * np.linalg.norm(direct - exact)


SIZES = [(1, 1, 1), (5, 7, 3), (300, 64, 130), (64, 1100, 70), (500, 2100, 40), (7, 0, 3), (300, 0, 2)]


@pytest.mark.parametrize("M, K, N", SIZES)
def test_linear(kind, M, K, N, rng):
    x, w, b, residual, dy = draw(rng, (M, K), (K, N), (N,), (M, N), (M, N))
    y, dx, dw, db = map(blank, ((M, N), (M, K), (K, N), (N,)))
    _cpu.linear_forward(y, None, x, w, b, residual, "")
    _cpu.linear_backward(dx, dw, db, dy, None, x, w, "")
    X, W, B, R, DY = wide(x, w, b, residual, dy)
    for name, actual, reference in (
        ("y", y, X @ W + B + R), ("dx", dx, DY @ W.T), ("dw", dw, X.T @ DY), ("db", db, DY.sum(axis=0)),
    ):  # fmt: skip
        close(actual, reference, name)


@pytest.mark.parametrize("activation", ["silu", "gelu_exact", "gelu_tanh", "gelu_quick", "geglu"])
@pytest.mark.parametrize("M, K, N", [(M, K, N + N % 2) for M, K, N in SIZES])
def test_linear_with_an_activation(kind, M, K, N, activation, rng):
    width = N // 2 if activation == "geglu" else N
    x, w, b, dy = draw(rng, (M, K), (K, N), (N,), (M, width))
    w /= np.float32(max(K, 1) ** 0.5)
    y, again, z, dx, dw, db = map(blank, ((M, width), (M, width), (M, N), (M, K), (K, N), (N,)))
    _cpu.linear_forward(y, None, x, w, b, None, activation)
    _cpu.linear_forward(again, z, x, w, b, None, activation)
    _cpu.linear_backward(dx, dw, db, dy, z, x, w, activation)
    X, W, B, DY = wide(x, w, b, dy)
    exact = REFERENCE["linear_forward"](X, W, B, None, activation, True)
    back = REFERENCE["linear_backward"](DY, X, W, True, activation, exact[1])
    for name, actual, reference in zip("y z dx dw db".split(), (y, z, dx, dw, db), (*exact, *back), strict=True):
        close(actual, reference, name)
    assert np.array_equal(y, again)


@pytest.mark.parametrize("B, N, C, groups", [(1, 4096, 40, 8), (4, 700, 48, 8), (3, 1000, 70, 7), (2, 3, 2560, 32)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("beside", [0, 21, 48])
def test_group_norm_across_chunks(kind, B, N, C, groups, silu, beside, rng):
    x, gain, offset, dy = draw(rng, (B, N, C), (B, C), (B, C), (B, N, C))
    x += 3
    x, x2 = (np.ascontiguousarray(a) for a in np.split(x, [max(1, C - beside)], axis=2))
    x2 = x2 if beside else None
    dx, dx2 = blank(x.shape), None if x2 is None else blank(x2.shape)
    y, mean, rstd, dgain, doffset = map(blank, (dy.shape, *[(B, C)] * 4))
    _cpu.group_norm_forward(y, mean, rstd, x, x2, gain, offset, groups, 1e-5, silu)
    _cpu.group_norm_backward(dx, dx2, dgain, doffset, dy, x, x2, gain, offset, mean, rstd, groups, silu)
    x, x2, dy, gain, offset = wide(x, x2, dy, gain, offset)
    exact = REFERENCE["group_norm_forward"](x, gain, offset, groups, 1e-5, silu, x2)
    back = REFERENCE["group_norm_backward"](dy, x, gain, offset, *exact[1:], groups, silu, x2)
    for name, actual, reference in zip(("y", "mean", "rstd"), (y, mean, rstd), exact, strict=True):
        close(actual, reference, name)
    for name, actual, reference in zip(("dx", "dx2", "dgain", "doffset"), (dx, dx2, dgain, doffset), back, strict=True):
        if reference is not None:
            close(actual, reference, name)


@pytest.mark.parametrize(
    "B, heads, Lq, Lk, d, dv",
    [(1, 2, 200, 300, 40, 24), (2, 2, 150, 150, 33, 33), (1, 1, 1, 700, 160, 160), (1, 3, 700, 1, 8, 64)],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [None, (1, 1, 1), (0, 0, 1), (1, 1, 0)])
def test_attention_across_blocks(kind, B, heads, Lq, Lk, d, dv, causal, bias, rng):
    """bias: which of the axes heads, queries and keys it varies along; one key of it is hidden."""
    q, k, v, dy = draw(rng, (B, Lq, heads * d), (B, Lk, heads * d), (B, Lk, heads * dv), (B, Lq, heads * dv))
    added = None
    if bias is not None:
        (added,) = draw(rng, [n if on else 1 for n, on in zip((heads, Lq, Lk), bias, strict=True)])
        if added.shape[-1] > 1:
            added[..., Lk // 2] = -np.inf
    options = heads, 0.3, None if added is None else added.astype(np.float64), causal
    y, lse = REFERENCE["attention_forward"](*wide(q, k, v), *options)
    wanted = REFERENCE["attention_backward"](*wide(dy), y, lse, *wide(q, k, v), *options)
    with kernels(kind):
        got_y, got_lse = MODULES[kind].attention_forward(q, k, v, heads, 0.3, added, causal)
        got = MODULES[kind].attention_backward(dy, got_y, got_lse, q, k, v, heads, 0.3, added, causal)
    close(got_y, y, "y")
    close(got_lse, lse, "lse")
    for name, actual, reference in zip(("dq", "dk", "dv"), got, wanted, strict=False):
        # with a single key its weight is 1 whatever the query: terms of size 1 cancel in dq
        assert_close(actual, reference, condition=TOLERANCE, scale=1.0, name=name)


def test_attention_where_scores_are_far_apart(kind, rng):
    """A block whose largest score is below the ones before, and one above all: the sums are rescaled both ways."""
    q, k, v = draw(rng, (1, 3, 8), (1, 500, 8), (1, 500, 8))
    k *= np.repeat([1, 30, 0.1, 60, 2], 100)[None, :, None].astype(np.float32)
    exact, _ = REFERENCE["attention_forward"](*wide(q, k, v), 1, 1.0, None, False)
    y, _ = MODULES[kind].attention_forward(q, k, v, 1, 1.0, None, False)
    assert_close(y, exact, condition=100)  # scores near 100 are only known to 1e-5


def everything(rng):
    """Results of every kernel that sums, on shapes that are cut into several tasks, on every path of the kernels."""
    x, x2, w, dy = draw(rng, (6, 32, 32, 40), (6, 32, 32, 25), (3, 3, 65, 40), (6, 32, 32, 40))  # many tiles
    yield MODULES["cpu"].conv2d_forward(x, w, None, 1, SAME, x2)
    yield from MODULES["cpu"].conv2d_backward(dy, x, w, 1, SAME, x2)
    x, w, dy = draw(rng, (2, 20, 20, 3), (3, 3, 3, 40), (2, 20, 20, 40))  # im2col
    yield MODULES["cpu"].conv2d_forward(x, w, None, 1, SAME)
    yield from MODULES["cpu"].conv2d_backward(dy, x, w, 1, SAME)
    a, m, g = draw(rng, (60, 700), (700, 600), (60, 300))  # few rows
    y, z = MODULES["cpu"].linear_forward(a, m, None, None, "geglu", True)
    yield y
    yield from MODULES["cpu"].linear_backward(g, a, m, True, "geglu", z)
    x, w, dy = draw(rng, (3, 20, 20, 40), (3, 3, 40, 72), (3, 20, 20, 72))
    yield MODULES["cpu"].conv2d_forward(x, w, None, 1, SAME)
    yield from MODULES["cpu"].conv2d_backward(dy, x, w, 1, SAME)
    yield from MODULES["cpu"].conv2d_backward(dy[:, :10, :10].copy(), x, w, 2, SAME)
    a, m, g = draw(rng, (900, 70), (70, 50), (900, 50))
    yield MODULES["cpu"].linear_forward(a, m, None)[0]
    yield from MODULES["cpu"].linear_backward(g, a, m, True)
    flat = x.reshape(3, 400, 40)
    gain, offset, dflat = draw(rng, (1, 40), (1, 40), flat.shape)
    y, mean, rstd = MODULES["cpu"].group_norm_forward(flat, gain, offset, 8, 1e-5, True)
    yield y
    yield from MODULES["cpu"].group_norm_backward(dflat, flat, gain, offset, mean, rstd, 8, True)
    q, k, v, do = draw(rng, *[(2, 300, 24)] * 4)
    y, lse = MODULES["cpu"].attention_forward(q, k, v, 3, 0.3, None, False)
    yield y
    yield from MODULES["cpu"].attention_backward(do, y, lse, q, k, v, 3, 0.3, None, False)[:3]
    rows, gamma, beta, drows = draw(rng, (500, 33), (33,), (33,), (500, 33))
    y, mean, rstd = MODULES["cpu"].layer_norm_forward(rows, gamma, beta, 1e-5)
    yield y
    yield from MODULES["cpu"].layer_norm_backward(drows, rows, gamma, mean, rstd)
    yield np.float32(MODULES["cpu"].gradient_norm([x]))
    yield from MODULES["cpu"].orthogonalised(draw(rng, (300, 48), (48, 48), (20, 64), (50, 700)))


def all_bits():
    return [a.tobytes() for a in everything(np.random.default_rng(0)) if a is not None]


def test_the_number_of_threads_does_not_change_a_bit(kind, threads):
    results = []
    for n in (1, 2, 3, 2):
        threads(n)
        assert _cpu.num_threads() == n
        results.append(all_bits())
    assert all(r == results[0] for r in results)


def test_the_number_of_threads_may_change_while_kernels_run(threads):
    """Memory is laid out for as many threads as there were when a call began."""
    threads(1)
    x, w = draw(np.random.default_rng(0), (2, 16, 16, 320), (3, 3, 320, 320))
    wanted = MODULES["cpu"].conv2d_forward(x, w, None, 1, SAME)
    done, results = threading.Event(), []

    def call():
        while not done.is_set():
            results.append(np.array_equal(MODULES["cpu"].conv2d_forward(x, w, None, 1, SAME), wanted))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for i in range(60):
        set_num_threads((1, 12, 2, 7)[i % 4])
        time.sleep(0.005)
    done.set()
    for caller in callers:
        caller.join()
    assert results and all(results)


def test_several_python_threads_may_call_at_once(threads):
    threads(2)
    wanted, results = all_bits(), []
    callers = [threading.Thread(target=lambda: results.append(all_bits())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4 and all(r == wanted for r in results)


CHILD = """
import os, numpy as np
from minidiff import _cpu
from minidiff.backend import MODULES
_cpu.set_num_threads(2)
x = np.ones((300, 64), np.float32)
before = MODULES["cpu"].linear_forward(x, x.T[:, :40].copy(), None)[0]
if (pid := os.fork()) == 0:
    after = MODULES["cpu"].linear_forward(x, x.T[:, :40].copy(), None)[0]
    os._exit(0 if (after == before).all() else 1)
raise SystemExit(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_threads_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], check=True, timeout=60)


def test_the_number_of_threads_comes_from_the_environment():
    code = "from minidiff import _cpu; print(_cpu.num_threads())"
    environment = {**os.environ, "MINIDIFF_NUM_THREADS": "3"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert out.stdout == "3\n"
    with pytest.raises(ValueError, match="at least 1"):
        set_num_threads(0)


def test_the_reference_can_be_chosen_from_outside():
    code = "from minidiff.backend import active_kernels; print(active_kernels())"
    for wanted in ("reference", "cpu"):
        environment = {**os.environ, "MINIDIFF_KERNELS": wanted}
        out = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
        assert out.stdout == f"{wanted}\n"


# ---- arguments


def test_winograd_is_refused_where_it_cannot_serve():
    x, w = np.zeros((1, 5, 5, 4), np.float32), np.zeros((1, 2, 4, 8), np.float32)
    y = np.zeros((1, 5, 4, 8), np.float32)
    with pytest.raises(ValueError, match="algorithm"):
        _cpu.conv2d_forward(y, x, None, w, None, None, None, 1, ((0, 0), (0, 0)), 1, False, None, 4)


def test_nothing_is_prepared_where_the_direct_algorithm_serves():
    w, guarded = np.ones((3, 3, 8, 8), np.float32), np.full(4000, 7, np.float32)
    assert _cpu.conv2d_prepared_size(w, 1, 8, 8, 1, SAME, 1) == 0
    _cpu.conv2d_prepare(guarded[:0], w, 1, 8, 8, 1, SAME, 1)
    assert (guarded == 7).all()


def test_widths_of_0(kind):
    """What the reference answers: there is nothing to add up."""
    for x, w in (((7, 0), (0, 3)), ((7, 3), (3, 0)), ((2, 0, 4), (4, 3))):
        x, w = np.ones(x, np.float32), np.ones(w, np.float32)
        y, _ = MODULES[kind].linear_forward(x, w, None)
        assert y.shape == (*x.shape[:-1], w.shape[1]) and not y.any()
        dx, dw, db = MODULES[kind].linear_backward(np.ones_like(y), x, w, True)
        assert dx.shape == x.shape and dw.shape == w.shape and (db == y.size / max(1, w.shape[1])).all()
    assert MODULES[kind].geglu_forward(np.ones((4, 0), np.float32)).shape == (4, 0)


def test_an_instruction_set_that_is_not_here():
    with pytest.raises(ValueError, match="no kernels for the instruction set avx9"):
        _cpu.use_instruction_set("avx9")


@pytest.mark.parametrize("shape", list(itertools.product([0, 1], repeat=4)), ids=str)
def test_sizes_of_0_and_1(kind, shape):
    """No kernel reads past an array; gradients over nothing are zero."""
    B, H, W, C = shape
    x, w = np.ones(shape, np.float32), np.ones((1, 1, C, 3), np.float32)
    y = MODULES[kind].conv2d_forward(x, w, None, 1, ((1, 1), (1, 1)))
    assert y.shape == (B, H + 2, W + 2, 3) and y.sum() == 3 * x.sum()
    dx, _, dw, dshift = MODULES[kind].conv2d_backward(np.ones_like(y), x, w, 1, ((1, 1), (1, 1)))
    assert dx.shape == x.shape and (dx == 3).all()
    assert (dw == x.sum()).all() if C else dw.shape == w.shape
    assert (dshift == (H + 2) * (W + 2)).all()


def test_values_that_are_not_finite_pass_through(kind):
    """NaN is not lost in a comparison, nor in padding; infinity does not spread beyond its row."""
    x = np.array([-np.inf, -100, 0, 100, np.inf, np.nan], np.float32)
    for name in ("silu", "gelu_exact", "gelu_tanh", "gelu_quick"):
        y = blank(x.shape)
        _cpu.pointwise_forward(y, x, name)
        assert np.isnan(y[5]) and y[3] == 100 and y[4] == np.inf and y[2] == 0 and abs(y[1]) < 1e-30
    a = np.zeros((40, 20), np.float32)
    a[7, 3] = np.nan
    y, _ = MODULES[kind].linear_forward(a, np.ones((20, 5), np.float32), None)
    assert np.isnan(y[7]).all() and not np.isnan(np.delete(y, 7, axis=0)).any()


# ---- memory


def test_memory_is_handed_out_again():
    """At steady state the allocator asks the system for nothing, and what is freed is counted as free."""

    def step():
        arrays = [np.empty(n, np.float32) for n in (5000, 100_000, 3_000_000, 70_001)]
        for a in arrays:
            a.fill(1)
        return sum(float(a[-1]) for a in arrays)

    step()
    _cpu.reset_peak()
    before = _cpu.memory()
    for _ in range(5):
        assert step() == 4
    after = _cpu.memory()
    assert after["system_calls"] == before["system_calls"] and after["in_use"] == before["in_use"]
    needed = 4 * (5000 + 100_000 + 3_000_000 + 70_001)
    assert needed <= after["peak"] - before["in_use"] <= 1.13 * needed + 4 * 4096


def test_memory_grows_and_is_zeroed_on_request():
    full = np.full(100_000, 7, np.float32)
    del full
    assert not np.zeros(100_000, np.float32).any()
    a = np.arange(1000, dtype=np.float32)
    a.resize(200_000, refcheck=False)
    assert (a[:1000] == np.arange(1000)).all() and not a[1000:].any()
    _cpu.release_memory()
    assert _cpu.memory()["cached"] == 0
