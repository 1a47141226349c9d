import os

import numpy as np
import pytest

from minidiff import checkpoint
from minidiff.checkpoint import load_checkpoint, save_checkpoint
from minidiff.errors import UserError


@pytest.fixture
def parts(rng):
    return {"model": {"a.weight": rng.normal(size=(3, 2)).astype("f"), "b": rng.normal(size=4).astype("f")}}


def test_round_trip_is_exact(tmp_path, parts):
    save_checkpoint(tmp_path / "c.safetensors", parts, {"step": 7})
    loaded, about = load_checkpoint(tmp_path / "c.safetensors", ("model", "ema"))
    assert about == {"step": 7}
    assert loaded["ema"] == {}
    for name, array in parts["model"].items():
        assert (loaded["model"][name] == array).all()
        loaded["model"][name] += 1  # the optimizer works in place
    assert os.listdir(tmp_path) == ["c.safetensors"]


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_a_truncated_file_is_named(tmp_path, parts, keep):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, parts, {"step": 7})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"c\.safetensors is truncated or damaged"):
        load_checkpoint(path)


def test_missing_and_foreign_files(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is not a checkpoint of a training run"):
        load_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize("moment", ["save_file", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, parts, monkeypatch, moment):
    """The disk is full, or the machine dies, while the new file is written."""
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, parts, {"step": 1})

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(*((checkpoint, "save_file") if moment == "save_file" else (checkpoint.os, "replace")), fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, parts, {"step": 2})
    assert load_checkpoint(path)[1] == {"step": 1}
