"""The project-wide set-up: the option --require-torch, one run of each op test for every kind of kernels."""

import sys
from pathlib import Path

import helpers
import numpy as np
import pytest

from minidiff.backend import MODULES, kernels

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))  # the exercises' checkers and solutions


def pytest_addoption(parser):
    parser.addoption(
        "--require-torch",
        action="store_true",
        help="fail, instead of skip, where PyTorch, diffusers or transformers is missing",
    )


def pytest_configure(config):
    helpers.skipping_allowed = not config.getoption("--require-torch")


@pytest.fixture(params=list(MODULES))
def kernels_kind(request):
    """The kind of kernels that is active during the test; the test runs once for each kind built here."""
    with kernels(request.param):
        yield request.param


@pytest.fixture
def rng():
    return np.random.default_rng(0)
