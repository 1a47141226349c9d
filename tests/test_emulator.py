"""The CUDA emulator: every instruction against NumPy, every kind of mistake caught, no false alarm, the profile.

The kernels in tests/emulator are compiled here, with the emulator, in its fast and in its checked build.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "tests" / "emulator"
CXX = os.environ.get("CXX", "g++").split()[0]

if platform.system() != "Linux" or platform.machine() != "x86_64":
    pytest.skip("the emulator runs on Linux on x86-64 only", allow_module_level=True)
if not shutil.which(CXX):
    pytest.skip(f"there is no {CXX} here to compile kernels with", allow_module_level=True)

FLAGS = f"-std=c++17 -g -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -Werror -I{ROOT}/csrc/cuda "
FLAGS += f"-I{ROOT}/csrc/emulator -I{KERNELS} -x c++"
CHECKED = (
    "-fsanitize=thread -fsanitize=bounds -fsanitize-undefined-trap-on-error -fno-tree-sra -fno-tree-vectorize "
    "-fno-tree-slp-vectorize -fno-store-merging --param tsan-distinguish-volatile=1"
)
FILES = ("primitives", "right", "bugs")
BUILDS = ("fast", "checked")
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class KernelError(Exception):
    """What the emulator reported."""


class Library:
    """A compiled kernel file. Its functions take arrays, numbers and None; an error is raised as KernelError."""

    def __init__(self, path):
        self.c = ctypes.CDLL(str(path))
        self.path = path
        self.c.add_array.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
        self.c.remove_array.argtypes = [ctypes.c_void_p]
        self.c.profile_on.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.c.set_options.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
        self.c.set_options.argtypes += [ctypes.c_double, ctypes.c_uint64, ctypes.c_int]
        self.options()

    def options(self, order="forward", seed=1, poison=True, early_return=False, seconds=20, turns=10**6, shared=227):
        self.c.set_options(ORDERS[order], seed, poison, early_return, seconds, turns, shared << 10)

    def call(self, name, *arguments, undefined=()):
        """Run a host function with all arrays registered; `undefined` are those that hold nothing yet."""
        arrays = [(i, a) for i, a in enumerate(arguments) if isinstance(a, np.ndarray)]
        for i, a in arrays:
            empty = any(a is u for u in undefined)
            self.c.add_array(a.ctypes.data, a.nbytes, f"argument {i}".encode(), a.flags.writeable, empty)
        try:
            function = getattr(self.c, name)
            function.restype = ctypes.c_char_p
            error = function(*map(as_c, arguments))
        finally:
            for _, a in arrays:
                self.c.remove_array(a.ctypes.data)
        if error:
            raise KernelError(error.decode())

    def table(self, name, *arguments):
        function = getattr(self.c, name)
        function.restype = ctypes.c_char_p
        return [tuple(row.split("\t")[:-1]) for row in function(*arguments).decode().splitlines()]


def as_c(x):
    if isinstance(x, np.ndarray):
        return ctypes.c_void_p(x.ctypes.data)
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_void_p(None) if x is None else x


def compile_all(folder):
    """All kernels in both builds, as many compilers at once as there are cores."""
    runtime = [p for p in (ROOT / "csrc/emulator").glob("*.cpp") if p.stem != "module"] + [KERNELS / "module.cpp"]
    jobs = {folder / f"{f}-checked.o": (KERNELS / f"{f}.cu", CHECKED) for f in FILES}
    jobs |= {folder / f"{f}-fast.o": (KERNELS / f"{f}.cu", "") for f in FILES}
    jobs |= {folder / f"{source.stem}.o": (source, "") for source in runtime}

    def run(command):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda j: run([CXX, *FLAGS.split(), *j[1][1].split(), "-c", j[1][0], "-o", j[0]]), jobs.items()))
        objects = [folder / f"{source.stem}.o" for source in runtime]
        names = [f"{f}-{build}" for f in FILES for build in BUILDS]
        list(
            pool.map(
                lambda n: run([CXX, "-shared", "-o", folder / f"{n}.so", folder / f"{n}.o", *objects, "-lrt"]), names
            )
        )
    return {name: Library(folder / f"{name}.so") for name in names}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return compile_all(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(params=BUILDS)
def primitives(libraries, request):
    return libraries[f"primitives-{request.param}"]


@pytest.fixture(params=[f"{build}, {order}" for build in BUILDS for order in ORDERS])
def right(libraries, request):
    """The kernels without mistakes, in both builds under all schedules."""
    build, order = request.param.split(", ")
    library = libraries[f"right-{build}"]
    library.options(order, seed=3)
    yield library
    library.options()


@pytest.fixture
def checked(libraries):
    library = libraries["right-checked"]
    yield library
    library.c.skip(b"", 0)
    library.c.profile_off()
    library.options()


def aligned(a):
    """A copy that starts on a multiple of 256 bytes, as GPU memory does."""
    a = np.asarray(a)
    raw = np.empty(a.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    copy = raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def blank(*shape, dtype=np.float32):
    """What a kernel must overwrite wholly."""
    return aligned(np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 77, dtype))


def bf16(x):
    """float32 to bfloat16's bits, to the nearest, ties to even."""
    u = np.asarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


def tf32(x):
    return ((np.asarray(x, np.float32).view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


# ---- one instruction after the other


def test_indices(primitives):
    out = blank(12, 30, 6, dtype=np.int32)
    primitives.call("run_indices", out)
    z, y, x = np.unravel_index(np.arange(12), (2, 2, 3))
    tz, ty, tx = np.unravel_index(np.arange(30), (2, 3, 5))
    assert (out[:, :, 0].T == x).all() and (out[:, :, 1].T == y).all() and (out[:, :, 2].T == z).all()
    assert (out[:, :, 3] == tx).all() and (out[:, :, 4] == ty).all() and (out[:, :, 5] == tz).all()


@pytest.mark.parametrize("kind", ["int", "double"])
def test_shuffles(primitives, kind, rng):
    x = aligned(rng.integers(0, 1000, 64).astype(np.int32 if kind == "int" else np.float64))
    lane = np.arange(64)
    for width in (1, 2, 4, 8, 16, 32):
        part, inside = lane // width * width, lane % width
        for argument in (0, 1, 2, 3, 7, 16, 31):
            xor = lane ^ argument
            sources = [
                part + argument % width,
                np.where(xor < part + width, xor, lane),
                np.where(inside + argument < width, lane + argument, lane),
                np.where(inside >= argument, lane - argument, lane),
            ]
            for number, source in enumerate(sources):
                out = blank(64, dtype=x.dtype)
                primitives.call(f"run_shuffles_{kind}", out, x, number, argument, width)
                assert (out == x[source]).all(), (number, argument, width)


@pytest.mark.parametrize("threads, mask", [(64, 0xFFFFFFFF), (40, 0xFFFFFFFF), (64, 0x0FF0F00F), (64, 0x80000001)])
def test_votes_matches_and_reductions(primitives, threads, mask, rng):
    x = aligned(rng.integers(-5, 6, threads).astype(np.int32))
    out = blank(14, threads, dtype=np.uint32)
    primitives.call("run_votes", out, x, threads, ctypes.c_uint(mask))
    for first in range(0, threads, 32):
        lanes = [i for i in range(min(32, threads - first)) if mask >> i & 1]
        v = x[first:][lanes]
        got = out[:, first:][:, lanes]

        def bits(holds, lanes=lanes):
            return sum(1 << lane for lane, h in zip(lanes, holds, strict=True) if h)

        everyone = bits(v == v)
        same = bits(v == v) if len(set(np.trunc(v / 100))) == 1 else 0
        wanted = [bits(v > 0), (v > 3).any(), (v > -4).all(), [bits(v == one) for one in v], same]
        assert everyone == same
        wanted += [v.sum(), v.min(), v.max()]
        wanted += [f.reduce(v) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)]
        for row, value in enumerate(wanted):
            assert (got[row].astype(np.int64) == np.asarray(value).astype(np.int64) % 2**32).all(), row
    assert (out[11] == (x > 0).sum()).all() and (out[12] == (x > 3).any()).all() and (out[13] == (x > -4).all()).all()


def test_matrix_products(primitives, rng):
    formats = [(16, bf16, from_bf16), (16, lambda x: x.astype(np.float16), np.float32), (8, tf32, np.float32)]
    for kind, (depth, narrow, wide) in enumerate(formats):
        for identity in (False, True):
            a, b = rng.standard_normal((16, depth)), rng.standard_normal((depth, 8))
            if identity:
                b = np.eye(depth, 8)
            a, b = aligned(narrow(a.astype(np.float32))), aligned(narrow(b.astype(np.float32)))
            c, d = aligned(rng.standard_normal((16, 8)).astype(np.float32)), blank(16, 8)
            primitives.call("run_products", d, a, b, c, kind)
            a, b = (np.asarray(wide(x), np.float64) for x in (a, b))
            assert_close(d, a @ b + c, name=f"format {kind}")
            if identity:
                assert (d == (a[:, :8].astype(np.float32) + c)).all()


def test_tf32_ignores_the_lower_bits(primitives):
    a, b = np.zeros((16, 8), np.float32), np.eye(8, dtype=np.float32)
    a[:, :] = 1 + 2**-11
    d = blank(16, 8)
    primitives.call("run_products", d, aligned(a), aligned(b), aligned(np.zeros((16, 8), np.float32)), 2)
    assert (d == 1).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix(primitives, count, transposed, rng):
    x = aligned(rng.integers(0, 2**16, (count, 8, 8)).astype(np.uint16))
    out = blank(32, count, dtype=np.uint32)
    primitives.call("run_matrices", out, x, count, transposed)
    m = x.transpose(0, 2, 1) if transposed else x
    lane = np.arange(32)
    low, high = m[:, lane // 4, lane % 4 * 2], m[:, lane // 4, lane % 4 * 2 + 1]
    assert (out.T == (high.astype(np.uint32) << 16 | low)).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies(primitives, size, rng):
    x = aligned(rng.integers(0, 256, (64, size)).astype(np.uint8))
    for given in range(size + 1):
        out = blank(64, size, dtype=np.uint8)
        primitives.call("run_copies", out, x, size, given)
        assert (out[:, :given] == x[:, :given]).all() and not out[:, given:].any()


def test_no_source_is_read_for_zeros(primitives):
    out = blank(64, 16, dtype=np.uint8)
    primitives.call("run_copies", out, None, 16, 0)
    assert not out.any()


def test_copies_land_at_the_wait_of_their_group(libraries):
    library, x = libraries["primitives-fast"], aligned(np.arange(4, dtype=np.float32))
    for left, landed in ((0, 3), (1, 2), (2, 1), (-1, 4)):
        out = blank(4)
        library.call("run_landings", out, x, left)
        assert (out[:landed] == x[:landed]).all() and np.isnan(out[landed:]).all()


def test_atomics(primitives):
    n = 120
    names = ["f", "i", "least", "most", "bits", "inc", "dec", "swapped", "exchanged", "u", "d", "h", "b"]
    formats = ["f4", *["i4"] * 8, "u4", "f8", ("f2", 2), ("u2", 2)]
    totals = aligned(np.zeros(1, np.dtype({"names": names, "formats": formats}, align=True)))
    primitives.call("run_atomics", totals)
    t = totals[0]
    assert t["f"] == 0.75 * n and t["d"] == 0.5 * n and t["i"] == n * (n - 1) // 2 and t["u"] == 2**32 - n
    assert t["least"] == 1 - n and t["most"] == n - 1 and t["bits"] == 255 and t["exchanged"] == 7
    assert t["inc"] == n % 10 and t["dec"] == -n % 10 and t["swapped"] == 2 * n
    assert (t["h"] == [n, 2 * n]).all() and (from_bf16(t["b"]) == [n, 240]).all()


def test_small_floats(primitives, rng):
    special = [0, -0.0, 1, 65504, 65519, 65520, 1e6, -1e9, 6e-8, 2.98e-8, 2.99e-8, 6.1e-5, 1 + 2**-11, 1 + 3 * 2**-11]
    special += [np.inf, -np.inf, 3e38, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40]
    x = np.concatenate([special, rng.standard_normal(300) * 10.0 ** rng.integers(-9, 6, 300)]).astype(np.float32)
    y = rng.standard_normal(x.size).astype(np.float32)
    out = blank(12, x.size)
    primitives.call("run_small", out, aligned(x), aligned(y), x.size)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        hx, hy, bx, by = x.astype(np.float16), y.astype(np.float16), from_bf16(bf16(x)), from_bf16(bf16(y))
        wide_x, wide_y = hx.astype(np.float32), hy.astype(np.float32)
        wanted = [
            hx,
            bx,
            (wide_x + wide_y).astype(np.float16),
            from_bf16(bf16(bx * by)),
            (wide_x * 2 + 1).astype(np.float16),
            (wide_y * 2 - 1).astype(np.float16),
            from_bf16(bf16(bx * 3)),
            np.maximum(bx, by),
        ]
        for row, value in enumerate(wanted):
            assert np.array_equal(out[row], value.astype(np.float32), equal_nan=True), row
        assert_close(out[8][abs(x) < 20], np.exp2(x[abs(x) < 20].astype(np.float64)))
        finite = np.isfinite(x)
        assert (out[9] == tf32(x))[finite].all()
        assert (out[10].view(np.uint32) == (bf16(y).astype(np.uint32) << 16 | bf16(x)))[finite].all()
        half = hy.view(np.uint16).astype(np.uint32) << 16 | hx.view(np.uint16)
        assert (out[11].view(np.uint32) == half)[finite].all()


def test_integers(primitives, rng):
    x, y = (aligned((rng.integers(0, 2**32, 200) >> rng.integers(0, 32, 200)).astype(np.uint32)) for _ in range(2))
    x[:3] = 0, 1, 2**32 - 1
    out = blank(8, 200, dtype=np.uint32)
    primitives.call("run_integers", out, x, y, 200)
    for got, a, b in zip(out.T.tolist(), x.tolist(), y.tolist(), strict=True):
        low = 0 if not a else (a & -a).bit_length()
        bytes_ = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        permuted = int.from_bytes(bytes(bytes_[i] for i in (0, 4, 2, 6)), "little")
        shifted = ((b << 32 | a) << (b & 31) >> 32) & 0xFFFFFFFF
        reversed_ = int(f"{a:032b}"[::-1], 2)
        assert got == [a * b >> 32, reversed_, a.bit_count(), 32 - a.bit_length(), low, permuted, shifted, max(a, b)]


def test_constant_memory_vectors_and_printf(primitives, capfd):
    out, x = blank(4), aligned(np.arange(4, dtype=np.float32))
    primitives.call("run_constants", out, x)
    assert (out == x[::-1]).all()
    out, x = blank(32), aligned(np.arange(32, dtype=np.float32))
    primitives.call("run_vectors", out, x)
    assert (out == x).all()
    primitives.call("run_speaks")
    assert capfd.readouterr().out == "thread 3 speaks\n"


def test_shared_memory_of_templates(primitives, rng):
    x, out = aligned(rng.standard_normal(64).astype(np.float32)), blank(96)
    primitives.call("run_templated", out, x)
    assert (out[:64] == x[::-1]).all() and (out[64:] == x[31::-1]).all()


def test_the_schedules(primitives):
    orders = {}
    for order, seed in (("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)):
        primitives.options(order, seed=seed)
        out = blank(192, dtype=np.int32)
        primitives.call("run_order", out, aligned(np.zeros(1, np.int32)))
        assert sorted(out) == list(range(192))
        orders[order, seed] = out.tolist()
    primitives.options()
    assert orders["forward", 1] == list(range(192))
    assert orders["reverse", 1] == list(range(191, -1, -1))
    assert len(set(map(tuple, orders.values()))) == 4


def test_the_host_side_of_cuda(primitives):
    assert primitives.c.runtime_calls() == 0


# ---- kernels without mistakes


def groupnorm(library, rng, groups=3, n=200, threads=96):
    x, y = aligned(rng.standard_normal((groups, n)).astype(np.float32)), blank(groups, n)
    library.call("groupnorm", y, x, groups, n, threads, undefined=[y])
    z = x.astype(np.float64)
    z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
    return y, z / (1 + np.exp(-z))


def product(library, rng, M=70, N=65, K=33):
    a, b, c = *(aligned(rng.standard_normal(s).astype(np.float32)) for s in ((M, K), (K, N))), blank(M, N)
    library.call("product", c, a, b, M, N, K, undefined=[c])
    return c, a.astype(np.float64) @ b


def attention(library, rng, heads=2, n=50):
    q, k, v = (aligned(rng.standard_normal((heads, n, 32)).astype(np.float32)) for _ in range(3))
    out = blank(heads, n, 32)
    library.call("attention", out, q, k, v, heads, n, 32**-0.5, undefined=[out])
    scores = q.astype(np.float64) @ k.transpose(0, 2, 1) * 32**-0.5
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return out, p / p.sum(-1, keepdims=True) @ v


def tensor_product(library, rng, M=45, N=24, K=40):
    a, b = (aligned(bf16(rng.standard_normal(s))) for s in ((M, K), (K, N)))
    c = blank(M, N)
    library.call("tensor_product", c, a, b, M, N, K, undefined=[c])
    return c, from_bf16(a).astype(np.float64) @ from_bf16(b)


def last_block(library, rng, name="last_block"):
    x = aligned(rng.standard_normal(1000).astype(np.float32))
    total, parts = blank(1), blank(5)
    library.call(name, total, parts, aligned(np.zeros(1, np.uint32)), x, x.size, undefined=[total, parts])
    return total, x.astype(np.float64).sum(keepdims=True)


def half_warps(library, rng):
    x, out = aligned(rng.standard_normal(32).astype(np.float32)), blank(32)
    library.call("half_warps", out, x, undefined=[out])
    v = x[np.arange(32) ^ 5]
    return out, np.concatenate([v[:16] + v[:16][np.arange(16) ^ 1], v[16:] - v[16:][np.arange(16) ^ 2]])[::-1]


def spin_lock(library, rng):
    total = aligned(np.zeros(1, np.float32))
    library.call("spin_lock", aligned(np.zeros(1, np.int32)), total)
    return total, np.array([128.0])


NEEDLESS = {"last_block": "syncthreads();  // the last call's part"}
"""A barrier of a function that this kernel would not need: it has another in between."""

RIGHT = [groupnorm, product, attention, tensor_product, last_block, half_warps]


@pytest.mark.parametrize("kernel", [*RIGHT, spin_lock])
def test_right_kernels(right, kernel, rng):
    """They compute what they should, and nothing is reported, under every schedule."""
    actual, wanted = kernel(right, rng)
    assert_close(actual, wanted, condition=5)


def test_views_of_one_array(checked, rng):
    """A buffer may be a part of another, or start where it does."""
    x = aligned(rng.standard_normal((3, 200)).astype(np.float32))
    y = blank(3, 200)
    views = [(x, 400), (x[1], 80), (x, x.nbytes), (y, y.nbytes)]
    for view, size in views:
        assert not checked.c.add_array(view.ctypes.data, size, b"view", 1, 0)
    checked.call("groupnorm", y, x, 3, 200, 64)
    for view, _ in views:
        checked.c.remove_array(view.ctypes.data)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("kernel", RIGHT)
def test_every_barrier_is_missed(checked, kernel, rng):
    """Whichever barrier or wait is taken out, the checked build reports it, under every schedule."""
    checked.c.reset()
    kernel(checked, rng)
    text = (KERNELS / "right.cu").read_text().splitlines()
    needless = NEEDLESS.get(kernel.__name__, "none")
    points = [point for point in checked.table("sync_table") if needless not in text[int(point[2]) - 1]]
    expected = {"groupnorm": 2, "product": 2, "attention": 4, "tensor_product": 3, "last_block": 2, "half_warps": 3}
    assert len(points) == expected[kernel.__name__]
    for what, file, line, _times in points:
        checked.c.skip(file.encode(), int(line))
        for order in ORDERS:
            checked.options(order)
            with pytest.raises(KernelError, match=r"race|waited for|unwritten"):
                kernel(checked, rng)
                print(f"nobody notices that {what} at {file}:{line} is gone")
        checked.c.skip(b"", 0)
        checked.options()
    kernel(checked, rng)


def test_a_barrier_taken_out_of_the_text_is_missed_too(libraries, tmp_path, rng):
    """What skipping does at run time is what happens to a kernel that was written without the barrier."""
    text = (KERNELS / "right.cu").read_text()
    mark = "__syncthreads();\n    unsigned a[4]"
    assert text.count(mark) == 1
    source = tmp_path / "right.cu"
    source.write_text(text.replace(mark, mark.replace("__syncthreads();", "")))
    objects = [p for p in libraries["right-checked"].path.parent.glob("*.o") if "-" not in p.name]
    flags = [*FLAGS.split(), *CHECKED.split(), f"-I{KERNELS}"]
    subprocess.run([CXX, *flags, "-c", source, "-o", tmp_path / "right.o"], check=True)
    subprocess.run([CXX, "-shared", "-o", tmp_path / "right.so", tmp_path / "right.o", *objects, "-lrt"], check=True)
    with pytest.raises(KernelError, match=r"not waited for|race|unwritten"):
        tensor_product(Library(tmp_path / "right.so"), rng)


@pytest.mark.parametrize("name", ["last_block_unfenced", "last_block_fenced_early"])
def test_a_flag_without_a_fence_orders_nothing(checked, name, rng):
    with pytest.raises(KernelError, match=r"race \(read after write\).*nothing that orders the two blocks"):
        last_block(checked, rng, name)


def test_launches_are_counted(checked, rng):
    checked.c.reset()
    for _ in range(2):
        groupnorm(checked, rng, threads=64)
    [(kernel, launches, blocks, threads, barriers, collectives, _switches)] = checked.table("count_table")
    assert (kernel, launches, blocks, threads) == ("groupnorm_silu", "2", "6", str(6 * 64))
    assert barriers == str(6 * 4) and collectives == str(6 * 2 * 2 * 10)


# ---- mistakes

FAST_TOO = "seen without the checked build"
EITHER = r"race \((read after write|write after read)\)|copy not waited for|read of unwritten memory"
"""Whichever comes first under the schedule."""

BUGS = [
    # name, what is said, the length of the array (floats), flags
    ("divergent_barrier", "barrier divergence", 128, FAST_TOO),
    ("early_return", "barrier divergence.*28 threads returned", 128, FAST_TOO),
    ("shuffle_in_branch", "deadlock", 64, FAST_TOO),
    ("shuffle_outside_mask", "warp divergence.*reads lane 20", 64, FAST_TOO),
    ("not_in_mask", "warp divergence.*not in the mask itself", 32, FAST_TOO),
    ("returned_lanes", "warp divergence.*have returned|deadlock", 32, FAST_TOO),
    ("read_too_early", EITHER, 64, ""),
    ("written_too_early", EITHER, 64, ""),
    ("written_twice", r"race \(write after write\)", 16, ""),
    ("race_in_warp", EITHER, 32, ""),
    ("half_synced", EITHER, 32, ""),
    ("bytes_race", EITHER, 64, ""),
    ("unwritten_shared", "read of unwritten memory.*shared memory s \\+ 252", 64, ""),
    ("left_by_last_block", "read of unwritten memory.*dynamic shared memory", 128, ""),
    ("past_dynamic", "out of bounds.*0 bytes past the end of dynamic shared memory", 32, ""),
    ("far_past_dynamic", "out of bounds", 32, FAST_TOO),
    ("past_static", "out of bounds", 32, ""),
    ("past_pointer", r"out of bounds.*0 bytes past the end of s \(160 bytes\)", 32, ""),
    ("past_local", "out of bounds.*index beyond an array", 32, ""),
    ("past_global", r"out of bounds.*\d bytes past the end of argument 0", 300, ""),
    ("before_global", "out of bounds.*4 bytes before the start of argument 0", 64, ""),
    ("null_pointer", "out of bounds|null pointer", 32, FAST_TOO),
    ("blocks_race", "race.*nothing that orders the two blocks", 32, ""),
    ("threads_race", "race", 32, ""),
    ("mixed_with_atomics", "race", 32, ""),
    ("writes_input", "write to read-only memory", 32, "read-only"),
    ("reads_output", "read of unwritten memory", 32, "undefined"),
    ("misaligned_vector", "misaligned", 200, ""),
    ("others_local", "out of bounds.*another thread's local memory", 32, ""),
    ("copy_not_waited", "copy not waited for", 64, ""),
    ("copy_of_last_group", "copy not waited for", 96, ""),
    ("copy_not_committed", "copy not waited for", 64, ""),
    ("copy_without_barrier", EITHER, 128, ""),
    ("copy_before_read", EITHER, 128, ""),
    ("copy_never_waited", "copy never waited for", 32, ""),
    ("copy_past_source", "out of bounds", 300, ""),
    ("copy_misaligned", "misaligned", 64, FAST_TOO),
    ("copy_to_global", "destination is not in shared memory", 64, FAST_TOO),
    ("ldmatrix_misaligned", "misaligned", 32, FAST_TOO),
    ("ldmatrix_of_global", "row is not in shared memory", 128, FAST_TOO),
    ("ldmatrix_too_early", EITHER, 32, ""),
    ("product_in_half", "warp divergence.*have returned|deadlock", 32, FAST_TOO),
    ("product_on_two_lines", "warp divergence.*in another line", 32, FAST_TOO),
    ("deep_stack", "stack has overflowed", 32, FAST_TOO),
    ("division", "division by zero", 32, FAST_TOO),
    ("asserts", r"assert at .*failed: p\[threadIdx.x\] < 20", 32, FAST_TOO),
    ("traps", "__trap", 32, FAST_TOO),
]


def lines_of(name):
    """The lines of a planted bug: where it must be seen, and what it may conflict with."""
    text = (KERNELS / "bugs.cu").read_text().splitlines()
    marked = name.replace("far_", "")
    start = next(i for i, line in enumerate(text) if re.search(rf"__global__ void {marked}\(", line))
    if name == "past_pointer":
        start -= 3
    lines = {"here": [], "there": []}
    for i in range(start, len(text)):
        if text[i].startswith("FUNCTION"):
            return lines
        for word in lines:
            if re.search(rf"//.*\b{word}\b", text[i]):
                lines[word].append(i + 1)


def run_bug(library, name, size, flags):
    a = np.arange(size, dtype=np.float32)
    a = aligned(a.astype(np.int32) if name == "division" else a)
    a.flags.writeable = flags != "read-only"
    if name == "reads_output":
        library.call("run_reads_output", a, blank(size), undefined=[a])
    else:
        library.call(f"run_{name}", a)


@pytest.mark.parametrize("name, says, size, flags", BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_caught(libraries, name, says, size, flags):
    """With the kernel, the line and the thread, under every schedule; in the fast build where it can be seen."""
    where = lines_of(name)
    for build in ("fast", "checked") if flags == FAST_TOO else ("checked",):
        library = libraries[f"bugs-{build}"]
        for order in ORDERS:
            library.options(order)
            with pytest.raises(KernelError) as caught:
                run_bug(library, name, size, flags)
            said = str(caught.value)
            assert re.search(says, said, re.DOTALL), said
            assert name.replace("far_", "") in said and "launched with grid" in said, said
            named = {int(line) for line in re.findall(r"bugs\.cu:(\d+)", said)}
            assert named & set(where["here"] + where["there"]), (said, where)
            if where["there"] and re.match("race|copy not waited", said):
                assert named & set(where["here"]) and named & set(where["there"]), (said, where)
            assert re.search(r"thread(s)? \(?\d+", said), said
            library.options()
        library.call("run_fine", blank(1))


def test_both_places_of_a_race_are_named(libraries):
    with pytest.raises(KernelError) as caught:
        run_bug(libraries["bugs-checked"], "written_too_early", 64, "")
    here, there = (lines_of("written_too_early")[k][0] for k in ("here", "there"))
    assert str(caught.value) == (
        "race (read after write) in written_too_early: 4-byte read of shared memory s + 128 at "
        f"bugs.cu:{there} by thread (59, 0, 0) of block (0, 0, 0); thread (32, 0, 0) of block (0, 0, 0) wrote it at "
        f"bugs.cu:{here}, with no barrier in between\n  launched with grid (1, 1, 1), block (64, 1, 1), 0 bytes of "
        "dynamic shared memory"
    )


def test_poison_shows_what_the_fast_build_cannot_report(libraries):
    library = libraries["bugs-fast"]
    for name, size, bad in (("unwritten_shared", 64, slice(63, 64)), ("copy_not_waited", 64, slice(32, 64))):
        a = aligned(np.zeros(size, np.float32))
        library.call(f"run_{name}", a)
        assert np.isnan(a[bad]).all(), name


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", ["spins", "waits_for_spinner"])
def test_the_watchdog(libraries, build, name):
    """A kernel that never ends is given up: after many turns in vain, or some seconds without any."""
    library = libraries[f"bugs-{build}"]
    library.options(seconds=0.5, turns=1000)
    a = aligned(np.zeros(1, np.float32))
    with pytest.raises(KernelError, match=f"no progress in {name}") as caught:
        library.call(f"run_{name}", a)
    library.options()
    said, where = str(caught.value), lines_of(name)
    for line in where["here"] + where["there"]:
        assert f"bugs.cu:{line}" in said, said
    library.call("run_fine", a)


@pytest.mark.parametrize("build", BUILDS)
def test_a_launch_that_cannot_be(libraries, build):
    library, a = libraries[f"bugs-{build}"], blank(32)
    library.call("run_both_kinds", a)  # more than 48 KiB, which LAUNCH asks for
    assert (a == 2).all()
    invalid = "invalid launch configuration of"
    for name, words in (
        ("too_many_threads", rf"{invalid} nothing: .*between 1 and 1024 threads.*block \(2048, 1, 1\)"),
        ("too_much_shared", r"nothing: .*at most 232448 bytes of shared memory.*245760 bytes"),
        ("too_much_together", rf"{invalid} both_kinds<8192>: .*at most 232448 bytes.*take 8192.*229376 bytes"),
        ("not_asked", rf"{invalid} both_kinds: without cudaFuncSetAttribute.*at most 49152 bytes.*take 16384"),
        ("no_blocks", rf"{invalid} nothing: .*between 1 and 2147483647 blocks.*grid \(0, 1, 1\)"),
    ):
        with pytest.raises(KernelError, match=words):
            library.call(f"run_{name}", a)
    library.options(shared=99)
    with pytest.raises(KernelError, match="at most 101376 bytes"):
        library.call("run_too_much_shared", a)
    library.options()


def test_a_kernels_fault_is_not_blamed_on_the_next_kernel(libraries):
    """CUDA tells of a fault at the next call, which may be the launch of another kernel."""
    library = libraries["bugs-fast"]
    earlier = "in this kernel or in one before it: CUDA_LAUNCH_BLOCKING=1 tells in which"
    library.call("run_check", 0)
    for error in (700, 702, 710, *range(714, 720)):  # an illegal address, a timeout, an assert, .. any other failure
        with pytest.raises(KernelError, match=rf"nothing: .*, {earlier}; launched with grid \(1, 1, 1\)"):
            library.call("run_check", error)
    for error in (1, 2, 9, 101):  # what a launch itself is refused for
        with pytest.raises(KernelError, match=r"nothing: .*launched with grid") as caught:
            library.call("run_check", error)
        assert earlier not in str(caught.value)


@pytest.mark.parametrize(
    "dynamic, static, allowed, wanted",
    [
        (32, 16, 48, False),  # all that every kernel has
        (40, 16, 48, True),  # where `allowed` counts the static memory in
        (40, 16, 32, True),  # where it does not
        (64, 0, 48, True),
        (64, 16, 64, False),  # asked for before
        (60, 16, 64, False),
        (80, 16, 64, True),
    ],
)
def test_when_shared_memory_is_asked_for(libraries, dynamic, static, allowed, wanted):
    assert libraries["bugs-fast"].c.must_ask(dynamic << 10, static << 10, allowed << 10) == wanted


def test_a_line_without_a_barrier_cannot_be_skipped(checked, rng):
    """A line that has moved must not pass for a barrier that is not missed."""
    groupnorm(checked, rng)
    [line, *_] = [int(line) for _, _, line, _ in checked.table("sync_table")]
    checked.c.skip.restype = ctypes.c_char_p
    assert checked.c.skip(b"right.cu", line) is None
    for file, other in ((b"right.cu", 1), (b"wrong.cu", line)):
        said = f"no kernel that ran has synchronised at {file.decode()}:{other}; sync_points() lists where"
        assert checked.c.skip(file, other).decode() == said


def test_early_returns_can_be_allowed(libraries):
    library, a = libraries["bugs-checked"], blank(128)
    library.options(early_return=True)
    library.call("run_early_return", a)
    library.options()
    assert not a[:100].any() and np.isnan(a[100:]).all()


def test_two_python_threads(libraries, rng):
    """Launches of several threads, and failures among them, do not disturb one another."""
    wrong = []

    def work(seed):
        mine = np.random.default_rng(seed)
        for i in range(10):
            actual, wanted = (product, attention, groupnorm)[i % 3](libraries["right-fast"], mine)
            if not abs(actual - wanted).max() < 1e-3:
                wrong.append(i)
            with pytest.raises(KernelError):
                run_bug(libraries["bugs-fast"], "early_return", 128, "")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ---- the profile


def test_the_profile_counts_what_one_counts_by_hand(checked):
    x, out = aligned(np.arange(33 * 32, dtype=np.float32)), blank(64)
    checked.c.profile_on(2, 0)
    checked.call("run_patterns", out, x, 10, undefined=[out])
    checked.c.profile_off()
    rows = {}
    for kernel, file, line, memory, way, width, *numbers in checked.table("profile_table"):
        assert kernel == "patterns" and file == "right.cu"
        rows[int(line), memory, way, int(width)] = tuple(map(int, numbers))
    text = (KERNELS / "right.cu").read_text().splitlines()

    def of(comment, memory, way="load", width=4):
        line = next(i for i, t in enumerate(text, 1) if t.endswith(f"// {comment}"))
        return rows[line, memory, way, width]

    # requests, transactions (sectors of 32 bytes, or passes over the banks), ideal
    assert of("coalesced", "global") == (1, 4, 4)
    assert of("strided", "global") == (1, 32, 4)
    assert of("shifted", "global") == (1, 5, 4)
    assert of("same", "global") == (1, 1, 1)
    assert of("wide", "global", width=16) in [(1, 16, 16)]
    assert of("no conflict", "shared") == (1, 1, 1)
    assert of("all in one bank", "shared") == (1, 32, 1)
    assert of("padded", "shared") == (1, 1, 1)
    assert of("two in a bank", "shared") == (1, 2, 1)
    assert of("broadcast", "shared") == (1, 1, 1)
    assert of("some lanes", "global", "store") == (1, 2, 2)
    line = next(i for i, t in enumerate(text, 1) if t.endswith("// strided"))
    records = checked.table("access_table", b"right.cu", line, 0, 0)
    assert records == [("0", str(i), str(32 * i)) for i in range(32)]
    filling = next(i for i, t in enumerate(text, 1) if "s[k] = in[k]" in t)
    assert rows[filling, "shared", "store", 4] == (33, 33, 33)
    assert len(checked.table("access_table", b"right.cu", filling, 1, 1)) == 64  # of 33 requests the first 2


def test_ldmatrix_and_copies_are_in_the_profile(checked, rng):
    checked.c.profile_on(0, 0)
    tensor_product(checked, rng, M=32, N=16, K=16)
    checked.c.profile_off()
    text = (KERNELS / "right.cu").read_text().splitlines()
    rows = {(int(r[2]), r[3], r[4]): tuple(map(int, r[6:])) for r in checked.table("profile_table")}
    line = {w: next(i for i, t in enumerate(text, 1) if w in t) for w in ("ldmatrix(a", "cp_async<16>(&As")}
    # 4 warps load 4 matrices of 8 rows; rows are 32 bytes apart: 8 rows fall on 16 banks twice
    assert rows[line["ldmatrix(a"], "shared", "load"] == (4, 32, 16)
    assert rows[line["cp_async<16>(&As"], "global", "load"] == (2, 32, 32)
    assert rows[line["cp_async<16>(&As"], "shared", "store"] == (2, 8, 8)


# ---- the other compiler


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not here: the kernels are compiled for the CPU only")
@pytest.mark.parametrize("file", FILES)
def test_nvcc_compiles_the_same_files(file, tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_80", f"-I{ROOT}/csrc/cuda", "-c", KERNELS / f"{file}.cu"]
    done = subprocess.run([*command, "-o", tmp_path / "k.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
