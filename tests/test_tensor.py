"""Autograd: gradients add up, the graph is freed on the way, faults are named; gradcheck notices faults."""

import gc
import re
import tracemalloc
import weakref

import numpy as np
import pytest
from helpers import assert_close

from minidiff import Tensor, no_grad, ops
from minidiff.backend import REFERENCE
from minidiff.gradcheck import gradcheck
from minidiff.tensor import as_tensor, checkpoint, record, topological_order, unbroadcast

BROADCAST = [
    ((), ()),
    ((), (3,)),
    ((1,), ()),
    ((1,), (3, 1)),
    ((3, 1), (1, 5)),
    ((5,), (2, 3, 5)),
    ((1, 1, 1), (3, 5)),
    ((2, 1, 3, 1), (7, 1, 5)),
    ((1, 0), (3, 1)),
]


def leaf(*shape, seed=0):
    return Tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * x + x,
        lambda x: x + x,
        lambda x: (x * 2) * (x * 3),
        lambda x: (x + 1) * (x - 1) / (x * x + 2),
        lambda x: ops.concat([x, x * x, x]),
        lambda x: ops.attention(x, x, x),
        lambda x: (x.sum(axis=0) * x.mean() - x.max(axis=1, keepdims=True)) @ x.transpose(0, 2, 1),
    ],
)
def test_a_tensor_used_more_than_once(fn, rng):
    gradcheck(fn, rng.standard_normal((2, 3, 5)))


def test_diamonds_are_walked_once():
    """2^60 paths, and 120 nodes."""
    x = y = Tensor(np.array(1.0), requires_grad=True)
    for _ in range(60):
        y = y * 0.5 + y * 0.5
    y.backward()
    assert x.grad == 1


def test_a_deep_graph():
    """Neither backward nor letting go of a graph recurses along it."""
    x = y = leaf(2)
    for _ in range(10_000):
        y = y + 1
    y.backward(np.array([1.0, 2]))
    assert np.array_equal(x.grad, [1, 2])
    for _ in range(100_000):
        y = y * 1
    del y


def test_topological_order_puts_inputs_first():
    x, constant = leaf(2), Tensor(np.zeros(2))
    y = x * constant
    z = y + x
    order = topological_order(z)
    assert [id(t) for t in order] == [id(x), id(y), id(z)]


@pytest.mark.parametrize("a, b", BROADCAST)
def test_unbroadcast_is_the_transpose_of_broadcasting(a, b, rng):
    """<broadcast(x), dy> = <x, unbroadcast(dy)>, for both operands."""
    dy = rng.standard_normal(np.broadcast_shapes(a, b))
    for shape in (a, b):
        x = rng.standard_normal(shape)
        dx = unbroadcast(dy, shape)
        assert dx.shape == shape
        assert_close((dx * x).sum(), (np.broadcast_to(x, dy.shape) * dy).sum())


def test_leaves_accumulate_over_graphs():
    x = leaf(3)
    (x * 2).sum().backward()
    (x * x).sum().backward()
    assert_close(x.grad, 2 + 2 * x.data)


def test_constants_get_no_gradient():
    x, constant = leaf(3), Tensor(np.ones(3))
    (x * constant).backward(np.ones(3))
    assert constant.grad is None
    detached = (x * 2).detach()
    assert not (detached * 3).requires_grad
    assert (detached * x).requires_grad


def test_no_grad_records_nothing():
    x = leaf(3)
    with no_grad():
        with no_grad():
            assert not (x * 2).requires_grad
        y = x * 2
        assert not y.requires_grad and y.node is None
    assert (x * 2).requires_grad


def test_no_grad_ends_with_an_exception():
    with pytest.raises(KeyError), no_grad(), no_grad():
        raise KeyError
    assert (leaf(3) * 2).requires_grad


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda x: x * x, "mul"),
        (lambda x: ops.silu(x), "silu"),
        (lambda x: ops.group_norm(x, leaf(3), leaf(3), 1, silu=True), "group_norm_silu"),
        (lambda x: checkpoint(lambda x: x * 2, x), "checkpoint"),
    ],
)
def test_a_second_backward_names_the_op(make, name):
    x = leaf(2, 3)
    y = make(x)
    y.backward(np.ones((2, 3)))
    with pytest.raises(RuntimeError, match=f"backward through {name} twice"):
        y.backward(np.ones((2, 3)))


def test_a_second_backward_through_a_shared_part():
    y = leaf(3) * 2
    first, second = y.sum(), y.mean()
    first.backward()
    with pytest.raises(RuntimeError, match="backward through mul twice"):
        second.backward()


def test_backward_wants_dy_of_the_right_shape():
    y = leaf(2, 3) * 2
    with pytest.raises(ValueError, match=r"\(2, 3\) needs dy"):
        y.backward()
    for shape in ((3,), (2, 1), (3, 2), ()):
        with pytest.raises(ValueError, match=r"dy has shape .*, the Tensor \(2, 3\)"):
            y.backward(np.ones(shape))
    y.backward(np.ones((2, 3)))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_gradients_have_the_dtype_of_their_tensor(dtype):
    x = Tensor(np.ones(3, dtype), requires_grad=True)
    (x * 2 + 1).backward([1, 2, 3])
    assert x.grad.dtype == dtype


def test_a_gradient_of_the_wrong_shape_names_the_op():
    x = leaf(2, 3)
    with pytest.raises(RuntimeError, match=r"odd: gradient of shape \(3,\) for an input of shape \(2, 3\)"):
        record("odd", x.data, (x,), lambda dy: (dy.sum(axis=0),)).backward(np.ones((2, 3)))


def test_intermediate_results_die_on_the_way():
    """While the first op's gradient is computed, everything after it is gone already."""
    alive = []

    def probe(dy):
        alive.extend(ref() is not None for ref in later)
        return (dy,)

    x = leaf(3)
    first = record("probe", x.data.copy(), (x,), probe)
    second = ops.exp(first)
    third = ops.silu(second)
    later = [weakref.ref(second), weakref.ref(third)]
    y = third.sum()
    del first, second, third
    gc.disable()
    try:
        y.backward()
    finally:
        gc.enable()
    assert alive == [False, False]
    assert y.node.inputs == () and y.node.backward is None


def test_gradients_of_constants_are_dropped_at_once():
    made, alive = [], []

    def give(dy):
        unwanted = dy.copy()
        made.append(weakref.ref(unwanted))
        return unwanted, dy

    def look(dy):
        alive.append(made[0]() is not None)
        return (dy,)

    x = leaf(3)
    y = record("look", x.data, (x,), look)
    record("give", x.data, (Tensor(np.ones(3)), y), give).backward(np.ones(3))
    assert alive == [False]


def peak_and_left(run):
    """The most bytes allocated during run(), and the bytes still allocated after it."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = run()
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del kept
    return peak, left


def chain(x, length=20):
    for _ in range(length):
        x = ops.exp(x * -0.1)
    return x


def test_backward_does_not_hold_the_graph_and_the_gradients():
    x = leaf(100_000)
    size = x.data.nbytes
    forward, held = peak_and_left(lambda: chain(x))
    assert held > 35 * size  # otherwise the test below shows nothing

    def both():
        y = chain(x)
        y.backward(np.ones_like(y.data))
        return y

    peak, left = peak_and_left(both)
    assert peak < forward + 4 * size
    assert left < 3 * size  # y and the gradient of x


def test_checkpoint_holds_one_segment_at_a_time():
    x = leaf(100_000)

    def run(step):
        y = x
        for _ in range(5):
            y = step(y)
        y.backward(np.ones_like(y.data))

    whole, _ = peak_and_left(lambda: run(lambda y: chain(y, 8)))
    segments, _ = peak_and_left(lambda: run(lambda y: checkpoint(lambda x: chain(x, 8), y)))
    assert segments < 0.4 * whole


def two_inputs(w):
    return lambda a, b: ops.silu(a @ w) * b + a @ w


@pytest.mark.parametrize(
    "wrap",
    [
        lambda block: lambda *xs: checkpoint(block, *xs),
        lambda block: lambda *xs: checkpoint(lambda *ys: checkpoint(block, *ys), *xs),
        lambda block: lambda *xs: checkpoint(lambda *ys: checkpoint(block, *ys) * 1, *xs) * 1,
    ],
    ids=["plain", "nested", "in the middle"],
)
@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 1), (0, 0, 1), (1, 1, 0)])
def test_checkpoint_gives_the_same(wrap, needed, rng):
    """Values and gradients, those of the parameter inside the block too."""
    arrays = [rng.standard_normal(s) for s in ((2, 3), (2, 5), (3, 5))]
    dy = rng.standard_normal((2, 5))
    found = []
    for change in (lambda block: block, wrap):
        a, b, w = (Tensor(x, requires_grad=bool(n)) for x, n in zip(arrays, needed, strict=True))
        y = change(two_inputs(w))(a, b)
        y.backward(dy)
        found.append([y.data, a.grad, b.grad, w.grad])
        assert tuple(g is not None for g in found[-1][1:]) == needed
    for plain, checkpointed in zip(*found, strict=True):
        assert np.array_equal(plain, checkpointed)


def test_checkpoint_under_no_grad_records_nothing():
    with no_grad():
        assert not checkpoint(lambda x: x * 2, leaf(3)).requires_grad


def test_checkpoint_runs_the_block_twice():
    calls = []

    def block(x):
        calls.append(1)
        return x * 2

    y = checkpoint(block, leaf(3))
    assert len(calls) == 1
    y.backward(np.ones(3))
    assert len(calls) == 2


@pytest.mark.parametrize("data", [1, [1, 2], np.arange(3), np.array([True]), np.array(1j), "text"])
def test_a_tensor_holds_floats(data):
    with pytest.raises(TypeError, match=r"holds floats.*plain arrays"):
        Tensor(data)


def test_what_a_tensor_tells():
    x = Tensor([[1.0, 2], [3, 4]], requires_grad=True)
    assert (x.shape, x.ndim, x.size, len(x), x.dtype) == ((2, 2), 2, 4, 2, np.float64)
    assert "made by mul" in repr(x * 2) and "shape=(2, 2)" in repr(x)
    assert Tensor(x).data is x.data and x.numpy() is x.data and as_tensor(x) is x
    assert x.sum().item() == 10 and isinstance(x.sum().item(), float)


def zeros(*shape):
    return Tensor(np.zeros(shape))


def attend(q=(1, 2, 4), k=(1, 2, 4), v=(1, 2, 4), **options):
    return ops.attention(zeros(*q), zeros(*k), zeros(*v), **options)


BAD_CALLS = {
    "add": (lambda: zeros(2, 3) + zeros(2), r"\(2, 3\) and \(2,\) do not broadcast"),
    "sub": (lambda: zeros(4) - zeros(3), r"\(4,\) and \(3,\) do not broadcast"),
    "mul": (lambda: zeros(2, 1, 3) * zeros(2, 2), r"\(2, 1, 3\) and \(2, 2\) do not broadcast"),
    "div": (lambda: np.zeros(4) / zeros(3), r"\(4,\) and \(3,\) do not broadcast"),
    "matmul": (lambda: zeros(2, 3) @ zeros(2, 3), r"\(2, 3\) and \(2, 3\) do not multiply"),
    "matmul of vectors": (lambda: zeros(3) @ zeros(3), r"\(3,\) and \(3,\) .*\(\.\.\., M, K\)"),
    "linear": (lambda: ops.linear(zeros(2, 3), zeros(4, 5)), r"\(2, 3\).*\(4, 5\).*D_in"),
    "linear bias": (lambda: ops.linear(zeros(2, 3), zeros(3, 5), zeros(3)), r"bias \(3,\).*\(3, 5\)"),
    "conv2d": (lambda: ops.conv2d(zeros(1, 4, 4, 3), zeros(3, 3, 4, 5)), r"\(1, 4, 4, 3\).*\(3, 3, 4, 5\)"),
    "conv2d of one image": (lambda: ops.conv2d(zeros(4, 4, 3), zeros(3, 3, 3, 5)), r"\(4, 4, 3\).*\(B, H, W"),
    "conv2d bias": (lambda: ops.conv2d(zeros(1, 4, 4, 3), zeros(3, 3, 3, 5), zeros(3)), r"bias \(3,\)"),
    "conv2d kernel": (lambda: ops.conv2d(zeros(1, 2, 4, 3), zeros(3, 3, 3, 5)), r"\(1, 2, 4, 3\).*smaller"),
    "group_norm": (lambda: ops.group_norm(zeros(2, 6), zeros(6), zeros(6), 4), r"6 channels.*\(2, 6\).*4"),
    "group_norm gamma": (lambda: ops.group_norm(zeros(2, 6), zeros(1), zeros(6), 3), r"gamma \(1,\)"),
    "layer_norm": (lambda: ops.layer_norm(zeros(2, 6), zeros(6), zeros(2)), r"beta \(2,\).*\(2, 6\)"),
    "attention": (lambda: attend((1, 2, 4), (1, 3, 4), (1, 2, 4)), r"wanted q.*\(1, 3, 4\)"),
    "attention widths": (lambda: attend((1, 2, 4), (1, 2, 3), (1, 2, 4)), r"wanted q.*\(1, 2, 3\)"),
    "attention heads": (lambda: attend(heads=3), "4 and 4.*3 heads"),
    "attention mask": (lambda: attend(mask=np.ones((2, 2), bool)), r"booleans.*\(1, 2\), got bool \(2, 2\)"),
    "attention mask of floats": (lambda: attend(mask=np.ones((1, 2))), r"booleans.*float64 \(1, 2\)"),
    "attention bias": (lambda: attend(bias=zeros(3, 2)), r"bias \(3, 2\).*\(1, 1, 2, 2\)"),
    "attention large bias": (lambda: attend(bias=zeros(2, 1, 2, 2)), r"bias \(2, 1, 2, 2\)"),
    "geglu": (lambda: ops.geglu(zeros(2, 5)), r"\(2, 5\)"),
    "gelu": (lambda: ops.gelu(zeros(2), "fast"), r"'fast'.*exact"),
    "upsample_nearest": (lambda: ops.upsample_nearest(zeros(2, 2, 3)), r"\(2, 2, 3\)"),
    "mse": (lambda: ops.mse(zeros(2, 3), zeros(3)), r"\(2, 3\) and \(3,\)"),
    "sum": (lambda: zeros(2, 3).sum(axis=2), r"axis 2.*\(2, 3\)"),
    "mean": (lambda: zeros(2, 3).mean(axis=(0, -3)), r"axis \(0, -3\).*\(2, 3\)"),
    "max": (lambda: zeros(2, 3).max(axis=2), r"axis 2.*\(2, 3\)"),
    "reshape": (lambda: zeros(2, 3).reshape(4, 2), r"6 elements.*\(2, 3\).*\(4, 2\)"),
    "transpose": (lambda: zeros(2, 3).transpose(0, 0), r"\(0, 0\).*\(2, 3\)"),
    "concat": (lambda: ops.concat([zeros(2, 3), zeros(3, 3)], 1), r"\(2, 3\), \(3, 3\).*axis 1"),
    "concat axis": (lambda: ops.concat([zeros(2, 3), zeros(2, 3)], 2), r"axis 2.*\(2, 3\)"),
    "concat dimensions": (lambda: ops.concat([zeros(2, 3), zeros(2)], 0), r"\(2, 3\), \(2,\)"),
    "pad": (lambda: ops.pad(zeros(2, 3), [(1, 1)]), r"\(1, 1\).*\(2, 3\)"),
    "pad inwards": (lambda: ops.pad(zeros(2, 3), [(0, 0), (-1, 0)]), r"-1.*\(2, 3\)"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_name_the_op_and_what_it_got(name):
    call, wanted = BAD_CALLS[name]
    with pytest.raises(ValueError, match=rf"^{name.split()[0]}: .*{wanted}"):
        call()


def faulty_op(change):
    """y = sin(x), with the gradient changed."""
    return lambda x: record("faulty", np.sin(x.data), (x,), lambda dy: (change(dy * np.cos(x.data)),))


def one_nan(dx):
    dx = dx.copy()
    dx.flat[-1] = np.nan
    return dx


def last_one(factor):
    def change(dx):
        dx = dx.copy()
        dx.flat[-1] *= factor
        return dx

    return change


@pytest.mark.parametrize(
    "change, told",
    [
        (np.zeros_like, "faulty: wrong gradient for input 0"),
        (np.negative, "faulty: wrong gradient"),
        (lambda dx: dx * (1 + 1e-5), "faulty: wrong gradient"),
        (lambda dx: dx[:, ::-1], "faulty: wrong gradient"),
        (lambda dx: dx[::-1], "faulty: wrong gradient"),
        (last_one(0), "faulty: wrong gradient"),
        (last_one(1.01), "faulty: wrong gradient"),
        (one_nan, "faulty, input 0: the gradient is not finite"),
        (lambda dx: dx * np.inf, "faulty, input 0: the gradient is not finite"),
        (lambda dx: None, "faulty, input 0: no gradient arrived"),
        (lambda dx: dx.astype(np.float32), "faulty, input 0: gradient in float32 for float64"),
    ],
)
def test_gradcheck_notices_a_wrong_gradient(change, told, rng):
    x = rng.standard_normal((3, 5))
    assert gradcheck(faulty_op(lambda dx: dx), x) < 1e-8
    with pytest.raises(AssertionError, match=told):
        gradcheck(faulty_op(change), x)


def test_gradcheck_names_the_input_and_both_values(rng):
    def fn(a, b):
        return record("product", a.data * b.data, (a, b), lambda dy: (dy * b.data, 2 * dy * a.data))

    wanted = r"product: wrong gradient for input 1 of shape \(3,\): moving it gives (\S+), backward (\S+) "
    with pytest.raises(AssertionError) as caught:
        gradcheck(fn, rng.standard_normal(3), rng.standard_normal(3))
    numeric, analytic = map(float, re.search(wanted, str(caught.value)).groups())
    assert_close(analytic, 2 * numeric, "float32")  # ten digits are printed


def test_gradcheck_notices_inputs_that_are_mixed_up(rng):
    def fn(a, b):
        return record("swapped", a.data * b.data, (a, b), lambda dy: (dy * a.data, dy * b.data))

    with pytest.raises(AssertionError, match="swapped: wrong gradient"):
        gradcheck(fn, rng.standard_normal(3), rng.standard_normal(3))


def test_gradcheck_notices_a_result_that_is_not_finite():
    with pytest.raises(AssertionError, match="log: the result is not finite"), np.errstate(invalid="ignore"):
        gradcheck(ops.log, np.array([1.0, -1.0]))
    with pytest.raises(AssertionError, match="moving it gives nan"), np.errstate(invalid="ignore"):
        gradcheck(ops.log, np.array(1e-9))


def test_gradcheck_is_not_blind_where_the_sum_is_constant(rng):
    """The gradient of sum(softmax(x)) is zero: with dy = 1 any multiple of it would pass."""

    def doubled(x):
        p = REFERENCE["softmax_forward"](x.data)
        return record("doubled", p, (x,), lambda dy: (2 * REFERENCE["softmax_backward"](dy, p),))

    with pytest.raises(AssertionError, match="doubled"):
        gradcheck(doubled, rng.standard_normal((3, 5)))


def doubled_layer_norm(x):
    """With twice its gradient, which is wrong for every dy but x, where both are zero."""
    y, mean, rstd = REFERENCE["layer_norm_forward"](x.data, np.ones(7), np.zeros(7), 0)

    def backward(dy):
        return (2 * REFERENCE["layer_norm_backward"](dy, x.data, np.ones(7), mean, rstd)[0],)

    return record("layer_norm", y, (x,), backward)


@pytest.mark.parametrize("seed", range(5))
def test_gradcheck_draws_nothing_that_equals_the_inputs(seed):
    """Where dy is x, the gradient of a normalisation is zero; one seed for both would make them equal."""
    x = np.random.default_rng(seed).standard_normal((3, 7))
    with pytest.raises(AssertionError, match="wrong gradient"):
        gradcheck(doubled_layer_norm, x, seed=seed)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradcheck_refuses_less_than_double_precision(dtype):
    with pytest.raises(TypeError, match=f"input 1 is {dtype}.*float64"):
        gradcheck(ops.add, np.ones(3), np.ones(3, dtype))
    with pytest.raises(TypeError, match=f"made {dtype} out of float64"):
        gradcheck(lambda x: record("narrow", x.data.astype(dtype), (x,), lambda dy: (dy,)), np.ones(3))


def test_gradcheck_takes_tensors_and_numbers_and_leaves_them_alone(rng):
    x = Tensor(rng.standard_normal(3), requires_grad=True)
    before = x.data.copy()
    assert gradcheck(lambda x, a, b: x * a + b, x, 3, [1, 2, 3]) < 1e-8
    assert x.grad is None and np.array_equal(x.data, before)
    assert gradcheck(lambda x: x * 0, np.ones(3)) <= 1e-6


def test_a_leafs_gradient_is_an_array_of_its_own_dtype():
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    (x * Tensor(np.ones((2, 3)))).sum().backward()  # a float64 operand
    assert x.grad.dtype == np.float32 and x.grad.flags.c_contiguous
    y = Tensor(np.ones((2, 3), np.float32), requires_grad=True)
    y.sum().backward()  # one number, spread
    assert y.grad.flags.c_contiguous and y.grad.shape == (2, 3)


def test_numpy_numbers_do_not_widen():
    assert (Tensor(np.ones(3, np.float32)) * np.sqrt(2)).dtype == np.float32


def test_backward_without_anything_to_differentiate():
    with pytest.raises(RuntimeError, match="requires a gradient"):
        Tensor(np.ones(())).backward()


def test_reshape_takes_a_tuple():
    assert Tensor(np.ones((2, 3))).reshape((3, 2)).shape == (3, 2)
