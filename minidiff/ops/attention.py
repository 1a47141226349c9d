"""Scaled dot-product attention: softmax(Q K^T * scale + bias) V, in several heads.

Every query asks all keys how well they match, and takes the average of their values with those weights. In
self-attention queries, keys and values come from the same tokens; in cross-attention the queries are the image's
positions, the keys and values the words of the caption. Vaswani et al. 2017, arXiv 1706.03762.
"""

from __future__ import annotations

import math

from minidiff.backend import Array, array_module, kernel
from minidiff.tensor import Tensor, as_tensor, record, recording, unbroadcast


def split_heads(x: Array, heads: int) -> Array:
    """(B, L, heads * d) -> a view (B, heads, L, d)."""
    B, L, D = x.shape
    return x.reshape(B, L, heads, D // heads).transpose(0, 2, 1, 3)


def join_heads(x: Array) -> Array:
    """(B, heads, L, d) -> (B, L, heads * d)."""
    B, heads, L, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, L, heads * d)


def attention_scores(q: Array, k: Array, heads: int, scale: float, bias: Array | None, causal: bool) -> Array:
    """Q K^T * scale + bias: how well each key matches each query, (B, heads, Lq, Lk)."""
    xp = array_module(q)
    scores = split_heads(q, heads) @ split_heads(k, heads).swapaxes(-1, -2)
    scores *= scale
    if bias is not None:
        scores += bias
    if causal:
        Lq, Lk = scores.shape[-2:]
        scores = xp.where(xp.tri(Lq, Lk, dtype=bool), scores, -xp.inf)
    return scores


@kernel
def attention_forward(
    q: Array, k: Array, v: Array, heads: int, scale: float, bias: Array | None, causal: bool, keep: bool = True
) -> tuple[Array, Array | None]:
    """q (B, Lq, D), k (B, Lk, D), v (B, Lk, Dv) -> y (B, Lq, Dv), and to keep for the backward lse (B, heads, Lq).

    lse, the logarithm of the sum of a row's exponentials, gives back the weights, exp(score - lse), without keeping
    them: memory stays linear in the number of tokens for kernels that work by blocks.
    """
    scores = attention_scores(q, k, heads, scale, bias, causal)
    top = scores.max(axis=-1, keepdims=True)
    p = array_module(q).exp(scores - top)
    total = p.sum(axis=-1, keepdims=True)
    p /= total
    return join_heads(p @ split_heads(v, heads)), (top + array_module(q).log(total))[..., 0] if keep else None


@kernel
def attention_backward(
    dy: Array,
    y: Array,
    lse: Array,
    q: Array,
    k: Array,
    v: Array,
    heads: int,
    scale: float,
    bias: Array | None,
    causal: bool,
) -> tuple[Array, Array, Array, Array | None]:
    """With P = exp(S - lse): dV = P^T dY, dS = P (dY V^T - rows of dY . Y), dQ = dS K * scale, dK = dS^T Q * scale.

    The last result is dS (B, heads, Lq, Lk), the gradient of a bias; kernels that never hold it return None.
    """
    p = array_module(q).exp(attention_scores(q, k, heads, scale, bias, causal) - lse[..., None])
    dy_, y_, q_, k_, v_ = (split_heads(a, heads) for a in (dy, y, q, k, v))
    ds = p * (dy_ @ v_.swapaxes(-1, -2) - (dy_ * y_).sum(axis=-1, keepdims=True))
    dq, dk, dv = ds @ k_, ds.swapaxes(-1, -2) @ q_, p.swapaxes(-1, -2) @ dy_
    return join_heads(dq) * scale, join_heads(dk) * scale, join_heads(dv), ds


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int = 1,
    scale: float | None = None,
    bias: Tensor | Array | None = None,
    mask: Array | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(Q K^T * scale + bias) V in `heads` heads: q (B, Lq, D), k (B, Lk, D), v (B, Lk, Dv) -> (B, Lq, Dv).

    scale: 1 / sqrt(D / heads) unless given.
    bias:  added to the scores, anything that broadcasts to (B, heads, Lq, Lk).
    mask:  booleans (B, Lk), False for keys that nobody may see (padding); every row keeps at least one True.
    causal: query i sees keys 0..i only. A query that is left with no key at all gets NaN.
    """
    q, k, v = as_tensor(q), as_tensor(k), as_tensor(v)
    bias = None if bias is None else as_tensor(bias)
    _check_shapes(q, k, v, heads, bias, mask)
    xp = array_module(q.data)
    added = None if bias is None else bias.data
    if mask is not None:
        hidden = xp.where(xp.asarray(mask), 0, -xp.inf).astype(q.dtype)[:, None, None, :]
        added = hidden if added is None else added + hidden
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1] // heads)
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    y, lse = attention_forward(q.data, k.data, v.data, heads, scale, added, causal, recording(inputs))

    def backward(dy: Array) -> tuple[Array, ...]:
        # the bias's own gradient needs the whole of dS, which only the reference holds
        call = attention_backward.reference if bias is not None and bias.requires_grad else attention_backward
        dq, dk, dv, ds = call(dy, y, lse, q.data, k.data, v.data, heads, scale, added, causal)
        return (dq, dk, dv) if bias is None else (dq, dk, dv, None if ds is None else unbroadcast(ds, bias.shape))

    return record("attention", y, inputs, backward)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None, mask: Array | None) -> None:
    if not (q.ndim == k.ndim == v.ndim == 3) or q.shape[::2] != k.shape[::2] or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"attention: wanted q (B, Lq, D), k (B, Lk, D), v (B, Lk, Dv); got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[-1] % heads or v.shape[-1] % heads:
        raise ValueError(f"attention: widths {q.shape[-1]} and {v.shape[-1]} do not split into {heads} heads")
    scores = (q.shape[0], heads, q.shape[1], k.shape[1])
    if bias is not None and (
        bias.ndim > 4 or any(m not in (1, n) for m, n in zip(bias.shape[::-1], scores[::-1], strict=False))
    ):
        raise ValueError(f"attention: bias {bias.shape} does not broadcast to (B, heads, Lq, Lk) = {scores}")
    if mask is not None and (mask.dtype != bool or mask.shape != k.shape[:2]):
        raise ValueError(f"attention: mask must be booleans of shape {k.shape[:2]}, got {mask.dtype} {mask.shape}")
