"""Every op against PyTorch's: values and gradients of all inputs, on ragged shapes."""

import numpy as np
import pytest
from helpers import assert_close, cotangent, forward_backward, import_or_skip

from minidiff import ops

torch = import_or_skip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.usefixtures("kernels_kind")

IDS = np.array([[3, 1, 3], [0, 3, 6]])
MASK = np.array([[True, True, False, True, False], [True] * 5])


def channels_first(x):
    return x.movedim(-1, 1)


def channels_last(x):
    return x.movedim(1, -1)


def conv2d(stride=1, sides=((0, 0), (0, 0))):
    (top, bottom), (left, right) = sides

    def torchs(x, w, b=None):
        padded = F.pad(channels_first(x), (left, right, top, bottom))
        return channels_last(F.conv2d(padded, w.permute(3, 2, 0, 1), b, stride))

    return lambda x, w, b=None: ops.conv2d(x, w, b, stride, sides), torchs


def attention(heads=1, scale=None, mask=None, causal=False):
    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def torchs(q, k, v, bias=None):
        added = torch.zeros((), dtype=q.dtype) if bias is None else bias
        if mask is not None:
            hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(torch.tensor(~mask), -torch.inf)
            added = added + hidden[:, None, None]
        if causal:
            added = added + torch.full((q.shape[1], k.shape[1]), -torch.inf, dtype=q.dtype).triu(1)
        added = added.expand(q.shape[0], heads, q.shape[1], k.shape[1])
        y = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=added, scale=scale)
        return y.transpose(1, 2).flatten(2)

    def ours(q, k, v, bias=None):
        return ops.attention(q, k, v, heads, scale, bias, mask, causal)

    return ours, torchs


def group_norm(groups, eps=1e-5, silu=False):
    def torchs(x, gamma, beta):
        z = channels_last(F.group_norm(channels_first(x), groups, gamma, beta, eps))
        return F.silu(z) if silu else z

    return lambda *a: ops.group_norm(*a, groups, eps, silu), torchs


def layer_norm(eps):
    return lambda *a: ops.layer_norm(*a, eps), lambda x, *a: F.layer_norm(x, x.shape[-1:], *a, eps)


def gelu(kind):
    formulas = {
        "exact": F.gelu,
        "tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick": lambda x: x * torch.sigmoid(1.702 * x),
    }
    return lambda x: ops.gelu(x, kind), formulas[kind]


def geglu():
    def torchs(x):
        a, g = x.chunk(2, dim=-1)
        return a * F.gelu(g)

    return ops.geglu, torchs


def upsample(factor):
    def torchs(x):
        return channels_last(F.interpolate(channels_first(x), scale_factor=factor, mode="nearest"))

    return lambda x: ops.upsample_nearest(x, factor), torchs


def both(fn):
    """An expression that reads the same with our Tensors and with PyTorch's."""
    return fn, fn


def reduction(name, axis, keepdims=False):
    torchs = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[name]
    return lambda x: getattr(x, name)(axis, keepdims), lambda x: torchs(x, axis, keepdim=keepdims)


CASES = [
    ("add", both(lambda a, b: a + b), (2, 1, 5), (3, 1)),
    ("sub", both(lambda a, b: 1 - a - b), (5,), (2, 3, 1)),
    ("mul", both(lambda a, b: 2 * a * b), (), (3, 5)),
    ("div", both(lambda a, b: a / (b * b + 1)), (3, 5), (1, 5)),
    ("neg", both(lambda a: -a), (7,)),
    ("power", both(lambda a: (a * a + 1) ** -1.5), (3, 5)),
    ("exp", (ops.exp, torch.exp), (3, 5)),
    ("log", (lambda a: ops.log(a * a + 1), lambda a: torch.log(a * a + 1)), (3, 5)),
    ("sqrt", (lambda a: ops.sqrt(a * a + 1), lambda a: torch.sqrt(a * a + 1)), (3, 5)),
    ("tanh", (ops.tanh, torch.tanh), (3, 5)),
    ("matmul", both(lambda a, b: a @ b), (2, 1, 3, 5), (4, 5, 7)),
    ("linear", (ops.linear, lambda x, w, b: F.linear(x, w.T, b)), (2, 3, 17), (17, 5), (5,)),
    ("linear without bias", (ops.linear, lambda x, w: F.linear(x, w.T)), (7, 1), (1, 3)),
    ("conv2d 1x1", conv2d(), (2, 5, 3, 3), (1, 1, 3, 7), (7,)),
    ("conv2d 3x3", conv2d(1, ((1, 1), (1, 1))), (2, 7, 5, 5), (3, 3, 5, 9), (9,)),
    ("conv2d 3x3 without bias", conv2d(1, ((1, 1), (1, 1))), (1, 1, 1, 3), (3, 3, 3, 2)),
    ("conv2d stride 2", conv2d(2, ((1, 1), (1, 1))), (2, 8, 7, 3), (3, 3, 3, 5), (5,)),
    ("conv2d asymmetric", conv2d(2, ((0, 1), (0, 1))), (2, 8, 7, 3), (3, 3, 3, 5), (5,)),
    ("conv2d 2x5", conv2d(3, ((1, 0), (2, 4))), (1, 9, 6, 2), (2, 5, 2, 3), (3,)),
    ("attention", attention(), (2, 3, 5), (2, 7, 5), (2, 7, 4)),
    ("attention heads", attention(heads=3, scale=0.7), (2, 3, 15), (2, 1, 15), (2, 1, 6)),
    ("attention causal", attention(heads=2, causal=True), (1, 5, 6), (1, 5, 6), (1, 5, 6)),
    ("attention mask", attention(heads=2, mask=MASK), (2, 3, 6), (2, 5, 6), (2, 5, 4)),
    ("attention bias", attention(heads=2), (2, 3, 6), (2, 5, 6), (2, 5, 4), (2, 3, 5)),
    ("attention all", attention(2, 0.3, MASK, True), (2, 4, 6), (2, 5, 6), (2, 5, 4), (2, 1, 4, 5)),
    ("group_norm 1", group_norm(1), (2, 5, 3, 6), (6,), (6,)),
    ("group_norm 2", group_norm(2, eps=1e-2), (2, 7, 6), (6,), (6,)),
    ("group_norm each", group_norm(5), (3, 3, 5, 5), (5,), (5,)),
    ("group_norm silu", group_norm(3, silu=True), (2, 3, 5, 9), (9,), (9,)),
    ("group_norm vectors", group_norm(2), (3, 10), (10,), (10,)),
    ("layer_norm", layer_norm(1e-5), (2, 3, 17), (17,), (17,)),
    ("layer_norm eps", layer_norm(0.1), (5, 3), (3,), (3,)),
    ("silu", (ops.silu, F.silu), (3, 5, 7)),
    ("gelu exact", gelu("exact"), (3, 5, 7)),
    ("gelu tanh", gelu("tanh"), (3, 5, 7)),
    ("gelu quick", gelu("quick"), (3, 5, 7)),
    ("geglu", geglu(), (2, 3, 10)),
    ("softmax", (ops.softmax, lambda x: x.softmax(-1)), (2, 3, 17)),
    ("embedding", (lambda t: ops.embedding(IDS, t), lambda t: F.embedding(torch.tensor(IDS), t)), (7, 5)),
    ("upsample_nearest 2", upsample(2), (2, 3, 5, 3)),
    ("upsample_nearest 3", upsample(3), (1, 1, 2, 5)),
    ("mse", (ops.mse, F.mse_loss), (2, 3, 5), (2, 3, 5)),
    ("sum", reduction("sum", (0, 2)), (2, 3, 5)),
    ("mean", reduction("mean", -1, True), (2, 3, 5)),
    ("max", reduction("max", (1,)), (2, 3, 5)),
    ("reshape", both(lambda x: x.reshape(5, -1)), (2, 3, 5)),
    ("transpose", (lambda x: x.transpose(2, 0, 1), lambda x: x.permute(2, 0, 1)), (2, 3, 5)),
    ("concat", (lambda *xs: ops.concat(xs, 1), lambda *xs: torch.cat(xs, 1)), (2, 3), (2, 1), (2, 4)),
    ("pad", (lambda x: ops.pad(x, [(1, 0), (2, 3)]), lambda x: F.pad(x, (2, 3, 1, 0))), (2, 3)),
    ("index", both(lambda x: x[1:, None, ..., ::2]), (3, 2, 5)),
    ("index repeated", both(lambda x: x[[2, 0, 2, 2]]), (3, 2)),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name, pair, shapes", [(n, p, s) for n, p, *s in CASES], ids=[c[0] for c in CASES])
def test_against_torch(name, pair, shapes, dtype, rng):
    ours, torchs = pair
    arrays = [np.asarray(rng.standard_normal(s), dtype) for s in shapes]
    leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    wanted = torchs(*leaves)
    dy = cotangent(wanted.shape, dtype)
    wanted.backward(torch.tensor(dy))

    y, grads = forward_backward(ours, arrays, dy)
    assert_close(y, wanted.detach().numpy(), dtype, name=name)
    scale = max(leaf.grad.abs().max().item() if leaf.numel() else 0 for leaf in leaves)  # as in check_op
    for i, (grad, leaf) in enumerate(zip(grads, leaves, strict=True)):
        assert_close(grad, leaf.grad.numpy(), dtype, scale=scale, name=f"{name}: gradient of input {i}")


def test_equal_maxima_share_the_gradient_as_in_torch():
    x = np.array([[1.0, 3, 3], [2, 2, 2]])
    leaf = torch.tensor(x, requires_grad=True)
    leaf.amax(1).backward(torch.tensor([2.0, 5.0], dtype=torch.float64))
    _, (dx,) = forward_backward(lambda x: ops.max(x, axis=1), [x], np.array([2.0, 5.0]))
    assert_close(dx, leaf.grad.numpy())


def test_every_op_is_compared():
    """PyTorch has no timestep_embedding."""
    names = {name.split()[0] for name, *_ in CASES}
    assert names == set(ops.__all__) - {"Padding", "timestep_embedding"}
