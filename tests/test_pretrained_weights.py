"""Safetensors files: every dtype, shards, layouts, keys of any age, and files that are damaged or lie."""

import json
import re
import struct

import numpy as np
import pytest
from folders import tensors, write_json
from safetensors.numpy import save_file
from test_vae import TINY, randomised

from minidiff.errors import UserError
from minidiff.models import VAE
from minidiff.nn import Conv2d, Embedding, Linear, Module
from minidiff.pretrained.weights import (
    clip_keys,
    current_keys,
    load_weights,
    open_weights,
    our_axes,
    their_layout,
)


class Net(Module):
    """One of each layout, large enough to be turned in several pieces."""

    def __init__(self):
        self.conv = Conv2d(70, 90, kernel=3)
        self.linear = Linear(1000, 700)
        self.token_embedding = Embedding(5, 7, 1.0)


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (90, 70, 3, 3), "conv.bias": (90,), "linear.weight": (700, 1000), "linear.bias": (700,),
              "token_embedding.weight": (5, 7)}  # fmt: skip
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(path, header, data=b"", length=None):
    """A safetensors file by hand; length: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def write_arrays(path, stored, kind, encode):
    """Arrays as the given dtype of the file; the data begin at an odd place."""
    header, data = {"__metadata__": {"x": "y" * 3}}, b""
    for name, array in stored.items():
        part = encode(array).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    write(path, header, data)


def upper_half(array):
    """A float32's bits cut to a bfloat16's."""
    return (array.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
def test_every_dtype_becomes_float32_in_our_layout(kind, tmp_path):
    encode = {"F64": np.float64, "F32": np.float32, "F16": np.float16}.get(kind)
    stored = arrays()
    write_arrays(tmp_path / "w.safetensors", stored, kind, upper_half if kind == "BF16" else lambda a: a.astype(encode))
    found = open_weights(tmp_path, "w")
    net = Net()
    load_weights(net, found, "w")
    for name, p in net.named_parameters():
        wanted = stored[name]
        if kind == "BF16":
            wanted = (upper_half(wanted).astype(np.uint32) << 16).view(np.float32)
        elif kind == "F16":
            wanted = wanted.astype(np.float16).astype(np.float32)
        assert p.data.dtype == np.float32 and p.data.flags.c_contiguous
        assert np.array_equal(their_layout(name, p.data), wanted), name


def test_layouts_by_hand():
    a = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert a.transpose(our_axes("conv.weight", 4))[1, 2, 0, 1] == a[1, 0, 1, 2]
    assert our_axes("linear.weight", 2) == (1, 0) and our_axes("norm.weight", 1) is None
    assert our_axes("embeddings.position_embedding.weight", 2) is None
    assert our_axes("time_embedding.linear_1.weight", 2) == (1, 0)


def test_nothing_is_read_before_it_is_wanted_and_no_page_stays(tmp_path):
    """The file is mapped for one tensor at a time; what was read is a copy that outlives it."""
    save_file(arrays(), tmp_path / "w.safetensors")
    found = open_weights(tmp_path, "w")
    assert {name: tensor.shape for name, tensor in found.items()} == {n: a.shape for n, a in arrays().items()}
    kept = found["linear.bias"].read()
    (tmp_path / "w.safetensors").unlink()
    assert np.array_equal(kept, arrays()["linear.bias"])


def test_a_tensor_without_elements(tmp_path):
    save_file({"nothing": np.zeros((0, 3), np.float32)}, tmp_path / "w.safetensors")
    assert open_weights(tmp_path, "w")["nothing"].read().shape == (0, 3)


# ---- shards and variants


def write_shards(folder):
    stored = arrays()
    names = sorted(stored)
    files = {name: f"w-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: stored[name] for name in names if files[name] == file}, folder / file)
    write_json(folder / "w.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": files})
    return files


def test_shards(tmp_path):
    write_shards(tmp_path)
    net = Net()
    load_weights(net, open_weights(tmp_path, "w"), "w")
    assert np.array_equal(net.linear.weight.data.T, arrays()["linear.weight"])


def test_half_precision_variants_are_taken_where_there_is_nothing_else(tmp_path):
    save_file(arrays(np.float64), tmp_path / "w.non_ema.safetensors")
    with pytest.raises(UserError, match=r"has no w\.safetensors but w\.non_ema\.safetensors; rename the one"):
        open_weights(tmp_path, "w")
    save_file(arrays(np.float16), tmp_path / "w.bf16.safetensors")
    assert open_weights(tmp_path, "w")["conv.bias"].file.name == "w.bf16.safetensors"
    save_file(arrays(np.float16), tmp_path / "w.fp16.safetensors")
    assert open_weights(tmp_path, "w")["conv.bias"].file.name == "w.fp16.safetensors"
    save_file(arrays(), tmp_path / "w.safetensors")
    assert open_weights(tmp_path, "w")["conv.bias"].kind == "F32"


@pytest.mark.parametrize(
    "weight_map, told",
    [
        ({"conv.weight": "../w.safetensors"}, "names '../w.safetensors', which is not a .safetensors file in its own"),
        ({"conv.weight": "/tmp/w.safetensors"}, "not a .safetensors file in its own folder"),
        ({"conv.weight": "sub/w.safetensors"}, "not a .safetensors file in its own folder"),
        ({"conv.weight": ".."}, "not a .safetensors file in its own folder"),
        ({"conv.weight": "a\0.safetensors"}, "not a .safetensors file in its own folder"),
        ({"conv.weight": "a\n.safetensors"}, "not a .safetensors file in its own folder"),
        ({"conv.weight": "\ud800.safetensors"}, "not a .safetensors file in its own folder"),
        ({"conv.weight": "w.bin"}, "not a .safetensors file in its own folder"),
        ({"conv.weight": "gone.safetensors"}, "gone.safetensors is missing, truncated or damaged (No such file"),
        ({"other": "w-00001-of-00002.safetensors"}, "names what is not there: other in w-00001-of-00002.safetensors"),
        ({}, "has no weight_map"),
        (["conv.weight"], "has no weight_map"),
        ({"conv.weight": 7}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_bad_shards_are_one_sentence(weight_map, told, tmp_path):
    write_shards(tmp_path)
    write_json(tmp_path / "w.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        open_weights(tmp_path, "w")
    assert "\n" not in str(caught.value)


# ---- damaged and hostile files

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
DAMAGED = {
    "empty": lambda f: f.write_bytes(b""),
    "a few bytes": lambda f: f.write_bytes(b"\x10\0\0"),
    "a header longer than the file": lambda f: write(f, GOOD, b"\0" * 8, length=10**6),
    "a header of 2^60 bytes": lambda f: write(f, GOOD, b"\0" * 8, length=2**60),
    "a header that is not JSON": lambda f: write(f, b"{]", b"\0" * 8),
    "a header that is a list": lambda f: write(f, [1], b"\0" * 8),
    "a truncated tensor": lambda f: write(f, GOOD, b"\0" * 7),
    "bytes after the last": lambda f: write(f, GOOD, b"\0" * 9),
    "offsets beyond the file": lambda f: write(f, {"a": {**GOOD["a"], "data_offsets": [8, 16]}}, b"\0" * 8),
    "offsets backwards": lambda f: write(f, {"a": {**GOOD["a"], "data_offsets": [8, 0]}}, b"\0" * 8),
    "negative offsets": lambda f: write(f, {"a": {**GOOD["a"], "data_offsets": [-8, 0]}}, b"\0" * 8),
    "a shape of another size": lambda f: write(f, {"a": {**GOOD["a"], "shape": [3]}}, b"\0" * 8),
    "a shape that overflows": lambda f: write(f, {"a": {**GOOD["a"], "shape": [2**62, 8]}}, b"\0" * 8),
    "a dtype that is none": lambda f: write(f, {"a": {**GOOD["a"], "dtype": "F31"}}, b"\0" * 8),
    "overlapping tensors": lambda f: write(f, {**GOOD, "b": GOOD["a"]}, b"\0" * 8),
    "a folder": lambda f: f.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_one_sentence(damage, tmp_path):
    DAMAGED[damage](tmp_path / "w.safetensors")
    with pytest.raises(
        UserError, match=r"w\.safetensors is missing, truncated or damaged \(.*\); download it again"
    ) as e:
        open_weights(tmp_path, "w")
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_a_git_lfs_pointer_is_not_the_weights(tmp_path):
    (tmp_path / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(UserError, match="is a Git LFS pointer, not the weights; fetch them with: git lfs pull"):
        open_weights(tmp_path, "w")


@pytest.mark.parametrize("name", ["w.bin", "model.ckpt", "w.pt", "x.pth"])
def test_pickles_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(UserError, match=rf"as a pickle alone \({name}\), which can run any program.*save_pretrained"):
        open_weights(tmp_path, "w")


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"has no w\.safetensors \(nor shards of it\)"):
        open_weights(tmp_path, "w")


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    stored = arrays()
    del stored["conv.bias"]
    stored |= {"extra": np.zeros(1, np.float32), "linear.bias": np.zeros(3, np.float32)}
    save_file(stored, tmp_path / "w.safetensors")
    net = Net()
    with pytest.raises(
        UserError,
        match=re.escape(
            "HERE: the weights do not fit the model (missing: conv.bias; not in the model: extra; "
            "of another shape: linear.bias (3,) instead of (700,))"
        ),
    ):
        load_weights(net, open_weights(tmp_path, "w"), "HERE")
    assert all(p.data.size == 0 for p in net.parameters())


def test_weights_of_integers_are_refused(tmp_path):
    save_file({**arrays(), "conv.bias": np.zeros(90, np.int8)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"not conv\.bias \(I8\)"):
        load_weights(Net(), open_weights(tmp_path, "w"), "w")


# ---- keys


def test_keys_of_transformers_of_any_age():
    today = {"embeddings.token_embedding.weight": 1, "encoder.layers.0.mlp.fc1.bias": 2, "final_layer_norm.weight": 3}
    older = {**{f"text_model.{name}": value for name, value in today.items()}, "text_model.embeddings.position_ids": 4}
    wanted = {"token_embedding.weight": 1, "layers.0.mlp.fc1.bias": 2, "final_layer_norm.weight": 3}
    assert clip_keys(today) == clip_keys(older) == wanted


def test_older_keys_in_a_file(tmp_path):
    vae = randomised(TINY, np.float32)
    save_file(older_keys(tensors(vae), lambda a: a[..., None, None].copy()), tmp_path / "w.safetensors")
    again = VAE(TINY, seed=None)
    load_weights(again, current_keys(open_weights(tmp_path, "w")), "w")
    for (name, p), q in zip(vae.named_parameters(), again.parameters(), strict=True):
        assert np.array_equal(p.data, q.data), name


# ---- weights from before diffusers 0.17

OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def older_keys(state, matrix):
    """The state with the keys of before 0.17; matrix: what becomes of the attention's matrices."""
    older = {}
    for name, array in state.items():
        for now, before in OLDER.items():
            if f".attentions.0.{now}." in name:
                name, array = name.replace(now, before), array if array.ndim == 1 else matrix(array)
        older[name] = array
    return older


@pytest.mark.parametrize(
    "matrix",
    [lambda a: a, lambda a: a[None, None], lambda a: a[..., None, None], lambda a: a[..., None]],
    ids=["linear", "1x1 convolution in our layout", "in theirs", "1-d convolution"],
)
def test_older_keys_are_renamed(matrix):
    state = randomised(TINY).state()
    older = older_keys(state, matrix)
    assert len(older.keys() - state.keys()) == 16
    current = current_keys(older)
    assert list(current) == list(state)
    for name, array in state.items():
        assert current[name].shape == array.shape and np.shares_memory(current[name], array), name
    VAE(TINY, seed=None).load(current)


def test_keys_of_today_and_of_other_attentions_stay():
    names = [*VAE(TINY, seed=None).state(), "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
             "down_blocks.0.attentions.0.proj_in.weight", "key.weight", "attentions.0.query.scale"]  # fmt: skip
    state = {name: np.zeros((1, 1, 3, 3)) for name in names}
    current = current_keys(state)
    assert list(current) == names and all(a.shape == (1, 1, 3, 3) for a in current.values())


def test_an_older_bias_of_no_elements_is_no_bias():
    """A shape with a 0 in it is not the shape without it: other bytes of the file would be read."""
    older = {"mid_block.attentions.0.query.bias": np.zeros((8, 0, 1))}
    assert current_keys(older)["mid_block.attentions.0.to_q.bias"].shape == (8, 0)


def test_older_keys_beside_those_of_today_are_refused():
    state = randomised(TINY).state()
    twice = {**state, **older_keys(state, lambda a: a)}
    with pytest.raises(UserError, match=r"attentions.0.query.weight beside .*encoder.mid_block.attentions.0.to_q.wei"):
        current_keys(twice)
