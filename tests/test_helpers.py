"""The tests' own tools notice a fault: in a kernel, in a comparison, in a gradient."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TOLERANCES, assert_close, check_op

from minidiff import kernels, ops
from minidiff.backend import MODULES, REFERENCE, fallbacks

OPS = {
    "silu_backward": (ops.silu, lambda x: x / (1 + np.exp(-x)), [(3, 5)]),
    "softmax_backward": (
        ops.softmax,
        lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True),
        [(3, 5)],
    ),
    "linear_backward": (ops.linear, lambda x, w, b: x @ w + b, [(3, 5), (5, 4), (4,)]),
    "conv2d_backward": (
        lambda x, w, b: ops.conv2d(x, w, b, padding=((0, 0), (0, 0))),
        lambda x, w, b: x @ w[0, 0] + b,
        [(2, 3, 4, 3), (1, 1, 3, 5), (5,)],
    ),
    "silu_forward": (ops.silu, lambda x: x / (1 + np.exp(-x)), [(3, 5)]),
    "linear_forward": (ops.linear, lambda x, w, b: x @ w + b, [(3, 5), (5, 4), (4,)]),
}


def zeroed(a):
    a[...] = 0


def one_nan(a):
    a.flat[-1] = np.nan


def one_inf(a):
    a.flat[0] = np.inf


def two_swapped(a):
    a.flat[0], a.flat[1] = a.flat[1], a.flat[0]


def last_doubled(a):
    a.flat[-1] *= 2


def plant(monkeypatch, name, fault):
    """A kind of kernels, "faulty", whose kernel of this name has the fault in its first result."""

    def kernel(*args):
        results = REFERENCE[name](*args)
        first = results[0] if isinstance(results, tuple) else results
        if first is not None and first.dtype.name in ("float64", "float32"):
            fault(first)
        return results

    monkeypatch.setitem(MODULES, "faulty", SimpleNamespace(**{name: kernel}))


@pytest.mark.parametrize("fault", [None, zeroed, one_nan, one_inf, two_swapped, last_doubled])
@pytest.mark.parametrize("dtypes", [(), ("float32",)])
@pytest.mark.parametrize("name", OPS)
def test_check_op_notices_a_faulty_kernel(name, dtypes, fault, monkeypatch, rng):
    op, formula, shapes = OPS[name]
    arrays = [rng.standard_normal(s) for s in shapes]
    plant(monkeypatch, name, fault or (lambda a: None))
    with kernels("faulty"):
        if fault is None:
            check_op(op, formula, *arrays, dtypes=dtypes)
        else:
            with pytest.raises(AssertionError):
                check_op(op, formula, *arrays, dtypes=dtypes)
    assert name not in fallbacks("faulty") and len(fallbacks("faulty")) == len(REFERENCE) - 1


@pytest.mark.parametrize("name", ["silu_backward", "linear_backward", "conv2d_backward"])
@pytest.mark.parametrize("fault", [zeroed, one_nan, two_swapped])
def test_check_op_notices_a_fault_in_single_precision_only(name, fault, monkeypatch, rng):
    op, formula, shapes = OPS[name]
    plant(monkeypatch, name, lambda a: fault(a) if a.dtype == np.float32 else None)
    with kernels("faulty"), pytest.raises(AssertionError):
        check_op(op, formula, *(rng.standard_normal(s) for s in shapes), dtypes=("float32",))


@pytest.mark.parametrize("harm", ["input", "cotangent"])
def test_check_op_notices_a_kernel_that_writes_into_its_arguments(harm, monkeypatch, rng):
    def kernel(dy, x):
        dx = REFERENCE["silu_backward"](dy, x)
        (dy if harm == "cotangent" else x)[...] += 1
        return dx

    monkeypatch.setitem(MODULES, "faulty", SimpleNamespace(silu_backward=kernel))
    with kernels("faulty"), pytest.raises(AssertionError, match=r"written into|wrong gradient"):
        check_op(*OPS["silu_backward"][:2], rng.standard_normal((3, 5)))


def test_check_op_notices_another_dtype(monkeypatch, rng):
    widening = SimpleNamespace(silu_forward=lambda x: REFERENCE["silu_forward"](x) + np.zeros(1))
    monkeypatch.setitem(MODULES, "faulty", widening)
    with kernels("faulty"), pytest.raises(AssertionError, match="dtype"):
        check_op(*OPS["silu_forward"][:2], rng.standard_normal((3, 5)))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_assert_close(dtype):
    reference = np.array([[1.0, -2.0], [0.0, 4.0]])
    within, beyond = 0.5 * 4 * TOLERANCES[dtype], 2 * 4 * TOLERANCES[dtype]
    assert_close(reference + within, reference, dtype)
    assert_close(reference + beyond, reference, dtype, condition=3)
    assert_close(reference * 0 + within, reference * 0, dtype, scale=4)
    for wrong in (reference + beyond, reference - beyond, reference[0], reference.T, 0 * reference):
        with pytest.raises(AssertionError):
            assert_close(wrong, reference, dtype)
    for bad in (np.nan, np.inf):
        spoilt = reference.copy()
        spoilt[1, 0] = bad
        for actual, wanted in [(spoilt, reference), (reference, spoilt), (spoilt, spoilt)]:
            with pytest.raises(AssertionError, match="not finite"):
                assert_close(actual, wanted, dtype)


def test_only_built_kernels_can_be_active():
    with pytest.raises(ValueError, match=r"no 'abacus' kernels.*built: reference"), kernels("abacus"):
        pass
