"""Two-dimensional convolution, written as a matrix product.

y[b, i, j] = bias + sum over (p, q) in the kernel of  x[b, s*i + p - pad, s*j + q - pad] @ W[p, q]

(the cross-correlation that every deep-learning library calls convolution). Channels last: under each output
position lies a window of kh * kw * C_in inputs; laid out as rows (im2col) they meet the weights in one product.
"""

from __future__ import annotations

from minidiff.backend import Array, array_module, kernel
from minidiff.ops.silu import silu as silu_op
from minidiff.ops.silu import silu_forward
from minidiff.ops.upsample import upsample_nearest_backward, upsample_nearest_forward
from minidiff.tensor import Tensor, as_tensor, record, recording, unbroadcast

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


def _seen(x: Array, x2: Array | None, upsample: int) -> Array:
    """The image as the convolution sees it: both inputs' channels, every pixel repeated."""
    if x2 is not None:
        x = array_module(x).concatenate([x, x2], axis=3)
    return x if upsample == 1 else upsample_nearest_forward.reference(x, upsample)


@kernel
def conv2d_forward(
    x: Array, w: Array, b: Array | None, stride: int, sides: Sides,
    x2: Array | None = None, shift: Array | None = None, residual: Array | None = None, upsample: int = 1,
    silu: bool = False,
) -> Array:  # fmt: skip
    """x (B, H, W, C_in), w (kh, kw, C_in, C_out), b (C_out,) or None -> y (B, H_out, W_out, C_out).

    x2: more input channels beside x's. shift (B, C_out) and residual, like y, are added. upsample: times in H and W.
    silu: of the sum.
    """
    kh, kw, C_in, C_out = w.shape
    columns = im2col(pad_image(_seen(x, x2, upsample), sides), kh, kw, stride)
    y = columns.reshape(-1, kh * kw * C_in) @ w.reshape(-1, C_out)
    if b is not None:
        y += b
    y = y.reshape(*columns.shape[:3], C_out)
    if shift is not None:
        y += shift[:, None, None]
    if residual is not None:
        y += residual
    return silu_forward.reference(y) if silu else y


@kernel
def conv2d_backward(
    dy: Array, x: Array, w: Array, stride: int, sides: Sides,
    x2: Array | None = None, upsample: int = 1, needs_dx: bool = True, needs_dw: bool = True,
) -> tuple[Array | None, Array | None, Array | None, Array]:  # fmt: skip
    """dx (and dx2) send dy @ W[p, q]^T back to where W[p, q] read; dW = columns^T dy; dshift sums dy over positions."""
    kh, kw, C_in, C_out = w.shape
    H_out, W_out = dy.shape[1:3]
    rows = dy.reshape(-1, C_out)
    padded = pad_image(_seen(x, x2, upsample), sides)
    dw = im2col(padded, kh, kw, stride).reshape(-1, kh * kw * C_in).T @ rows if needs_dw else None
    dx = dx2 = None
    if needs_dx:
        dpadded = array_module(x).zeros_like(padded)
        for p in range(kh):
            for q in range(kw):
                here = dpadded[:, p : p + H_out * stride : stride, q : q + W_out * stride : stride]
                here += (rows @ w[p, q].T).reshape(here.shape)
        (top, _), (left, _) = sides
        dx = dpadded[:, top : top + x.shape[1] * upsample, left : left + x.shape[2] * upsample]
        if upsample > 1:
            dx = upsample_nearest_backward.reference(dx, upsample)
        if x2 is not None:
            dx, dx2 = dx[..., : x.shape[3]], dx[..., x.shape[3] :]
    return dx, dx2, dw if dw is None else dw.reshape(w.shape), dy.sum(axis=(1, 2))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Padding = 0,
    beside: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: int = 1,
    silu: bool = False,
) -> Tensor:
    """Convolution of images (B, H, W, C_in) with weight (kh, kw, C_in, C_out) -> (B, H_out, W_out, C_out).

    padding: zeros around the image, one number or ((top, bottom), (left, right)).
    H_out = (H + top + bottom - kh) // stride + 1.

    What stands around a convolution in a U-Net costs no pass over the image of its own here:
    beside: a second input (B, H, W, C_2); the weight has C_in + C_2 input channels. The same as conv2d(concat(...)).
    upsample: every pixel is first repeated so many times in height and width.
    shift: (B, C_out), or (1, C_out) for all, and residual (B, H_out, W_out, C_out) are added to the result.
    silu: applied to all that; an op of its own where a gradient is wanted, which needs the numbers before it.

    Raises ValueError on shapes that do not fit.
    """
    x, weight = as_tensor(x), as_tensor(weight)
    bias, beside, shift, residual = (None if a is None else as_tensor(a) for a in (bias, beside, shift, residual))
    if stride < 1 or upsample < 1:
        raise ValueError(f"conv2d: stride and upsample must be at least 1, got {stride} and {upsample}")
    sides: Sides = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    channels = x.shape[-1] + (beside.shape[-1] if beside is not None else 0)
    if x.ndim != 4 or weight.ndim != 4 or channels != weight.shape[2]:
        told = f"x {x.shape}" + (f" beside {beside.shape}" if beside is not None else "")
        raise ValueError(
            f"conv2d: {told} does not fit weight {weight.shape}; wanted (B, H, W, C_in), (kh, kw, C_in, C_out)"
        )
    (B, H, W, _), (kh, kw, _, C_out) = x.shape, weight.shape
    if beside is not None and beside.shape[:3] != (B, H, W):
        raise ValueError(f"conv2d: {beside.shape} does not lie beside x {x.shape}")
    if bias is not None and bias.shape != (C_out,):
        raise ValueError(f"conv2d: bias {bias.shape} does not fit weight {weight.shape}")
    H, W = H * upsample + sum(sides[0]) - kh, W * upsample + sum(sides[1]) - kw
    if H < 0 or W < 0:
        raise ValueError(f"conv2d: image {x.shape} with padding {sides} is smaller than the kernel {weight.shape}")
    shape = (B, H // stride + 1, W // stride + 1, C_out)
    if shift is not None and shift.shape not in ((B, C_out), (1, C_out)):
        raise ValueError(f"conv2d: shift {shift.shape} must be (B, C_out) = {(B, C_out)}, or (1, C_out)")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"conv2d: residual {residual.shape} must be like the result, {shape}")
    inputs = tuple(a for a in (x, beside, weight, bias, shift, residual) if a is not None)
    x2, b, s, r = (None if a is None else a.data for a in (beside, bias, shift, residual))
    if s is not None and len(s) != B:
        s = s.repeat(B, axis=0)
    fused = silu and not recording(inputs)
    y = conv2d_forward(x.data, weight.data, b, stride, sides, x2, s, r, upsample, fused)

    def backward(dy: Array) -> list[Array | None]:
        needs_dx = x.requires_grad or (beside is not None and beside.requires_grad)
        dx, dx2, dw, dshift = conv2d_backward(
            dy, x.data, weight.data, stride, sides, x2, upsample, needs_dx, weight.requires_grad
        )
        dbias = dshift.sum(axis=0) if bias is not None else None
        if shift is not None:
            dshift = unbroadcast(dshift, shift.shape)
        grads = ((x, dx), (beside, dx2), (weight, dw), (bias, dbias), (shift, dshift), (residual, dy))
        return [grad for tensor, grad in grads if tensor is not None]

    out = record("conv2d", y, inputs, backward)
    return silu_op(out) if silu and not fused else out
