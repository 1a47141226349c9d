"""The matrix product of the last two axes, with the leading axes broadcast."""

from __future__ import annotations

from minidiff.backend import Array
from minidiff.tensor import Tensor, as_tensor, record, unbroadcast


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b: (..., M, K), (..., K, N) -> (..., M, N)."""
    a, b = as_tensor(a), as_tensor(b)
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul: shapes {a.shape} and {b.shape} do not multiply; wanted (..., M, K) and (..., K, N)")

    def backward(dy: Array) -> tuple[Array | None, Array | None]:
        da = unbroadcast(dy @ b.data.swapaxes(-1, -2), a.shape) if a.requires_grad else None
        db = unbroadcast(a.data.swapaxes(-1, -2) @ dy, b.shape) if b.requires_grad else None
        return da, db

    return record("matmul", a.data @ b.data, (a, b), backward)
