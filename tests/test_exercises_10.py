"""The checkers of notebook 10 take right answers, and say of wrong ones what is wrong; so do its helpers."""

import json

import numpy as np
import pytest
from course import NEEDS
from drawing_10 import gpu_results
from emulator_10 import KernelError, cu_source, refusal, report, unwritten, write
from exercises import n10_cuda_kernel as check
from solutions import n10_cuda_kernel as solution

runs_kernels = pytest.mark.skipif(not NEEDS["emulator"][0](), reason="needs the emulator and a C++ compiler")
BARRIER = "    __syncthreads();"
BEFORE, AFTER = (line for line in solution.SMOOTH.splitlines() if line.startswith(BARRIER))


@runs_kernels
def test_solutions_are_right():
    assert check.barriers(solution.SMOOTH).right
    assert check.coalesced(solution.ADD_BIAS).right
    assert check.swizzle(solution.place).right


@pytest.mark.parametrize("checker", (check.barriers, check.coalesced))
@pytest.mark.parametrize("answer, told", [(..., "..."), (None, "..."), (3, "this is a int")])
def test_no_kernel_is_told_so(checker, answer, told):
    verdict = checker(answer)
    assert not verdict.right and told in verdict.message


def test_without_a_compiler_the_checkers_say_so(monkeypatch):
    monkeypatch.setitem(NEEDS, "emulator", (lambda: False, *NEEDS["emulator"][1:]))
    verdict = check.barriers(solution.SMOOTH)
    assert not verdict.right and "not here" in verdict.message


def changed(text, old, new):
    assert old in text
    return text.replace(old, new)


@runs_kernels
@pytest.mark.parametrize(
    "old, new, told",
    [
        (f"{BEFORE}\n", "", "nothing says that it is written"),
        (f"{AFTER}\n", "", "still have to read it"),
        (AFTER, "    __syncwarp();", "still have to read it"),
        (BEFORE, "    if (t < 127) __syncthreads();", "nothing says that it is written"),
        (BEFORE, "    if (t == 127) return;\n    __syncthreads();", "none may pass it by"),
        ("ring[t] = mean;", "ring[t] = mean * 2;", "the numbers are wrong"),
        ("(t + 1) % 128", "t + 1", "cannot run like this"),
        ("  y[t] = ring[t];", "  if (t) y[t] = ring[t];", "not written"),
        ("float mean", "flot mean", "the compiler says: cell.cu:7"),
        ("int rounds", "int rounds, int more", "must have 3 parameters"),
        ("void smooth", "void smoother", "there is no kernel smooth"),
        ("__global__ ", "", "there is no kernel in it"),
    ],
)
def test_wrong_barriers(old, new, told):
    verdict = check.barriers(changed(solution.SMOOTH, old, new))
    assert not verdict.right and told in verdict.message


GIVEN = r"""
__global__ void add_bias(const float* x, const float* b, float* y, int N, int C) {
  int n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n < N)
    for (int c = 0; c < C; c++) y[n * C + c] = x[n * C + c] + b[c];
}
"""


@runs_kernels
@pytest.mark.parametrize(
    "answer, told",
    [
        (GIVEN, "sectors where x and y have 1,200"),
        (changed(solution.ADD_BIAS, "b[i % C]", "b[i / C]"), "the emulator says"),
        (changed(solution.ADD_BIAS, "b[i % C]", "b[i % C / 2]"), "the numbers are wrong"),
        (changed(solution.ADD_BIAS, "; i += gridDim.x * blockDim.x", "; i += N * C"), "of y are not written"),
        (changed(solution.ADD_BIAS, "i < N * C", "i <= N * C"), "out of bounds"),
    ],
)
def test_wrong_accesses(answer, told):
    verdict = check.coalesced(answer)
    assert not verdict.right and told in verdict.message


@runs_kernels
def test_another_right_way_to_coalesce():
    by_rows = """
__global__ void add_bias(const float* x, const float* b, float* y, int N, int C) {
  for (int n = blockIdx.x; n < N; n += gridDim.x)
    for (int c = threadIdx.x; c < C; c += blockDim.x) y[n * C + c] = x[n * C + c] + b[c];
}
"""
    assert check.coalesced(by_rows).right


@pytest.mark.parametrize(
    "answer",
    [
        lambda row, column: row * 32 + (row + column) % 32,
        lambda row, column: np.int64(row * 32 + (column ^ (31 - row))),
    ],
)
def test_other_right_swizzles(answer):
    assert check.swizzle(answer).right


@pytest.mark.parametrize(
    "answer, told",
    [
        (lambda row, column: ..., "..."),
        (lambda row, column: None, "..."),
        (lambda row, column: row * 32 + column, "Reading column 0 takes 32 passes"),
        (lambda row, column: column * 32 + row, "Reading row 0 takes 32 passes"),
        (lambda row, column: row * 32 + (column ^ row % 8), "Reading column 0 takes 4 passes"),
        (lambda row, column: row * 33 + column, "no padding"),
        (lambda row, column: row - 32, "no padding"),
        (lambda row, column: column ^ row, "would hold two numbers, those of (0, 0) and (1, 1)"),
        (lambda row, column: row * 32 + column / 1, "you return a float"),
        (lambda row, column: row.nothing, "AttributeError"),
        (lambda row: 0, "TypeError"),
    ],
)
def test_wrong_swizzles(answer, told):
    verdict = check.swizzle(answer)
    assert not verdict.right and told in verdict.message


@runs_kernels
def test_a_report_quotes_the_lines_of_the_cell():
    kernel = write("\n__global__ void f(float* y, int n) {\n  y[threadIdx.x] = n;\n}\n")
    y = unwritten(8)
    kernel.launch("f", 1, 8, y, 3)
    assert (y == 3).all() and kernel.traffic.bytes(store=True) == 32 and kernel.traffic.bytes(store=False) == 0
    told = refusal(kernel, "f", 1, 9, y, 3)
    assert "out of bounds" in told and told.endswith("  2    y[threadIdx.x] = n;")
    assert refusal(kernel, "f", 1, 8, y, 4) == "The emulator reports nothing." and (y == 4).all()
    assert report(kernel, KernelError("no line")) == "no line"
    with pytest.raises(KernelError, match="every parameter"):
        write("__global__ void f(float*) {}")


@pytest.mark.parametrize("file, name, told", [
    ("reduce.cuh", "warp_sum", "// In every lane the sum"),
    ("linear.cu", "coalesced", "// As naive"),
    ("linear.cu", "Corner", "struct Corner {"),
])  # fmt: skip
def test_source_is_shown_with_its_comment(file, name, told, monkeypatch):
    shown = []
    monkeypatch.setattr("emulator_10._markdown", shown.append)
    cu_source(file, name)
    assert told in shown[0] and shown[0].endswith(("}\n```", "};\n```"))
    with pytest.raises(ValueError, match="there is no nothing"):
        cu_source(file, "nothing")


def test_results_of_gpus_are_found(tmp_path):
    folder = tmp_path / "benchmarks" / "results" / "some-gpu"
    folder.mkdir(parents=True)
    assert gpu_results(tmp_path, ["linear_forward"])[1] == {}
    row = {"op": "linear_forward", "shape": "(2, 3) (3, 4)", "way": "1 naive", "ms": 0.125, "p20": 0.12, "p80": 0.13}
    rows = [
        row | {"share": 0.5},
        {"op": "linear_forward", "shape": "", "way": "2", "failed": "x"},
        row | {"op": "other"},
    ]
    (folder / "ops.json").write_text(json.dumps({"device": "Some GPU", "rows": rows}))
    header, found = gpu_results(tmp_path, ["linear_forward"])
    assert found == {"Some GPU": [["linear", "(2, 3) (3, 4)", "1 naive", "0.125 (0.12 to 0.13)", "50%"]]}
    assert len(header) == 5
