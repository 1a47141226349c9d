"""Modules and layers, thin over the ops: a layer is its parameters and one call.

A parameter knows its shape and how it begins; it gets numbers from `initialise(seed)` or from a file. Attribute
names follow diffusers' U-Nets and transformers' CLIP: a parameter's path (`down_blocks.0.resnets.1.conv1.weight`) is
its key in their checkpoints, up to CLIP's prefixes (`text_model.encoder.`); the layouts are ours (channels last).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minidiff import ops
from minidiff.backend import Array, device_module, to_numpy
from minidiff.files import listed
from minidiff.random import Purpose, normal, uniform
from minidiff.tensor import Tensor


class Parameter(Tensor):
    """A Tensor that is trained. `init` is "zeros", "ones", ("uniform", bound) or ("normal", std).

    hidden: a matrix or kernel from features to features (not an embedding, nor a network's first or last layer), which
    the Muon optimizer treats as a matrix.
    """

    __slots__ = ("hidden", "init", "wanted_shape")

    def __init__(self, shape: tuple[int, ...], init: Any, hidden: bool = False):
        super().__init__(np.empty(0, np.float32), requires_grad=True)
        self.wanted_shape = shape
        self.init = init
        self.hidden = hidden

    def initialise(self, seed: int, number: int) -> None:
        """Draw the first value, a pure function of the seed and the parameter's number in its model."""
        shape, elements = self.wanted_shape, math.prod(self.wanted_shape)
        if self.init == "zeros":
            data = np.zeros(shape)
        elif self.init == "ones":
            data = np.ones(shape)
        elif self.init[0] == "normal":
            data = normal(seed, [number], 0, Purpose.PARAMETERS, shape)[0] * self.init[1]
        else:
            u = uniform(seed, [number], 0, Purpose.PARAMETERS, elements).reshape(shape)
            data = (2 * u - 1) * self.init[1]
        self.data = data.astype(np.float32)


class Module:
    """A part of a network. Its parameters are found through its attributes, lists included, in order of definition."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """(path, parameter) for every parameter of this module and the modules inside it."""
        for name, value in vars(self).items():
            yield from _walk(value, f"{prefix}{name}")

    def parameters(self) -> list[Parameter]:
        """The parameters alone."""
        return [p for _, p in self.named_parameters()]

    def initialise(self, seed: int) -> Module:
        """Give every parameter its first value; returns the module."""
        for number, parameter in enumerate(self.parameters()):
            parameter.initialise(seed, number)
        return self

    def to(self, device: str) -> Module:
        """Move the parameters to "cpu" or "cuda"; returns the module."""
        xp = device_module(device)
        for p in self.parameters():
            p.data = to_numpy(p.data) if xp is np else xp.asarray(p.data)
        return self

    def state(self) -> dict[str, Array]:
        """The parameters' arrays by path (not copies)."""
        return {name: p.data for name, p in self.named_parameters()}

    def load(self, state: dict[str, Array], source: str = "the weights") -> None:
        """Take over arrays by path. Raises ValueError naming what is missing, left over or of another shape."""
        self.check({name: tuple(array.shape) for name, array in state.items()}, source)
        for name, p in self.named_parameters():
            p.data = state[name]

    def check(self, shapes: dict[str, tuple[int, ...]], source: str = "the weights") -> None:
        """Whether arrays of these shapes can be loaded; else ValueError as from `load`."""
        wanted = {name: p.wanted_shape for name, p in self.named_parameters()}
        missing, extra = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
        misshapen = [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != shape
        ]
        faults = [("missing", missing), ("not in the model", extra), ("of another shape", misshapen)]
        told = [f"{what}: {listed(names)}" for what, names in faults if names]
        if told:
            raise ValueError(f"{source} do not fit the model ({'; '.join(told)})")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes."""
        raise NotImplementedError


def _walk(value: Any, path: str) -> Iterator[tuple[str, Parameter]]:
    if isinstance(value, Parameter):
        yield path, value
    elif isinstance(value, Module):
        yield from value.named_parameters(f"{path}.")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _walk(item, f"{path}.{i}")


class Linear(Module):
    """y = x W + b; W and b begin uniform in +-1/sqrt(D_in), or at zero."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True, zero: bool = False):
        init = "zeros" if zero else ("uniform", 1 / math.sqrt(d_in))
        self.weight = Parameter((d_in, d_out), init, hidden=True)
        self.bias = Parameter((d_out,), init) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """(..., D_in) -> (..., D_out), + residual if given, then the activation of `ops.linear`."""
        return ops.linear(x, self.weight, self.bias, residual, activation)


class Conv2d(Module):
    """Convolution of (B, H, W, C_in); the weights begin uniform in +-1/sqrt(kernel area * C_in), or at zero."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1, padding: ops.Padding = 1, zero: bool = False
    ):
        init = "zeros" if zero else ("uniform", 1 / math.sqrt(kernel * kernel * c_in))
        self.weight = Parameter((kernel, kernel, c_in, c_out), init, hidden=True)
        self.bias = Parameter((c_out,), init)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor, **around: Any) -> Tensor:
        """(B, H, W, C_in) -> (B, H_out, W_out, C_out); around: what `ops.conv2d` takes around it."""
        return ops.conv2d(x, self.weight, self.bias, self.stride, self.padding, **around)


class GroupNorm(Module):
    """GroupNorm over (B, ..., C), followed by SiLU if asked."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-5, silu: bool = False):
        self.weight = Parameter((channels,), "ones")
        self.bias = Parameter((channels,), "zeros")
        self.groups, self.eps, self.silu = groups, eps, silu

    def forward(self, x: Tensor, **around: Tensor | None) -> Tensor:
        """Same shape as x, or C with a second input; around: scale, shift, beside of `ops.group_norm`."""
        return ops.group_norm(x, self.weight, self.bias, self.groups, self.eps, self.silu, **around)


class LayerNorm(Module):
    """LayerNorm over the last axis."""

    def __init__(self, width: int, eps: float = 1e-5):
        self.weight = Parameter((width,), "ones")
        self.bias = Parameter((width,), "zeros")
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Embedding(Module):
    """A table of V vectors; they begin normal with the given standard deviation."""

    def __init__(self, rows: int, width: int, std: float):
        self.weight = Parameter((rows, width), ("normal", std))

    def forward(self, ids: Array) -> Tensor:
        """Integers (...) -> (..., D)."""
        return ops.embedding(ids, self.weight)
