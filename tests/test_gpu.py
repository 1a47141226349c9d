"""Every rung of every ladder on a GPU, on small ragged arrays: what the sanitizers watch, and the first to fail."""

import importlib

import numpy as np
import pytest
from helpers import no_gpu
from rungs import every_rung, results, standing_on, wrong

if no_gpu():
    pytest.skip(no_gpu(), allow_module_level=True)

_cuda = importlib.import_module("minidiff._cuda")


@pytest.fixture(params=every_rung(_cuda), ids=lambda p: f"{p[0]}-{p[1]}")
def rung(request):
    """A case standing on one of its rungs, and how coarse that is."""
    case, number = request.param
    yield case, standing_on(_cuda, case, number)
    standing_on(_cuda, case, 0)


def test_a_rung_is_right(rung):
    case, coarse = rung
    assert wrong(case, "cuda", coarse) <= 1


def test_a_rung_gives_the_same_bits_again(rung):
    case, _ = rung
    for first, second in zip(results(case, "cuda"), results(case, "cuda"), strict=True):
        assert np.array_equal(first, second)
