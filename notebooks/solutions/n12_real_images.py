"""Solutions for notebook 12."""

import numpy as np


def visit(s: int, i: int, B: int, N: int) -> tuple[int, int]:
    """12.1: the visits of all steps before come first."""
    return divmod(s * B + i, N)


def agreement(named: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """12.2"""
    A = np.mean(named == asked)
    return A, np.sqrt(A * (1 - A) / len(named))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """12.3: 255 bytes are 2 units, and W is the second axis."""
    a, b = a / 127.5, b / 127.5  # now they are floats
    return float(np.sqrt(min(np.mean((a - b) ** 2), np.mean((a - b[:, ::-1]) ** 2))))
