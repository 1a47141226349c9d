"""The ops: each file holds one equation, its reference forward and backward, and the call that the tape records."""

from minidiff.ops.attention import attention
from minidiff.ops.conv2d import Padding, conv2d
from minidiff.ops.elementwise import add, div, exp, log, mul, neg, power, sqrt, sub, tanh
from minidiff.ops.embedding import embedding
from minidiff.ops.geglu import geglu
from minidiff.ops.gelu import gelu
from minidiff.ops.groupnorm import group_norm
from minidiff.ops.layernorm import layer_norm
from minidiff.ops.linear import linear
from minidiff.ops.matmul import matmul
from minidiff.ops.mse import mse
from minidiff.ops.reduce import max, mean, sum
from minidiff.ops.shape import concat, index, pad, reshape, transpose
from minidiff.ops.silu import silu
from minidiff.ops.softmax import softmax
from minidiff.ops.timestep_embedding import timestep_embedding
from minidiff.ops.upsample import upsample_nearest
from minidiff.tensor import Tensor

__all__ = [
    "Padding", "add", "attention", "concat", "conv2d", "div", "embedding", "exp", "geglu", "gelu",
    "group_norm", "index", "layer_norm", "linear", "log", "matmul", "max", "mean", "mse", "mul",
    "neg", "pad", "power", "reshape", "silu", "softmax", "sqrt", "sub", "sum", "tanh",
    "timestep_embedding", "transpose", "upsample_nearest",
]  # fmt: skip

_METHODS = {
    "__add__": add, "__radd__": add, "__sub__": sub, "__rsub__": lambda a, b: sub(b, a),
    "__mul__": mul, "__rmul__": mul, "__truediv__": div, "__rtruediv__": lambda a, b: div(b, a),
    "__matmul__": matmul, "__rmatmul__": lambda a, b: matmul(b, a),
    "__neg__": neg, "__pow__": power, "__getitem__": index,
    "sum": sum, "mean": mean, "max": max,
    "reshape": lambda x, *shape: reshape(x, shape[0] if shape and isinstance(shape[0], tuple) else shape),
    "transpose": lambda x, *axes: transpose(x, axes),
}  # fmt: skip
for _name, _method in _METHODS.items():
    setattr(Tensor, _name, _method)
