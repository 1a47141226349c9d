import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

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


@pytest.mark.parametrize("error", [OSError, SafetensorError])
@pytest.mark.parametrize("moment", ["save_file", "replace"])
def test_a_failed_write_leaves_the_old_file_and_says_so(tmp_path, parts, monkeypatch, moment, error):
    """The disk is full, or the machine dies, while the new file is written."""
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, parts, {"step": 1})

    def fail(*args, **kwargs):
        raise error("no space left")

    monkeypatch.setattr(*((checkpoint, "save_file") if moment == "save_file" else (checkpoint.os, "replace")), fail)
    with pytest.raises(UserError, match=r"cannot write .*c\.safetensors \(no space left\); make room"):
        save_checkpoint(path, parts, {"step": 2})
    assert load_checkpoint(path)[1] == {"step": 1} and os.listdir(tmp_path) == ["c.safetensors"]


def test_a_folder_that_cannot_be_written(parts):
    with pytest.raises(UserError, match=r"cannot write /dev/null/c\.safetensors"):
        save_checkpoint(Path("/dev/null/c.safetensors"), parts, {})


def test_others_may_read_it_as_any_new_file(tmp_path, parts):
    (tmp_path / "new").touch()
    save_checkpoint(tmp_path / "c.safetensors", parts, {})
    assert (tmp_path / "c.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
    (tmp_path / "newer").touch()
    assert (tmp_path / "newer").stat().st_mode == (tmp_path / "new").stat().st_mode  # the mask is what it was
