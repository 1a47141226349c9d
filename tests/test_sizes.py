"""Every launch size that the rungs offer and small arrays do not reach, on a GPU and the emulator, which counts."""

import re
from math import ceil
from pathlib import Path

import pytest
from helpers import computing
from rungs import SIZES, draw, every_rung, launching, off_boundary, standing_on, wrong

from minidiff.backend import MODULES

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
BUILT = [MODULES[kind].module for kind in ("emulated", "checked", "cuda") if kind in MODULES]
if not BUILT:
    pytest.skip("no kernels in CUDA C++ are built here; see: minidiff doctor", allow_module_level=True)

LADDERS, RUNGS = BUILT[0].ladders(), every_rung(BUILT[0])

TILED = (
    "register_tiles", "vector_loads", "prefetched", "double_buffered", "tensor_cores", "pipelined", "shared_windows",
)  # fmt: skip
TILES = {  # rows, columns and threads of the tiles that csrc/cuda has instances for
    ("linear", "fp32"): {"LARGE": (128, 128, 256), "SMALL": (64, 64, 64)},
    ("linear", "bf16"): {"LARGE": (128, 128, 128), "SMALL": (64, 64, 128)},
    ("conv2d", "fp32"): {
        "LARGE": (128, 128, 256), "TALL": (256, 64, 256), "SMALL": (64, 64, 128), "NARROW": (128, 8, 64),
    },
    ("conv2d", "bf16"): {
        "LARGE": (128, 128, 128), "TALL": (256, 64, 128), "SMALL": (64, 64, 128), "NARROW": (128, 16, 128),
    },
}  # fmt: skip
TALL_OF_WEIGHTS = {"fp32": (128, 64, 128), "bf16": (192, 64, 128)}


class Watched:
    """An emulator's kernels, and what each of their calls launches."""

    def __init__(self, of, module):
        self.of, self.module, self.calls = of, module, []

    def __getattr__(self, name):
        def call(*args):
            self.module.reset_counts()
            result = getattr(self.of, name)(*args)
            self.calls.append((name, args, launches(self.module)))
            return result

        return call


def launches(module):
    """Since the last reset: what is counted of each kernel, by its name without parameters."""
    return {re.split("[(<]", name.lstrip("("))[0]: count for name, count in module.counts().items()}


@pytest.mark.parametrize(
    "size, rung", [pytest.param(s, rung, id=f"{s.case}, {s.name}-{rung}") for s in SIZES for rung in s.rungs]
)
def test_a_launch_size_is_right(cuda_kind, size, rung):
    """And it is the one that was meant, where launches are counted."""
    kind, module = cuda_kind
    coarse, watched = standing_on(module, size.case, rung), []

    def through(of):
        watched.append(Watched(of, module) if hasattr(module, "counts") else of)
        return watched[0]

    with launching(size, module):
        assert wrong(size, kind, coarse, through) <= 1
    if not hasattr(module, "counts"):
        return
    operands = "bf16" if LADDERS[size.case][rung - 1][3] == "bf16" else "fp32"  # tf32 has the tiles of fp32
    for op, args, launched in watched[0].calls:
        cut = products(op, args, 8 if operands == "bf16" else 1)
        if cut and cut.keys() <= size.tiles.keys():
            fitting = tiles_that_fit(size.case, operands, cut, launched)
            assert {*fitting} == {size.tiles[product] for product in cut}, (op, cut, launched)
    everything = {kernel for *_, launched in watched[0].calls for kernel in launched}
    assert rung != max(size.rungs) or everything >= {*size.kernels}, everything


def products(op, args, multiple):
    """What is cut into tiles by a call of an op: (how many, rows, columns) of each of its products.

    multiple: what the channels of a convolution's input are filled up to.
    """
    if op == "linear_forward":
        x, w = args[:2]
        return {"y": (1, len(x), w.shape[1])}
    if op == "linear_backward":
        _, x, w = args[:3]
        return {"dx": (1, len(x), len(w)), "dw": (1, *w.shape)}
    if op == "conv2d_forward":
        x, w, _, stride, sides, _, _, _, up, _ = args
        B, H, W = len(x), *((up * x.shape[1 + i] + sum(sides[i]) - w.shape[i]) // stride + 1 for i in (0, 1))
        return {"y": (min(up, H) * min(up, W), B * ceil(H / up) * ceil(W / up), w.shape[3])}
    if op == "conv2d_backward":
        _, x, w, stride, _, _, _, needs_dx, _ = args
        (B, H, W, _), (kh, kw, C, N) = x.shape, w.shape
        parts = min(stride, H) * min(stride, W), B * ceil(H / stride) * ceil(W / stride)
        return {"dx": (*parts, C)} if needs_dx else {"dw": (1, kh * kw * ceil(C / multiple) * multiple, N)}
    return {}


def tiles_that_fit(case, operands, cut, launched):
    """The sizes of tiles, by name, with which so many threads and blocks are launched for these products."""
    counted = [launched[kernel] for kernel in TILED if kernel in launched]
    threads, blocks, barriers, products = (
        sum(count[what] for count in counted) for what in ("threads", "blocks", "barriers", "collectives")
    )
    adding = sum(count["launches"] for kernel, count in launched.items() if kernel.startswith("add_"))
    of_bias = launched.get("sum_positions", {}).get("blocks", 1) > 1  # of one image, in parts that are added too
    tiles = TILES[case, operands]
    if case == "conv2d" and "dw" in cut:
        tiles = tiles | {"TALL": TALL_OF_WEIGHTS[operands]}
    for name, (rows, columns, of_threads) in tiles.items():
        needed = sum(number * ceil(M / rows) * ceil(N / columns) for number, M, N in cut.values())
        split = blocks >= 2 * needed and blocks % needed == 0 if adding > of_bias else blocks == needed
        if (operands, case) == ("bf16", "conv2d") and max(N for *_, N in cut.values()) <= 16:
            split = split and (name == "NARROW") == (products < 50 * barriers)
        if threads == of_threads * blocks and split:
            yield name


def test_every_tile_has_a_size():
    for case, tiles in (("linear", {"LARGE", "SMALL"}), ("conv2d", {"LARGE", "TALL", "SMALL", "NARROW"})):
        for product in ("y", "dx", "dw"):
            assert {size.tiles.get(product) for size in SIZES if size.case == case} - {None} == tiles, product


def test_every_width_has_a_size():
    """Kernels are compiled for some widths and take what is not wider: between any two of them something is tested."""
    of_heads = re.findall(r"rung >= (\d) && launch_fitting<([\d, ]+)>", (CUDA / "attention.cu").read_text())
    of_rows = [int(k) for k in re.findall(r"f\(Held<V, (\d+)>", (CUDA / "layernorm.cu").read_text())]
    assert len(of_heads) == 3 and len(of_rows) > 3
    wide = [("attention", int(rung), [int(w) for w in widths.split(",")], None) for rung, widths in of_heads]
    wide += [("layer_norm", 3, [32 * V * k for k in of_rows], V == 4) for V in (1, 4)]
    for case, rung, widths, vectors in wide:
        given = {w for s in SIZES if s.case == case and rung in s.rungs for w in s.widths}
        fitting = {w for w in given if vectors in (None, w % 4 == 0)}
        for least, most in zip([0, *widths], widths, strict=False):
            assert any(least < w <= most for w in fitting), (case, rung, least, most)


@pytest.mark.parametrize("rung, widths", [(5, (16, 32, 48, 64, 80, 96, 128, 160)), (4, (32, 64))])
def test_each_width_of_heads_is_a_kernel_of_its_own(cuda_kind, rung, widths):
    """The tensor cores multiply as often for all heads that one kernel takes, and more often for the next."""
    kind, module = cuda_kind
    if not hasattr(module, "counts"):
        pytest.skip("launches are counted on the emulator")
    module.choose("attention", rung)

    def products_of(d):
        with computing(kind, "fp32"):
            q, k, v = draw((1, 64, d), (1, 32, d), (1, 32, d))
        module.reset_counts()
        MODULES[kind].attention_forward(q, k, v, 1, 1.0, None, False)
        return launches(module)[{5: "forward_pipelined", 4: "forward_tensor_cores"}[rung]]["collectives"]

    counted = [products_of(width) for width in widths]
    assert counted == sorted(set(counted))
    assert counted == [products_of(width - 4) for width in widths]


@pytest.mark.parametrize(
    "case, rung, floats",
    [(*of, floats) for of in RUNGS if of[1] > 1 for floats in ((1, 2) if of[0] == "group_norm" else (1,))],
)
def test_arrays_off_the_boundaries_of_vectors(cuda_kind, case, rung, floats):
    kind, module = cuda_kind
    coarse = standing_on(module, case, rung)
    with off_boundary(floats):
        assert wrong(case, kind, coarse) <= 1


@pytest.mark.parametrize("floats", [1, 2])
def test_arrays_off_a_boundary_are_that(cuda_kind, floats):
    """Inputs and results."""
    kind, _ = cuda_kind
    if kind == "cuda":
        pytest.skip("CuPy's arrays begin on multiples of 512 bytes, whose views are taken alike")
    with off_boundary(floats), computing(kind, "fp32"):
        arrays = draw((3, 5), (5,), (5,))
        arrays.append(MODULES[kind].accumulate(*arrays[1:]))
    assert [a.ctypes.data % 16 for a in arrays] == [4 * floats] * 4
