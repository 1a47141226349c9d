"""Reverse-mode automatic differentiation: a Tensor remembers how it was made, `backward` walks that memory.

An op computes its result from plain arrays and calls `record` with its inputs and a function that turns the
gradient of the result, `dy`, into the gradients of the inputs. That is all the tape there is: each Tensor holds
its `Node`, each node its inputs, and the graph is freed as `backward` passes over it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from minidiff.backend import Array, array_module, kernel, to_numpy

Backward = Callable[[Array], Sequence[Array | None]]


class _GradMode(threading.local):
    """Whether ops are recorded: each thread's own, because threads train beside each other."""

    enabled = True


_grad = _GradMode()


@contextlib.contextmanager
def _grad_mode(enabled: bool) -> Iterator[None]:
    before, _grad.enabled = _grad.enabled, enabled
    try:
        yield
    finally:
        _grad.enabled = before


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Inside this block nothing is recorded. Do not `yield` from within it: the caller would run in it too."""
    return _grad_mode(False)


class Node:
    """One recorded op: its name, its inputs, and the function dy -> gradients of the inputs."""

    __slots__ = ("backward", "inputs", "name")

    def __init__(self, name: str, inputs: tuple[Tensor, ...], backward: Backward):
        self.name = name
        self.inputs = inputs
        self.backward: Backward | None = backward


class Tensor:
    """An array of floats with a gradient.

    data: a NumPy or CuPy array (anything else is converted with NumPy); integers and booleans are refused,
    because they have no gradient: pass indices and masks as plain arrays.
    """

    __slots__ = ("__weakref__", "data", "grad", "node", "requires_grad")
    __array_ufunc__ = None  # so that array + Tensor asks the Tensor

    def __init__(self, data: Any, requires_grad: bool = False):
        if isinstance(data, Tensor):
            data = data.data
        xp = array_module(data)
        data = xp.asarray(data)
        if data.dtype.kind != "f":
            raise TypeError(f"a Tensor holds floats, got {data.dtype}; pass indices and masks as plain arrays")
        self.data: Array = data
        self.grad: Array | None = None
        self.node: Node | None = None
        self.requires_grad = requires_grad

    shape = property(attrgetter("data.shape"))
    dtype = property(attrgetter("data.dtype"))
    ndim = property(attrgetter("data.ndim"))
    size = property(attrgetter("data.size"))

    def __repr__(self) -> str:
        made_by = f", made by {self.node.name}" if self.node else ""
        return f"Tensor(shape={self.shape}, dtype={self.dtype}{made_by})\n{self.data}"

    def __len__(self) -> int:
        return len(self.data)

    def item(self) -> float:
        """The only element, as a Python float."""
        return float(self.data.item())

    def numpy(self) -> np.ndarray:
        """The values in the computer's own memory (shared with the Tensor where they are there already)."""
        return to_numpy(self.data)

    def detach(self) -> Tensor:
        """The same values, with no memory of how they were made."""
        return Tensor(self.data)

    def backward(self, dy: Array | None = None) -> None:
        """Add d(self)/d(leaf), weighted by `dy`, to `.grad` of every leaf that requires it.

        dy: an array of this Tensor's shape; it may be left out for a scalar, where it is 1.
        The graph is freed on the way: a second call raises RuntimeError. Gradients may share memory: replace `.grad`,
        do not write into it.
        """
        xp = array_module(self.data)
        if not self.requires_grad:
            raise RuntimeError("backward: nothing that made this Tensor requires a gradient, or no_grad was on")
        if dy is None:
            if self.size != 1:
                raise ValueError(f"backward of shape {self.shape} needs dy: only a scalar has the default dy = 1")
            dy = xp.ones_like(self.data)
        dy = xp.asarray(dy, dtype=self.dtype)
        if dy.shape != self.shape:
            raise ValueError(f"backward: dy has shape {dy.shape}, the Tensor {self.shape}")

        grads = {id(self): dy}
        order = topological_order(self)
        while order:  # popping lets go of each result as soon as its gradient has gone on
            tensor = order.pop()
            dy = grads.pop(id(tensor), None)
            if dy is None:
                continue
            node = tensor.node
            if node is None:
                if not dy.flags.c_contiguous:  # e.g. the spread gradient of a sum, one number read many times
                    dy = dy.copy()
                tensor.grad = dy if tensor.grad is None else accumulate(tensor.grad, dy)
                continue
            if node.backward is None:
                raise RuntimeError(f"backward through {node.name} twice: the first pass freed the graph")
            for x, dx in zip(node.inputs, node.backward(dy), strict=True):
                if dx is None or not x.requires_grad:
                    continue
                if dx.shape != x.shape:
                    raise RuntimeError(f"{node.name}: gradient of shape {dx.shape} for an input of shape {x.shape}")
                if dx.dtype.itemsize > x.dtype.itemsize:  # an operand of higher precision
                    dx = dx.astype(x.dtype)
                # `=` in place of `+` would lose all but the last use of a Tensor that is used twice
                grads[id(x)] = accumulate(grads[id(x)], dx) if id(x) in grads else dx
            node.backward, node.inputs = None, ()

    if TYPE_CHECKING:  # operators and methods are ops like any other; minidiff/ops/__init__.py attaches them

        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pow__(self, exponent: float) -> Tensor: ...
        def __matmul__(self, other: Tensor) -> Tensor: ...
        def __getitem__(self, key: Any) -> Tensor: ...
        def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def max(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: int) -> Tensor: ...
        def transpose(self, *axes: int) -> Tensor: ...


def topological_order(root: Tensor) -> list[Tensor]:
    """Every Tensor that needs a gradient and leads to `root`, inputs before results. No recursion: graphs are deep."""
    order: list[Tensor] = []
    seen: set[int] = set()
    stack: list[tuple[Tensor, bool]] = [(root, False)]
    while stack:
        tensor, inputs_done = stack.pop()
        if inputs_done:
            order.append(tensor)
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            stack.append((tensor, True))
            if tensor.node is not None:
                stack.extend((x, False) for x in tensor.node.inputs if x.requires_grad)
    return order


def as_tensor(x: Any, like: Tensor | None = None) -> Tensor:
    """x itself if it is a Tensor, else a constant; a single number takes the dtype and device of `like`."""
    if isinstance(x, Tensor):
        return x
    if like is not None and isinstance(x, int | float | np.number):
        return Tensor(array_module(like.data).full((), x, dtype=like.dtype))  # on a GPU nothing is copied to it
    return Tensor(x)


def as_array(x: Tensor | Array) -> Array:
    """The array behind a Tensor; an array is returned as it is."""
    return x.data if isinstance(x, Tensor) else x


def recording(inputs: Iterable[Tensor]) -> bool:
    """Whether an op on these inputs will be remembered: if not, nothing that only its backward needs is kept."""
    return _grad.enabled and any(x.requires_grad for x in inputs)


def record(name: str, y: Array, inputs: tuple[Tensor, ...], backward: Backward) -> Tensor:
    """Wrap an op's result, and remember how to go back if any input requires a gradient.

    backward(dy) returns one gradient an input, in the same order; None where there is none to give.
    """
    out = Tensor.__new__(Tensor)  # an op's result needs none of the constructor's questions
    out.data = y if isinstance(y, np.ndarray) else array_module(y).asarray(y)
    out.grad, out.node, out.requires_grad = None, None, False
    if recording(inputs):
        out.requires_grad = True
        out.node = Node(name, inputs, backward)
    return out


@kernel
def accumulate(a: Array, b: Array) -> Array:
    """a + b, two gradients of the same Tensor."""
    return a + b


def unbroadcast(dy: Array, shape: tuple[int, ...]) -> Array:
    """Sum dy over the axes along which an operand of this shape was repeated: the backward of broadcasting."""
    if dy.shape == shape:
        return dy
    added = dy.ndim - len(shape)
    repeated = tuple(i + added for i, n in enumerate(shape) if n == 1 and dy.shape[i + added] != 1)
    return dy.sum(axis=tuple(range(added)) + repeated, keepdims=True).reshape(shape)


def checkpoint(block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Gradient checkpointing: run `block(*inputs)` without keeping its graph, and run it again in backward.

    Costs one more forward pass of the block and saves the memory of everything inside it. The block must be a
    pure function of its inputs and its parameters (no fresh randomness). Chen et al. 2016, arXiv 1604.06174.
    """
    with no_grad():
        y = block(*inputs)
    if not _grad.enabled:
        return y

    def backward(dy: Array) -> list[Array | None]:
        leaves = [Tensor(x.data, requires_grad=x.requires_grad) for x in inputs]
        with _grad_mode(True):
            again = block(*leaves)
            if again.requires_grad:
                again.backward(dy)
        return [leaf.grad for leaf in leaves]

    out = Tensor(y.data, requires_grad=True)
    out.node = Node("checkpoint", inputs, backward)
    return out
