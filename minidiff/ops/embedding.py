"""Embedding: look rows of a table up by index."""

from __future__ import annotations

import numpy as np

from minidiff.backend import Array, array_module, kernel
from minidiff.tensor import Tensor, as_tensor, record


@kernel
def embedding_forward(ids: Array, table: Array) -> Array:
    """ids (...) integers in [0, V), table (V, D) -> y (..., D)."""
    return table[ids]


@kernel
def embedding_backward(dy: Array, ids: Array, rows: int) -> Array:
    """dtable[i] is the sum of dy over all places where i was looked up."""
    xp = array_module(dy)
    dtable = xp.zeros((rows, dy.shape[-1]), dtype=dy.dtype)
    xp.add.at(dtable, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    return dtable


def embedding(ids: Array, table: Tensor) -> Tensor:
    """Rows of table (V, D) for an integer array ids (...) -> (..., D). Raises IndexError outside [0, V), on a CPU."""
    table = as_tensor(table)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding: ids must be integers, got {ids.dtype}")
    in_memory = array_module(ids) is np  # on a GPU looking would mean waiting
    if in_memory and ids.size and (int(ids.min()) < 0 or int(ids.max()) >= table.shape[0]):
        raise IndexError(f"embedding: ids from {ids.min()} to {ids.max()} do not fit a table of {table.shape[0]} rows")
    y = embedding_forward(ids, table.data)
    return record("embedding", y, (table,), lambda dy: (embedding_backward(dy, ids, table.shape[0]),))
