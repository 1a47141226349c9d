"""Two-dimensional convolution, written as a matrix product.

y[b, i, j] = bias + sum over (p, q) in the kernel of  x[b, s*i + p - pad, s*j + q - pad] @ W[p, q]

(the cross-correlation that every deep-learning library calls convolution). Channels last: under each output
position lies a window of kh * kw * C_in inputs; laid out as rows (im2col) they meet the weights in one product.
"""

from __future__ import annotations

from minidiff.backend import Array, array_module, kernel
from minidiff.tensor import Tensor, as_tensor, record

Padding = int | tuple[tuple[int, int], tuple[int, int]]  # the same on all sides, or ((top, bottom), (left, right))
Sides = tuple[tuple[int, int], tuple[int, int]]


def pad_image(x: Array, sides: Sides) -> Array:
    """Zeros around the images (B, H, W, C)."""
    (top, bottom), (left, right) = sides
    if not any((top, bottom, left, right)):
        return x
    B, H, W, C = x.shape
    padded = array_module(x).zeros((B, top + H + bottom, left + W + right, C), dtype=x.dtype)
    padded[:, top : top + H, left : left + W] = x
    return padded


def im2col(padded: Array, kh: int, kw: int, stride: int) -> Array:
    """Every window of the padded images as a row: (B, H, W, C) -> (B, H_out, W_out, kh * kw * C)."""
    B, H, W, C = padded.shape
    H_out, W_out = (H - kh) // stride + 1, (W - kw) // stride + 1
    b, h, w, c = padded.strides
    windows = array_module(padded).lib.stride_tricks.as_strided(
        padded, (B, H_out, W_out, kh, kw, C), (b, h * stride, w * stride, h, w, c)
    )
    return windows.reshape(B, H_out, W_out, kh * kw * C)


@kernel
def conv2d_forward(x: Array, w: Array, b: Array | None, stride: int, sides: Sides) -> Array:
    """x (B, H, W, C_in), w (kh, kw, C_in, C_out), b (C_out,) or None -> y (B, H_out, W_out, C_out)."""
    kh, kw, C_in, C_out = w.shape
    columns = im2col(pad_image(x, sides), kh, kw, stride)
    y = columns.reshape(-1, kh * kw * C_in) @ w.reshape(-1, C_out)
    if b is not None:
        y += b
    return y.reshape(*columns.shape[:3], C_out)


@kernel
def conv2d_backward(
    dy: Array, x: Array, w: Array, stride: int, sides: Sides, needs_dx: bool
) -> tuple[Array | None, Array, Array]:
    """dx sends dy @ W[p, q]^T back to where W[p, q] read; dW = columns^T dy; db = the sum of dy."""
    kh, kw, C_in, C_out = w.shape
    H_out, W_out = dy.shape[1:3]
    rows = dy.reshape(-1, C_out)
    padded = pad_image(x, sides)
    dw = im2col(padded, kh, kw, stride).reshape(-1, kh * kw * C_in).T @ rows
    dx = None
    if needs_dx:
        dpadded = array_module(x).zeros_like(padded)
        for p in range(kh):
            for q in range(kw):
                here = dpadded[:, p : p + H_out * stride : stride, q : q + W_out * stride : stride]
                here += (rows @ w[p, q].T).reshape(here.shape)
        (top, _), (left, _) = sides
        dx = dpadded[:, top : top + x.shape[1], left : left + x.shape[2]]
    return dx, dw.reshape(w.shape), rows.sum(axis=0)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: Padding = 0) -> Tensor:
    """Convolution of images (B, H, W, C_in) with weight (kh, kw, C_in, C_out) -> (B, H_out, W_out, C_out).

    padding: zeros around the image, one number or ((top, bottom), (left, right)).
    H_out = (H + top + bottom - kh) // stride + 1. Raises ValueError on shapes that do not fit.
    """
    x, weight, bias = as_tensor(x), as_tensor(weight), None if bias is None else as_tensor(bias)
    if stride < 1:
        raise ValueError(f"conv2d: the stride must be at least 1, got {stride}")
    sides: Sides = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    if x.ndim != 4 or weight.ndim != 4 or x.shape[3] != weight.shape[2]:
        raise ValueError(
            f"conv2d: x {x.shape} does not fit weight {weight.shape}; wanted (B, H, W, C_in), (kh, kw, C_in, C_out)"
        )
    if bias is not None and bias.shape != weight.shape[3:]:
        raise ValueError(f"conv2d: bias {bias.shape} does not fit weight {weight.shape}")
    if any(n + sum(side) < k for n, side, k in zip(x.shape[1:3], sides, weight.shape[:2], strict=True)):
        raise ValueError(f"conv2d: image {x.shape} with padding {sides} is smaller than the kernel {weight.shape}")
    y = conv2d_forward(x.data, weight.data, None if bias is None else bias.data, stride, sides)

    inputs = (x, weight) if bias is None else (x, weight, bias)
    return record(
        "conv2d",
        y,
        inputs,
        lambda dy: conv2d_backward(dy, x.data, weight.data, stride, sides, x.requires_grad)[: len(inputs)],
    )
