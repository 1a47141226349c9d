"""Weights in safetensors files: read where they lie, and turned into our layouts on the way.

A file is mapped into memory, not loaded: each tensor is read from the disk when it is converted, and its pages are
given back before the next. So the weights are in memory once.

    theirs                                ours
    convolution (out, in, kh, kw)         (kh, kw, in, out)
    linear      (out, in)                 (in, out)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from minidiff.backend import Array, to_numpy
from minidiff.errors import UserError
from minidiff.files import listed, read_json
from minidiff.nn import Module
from minidiff.threads import num_threads, parallel_map

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""What a weight may be stored as; NumPy has no bfloat16, whose bits are the upper half of a float32's."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, not read yet."""

    file: Path
    kind: str  # its dtype, as the file's header calls it
    offset: int  # in bytes
    stored: tuple[int, ...]  # its shape in the file
    axes: tuple[int, ...] | None = None  # the order of those axes in our layout; None: as stored

    @property
    def shape(self) -> tuple[int, ...]:
        """In our layout."""
        return self.stored if self.axes is None else tuple(self.stored[axis] for axis in self.axes)

    @property
    def ndim(self) -> int:
        """How many axes."""
        return len(self.stored)

    def reshape(self, shape: Any) -> Stored:
        """The same numbers in another shape, as an array's; before any `axes`."""
        return replace(self, stored=tuple(shape))

    def read(self) -> np.ndarray:
        """The numbers, float32 (*shape), contiguous."""
        y = np.empty(self.shape, np.float32)
        if not y.size:
            return y
        x = np.memmap(self.file, DTYPES[self.kind], "r", self.offset, self.stored)
        whole = y.transpose(np.argsort(self.axes)) if self.axes is not None else y  # y, with the file's axes
        rows = max(1, 2**18 // max(1, y.size // len(x)))  # few enough that they stay in the cache while they are turned
        for i in range(0, len(x), rows):
            part, out = x[i : i + rows], whole[i : i + rows]
            if self.kind == "BF16":
                np.left_shift(part, 16, out=out.view(np.uint32), dtype=np.uint32)
            else:
                np.copyto(out, part, casting="same_kind")
        return y


def our_axes(name: str, ndim: int) -> tuple[int, ...] | None:
    """The order of a stored tensor's axes in our layout; None where it stays."""
    if ndim == 4:
        return (2, 3, 1, 0)
    return (1, 0) if ndim == 2 and not name.endswith("embedding.weight") else None


def their_layout(name: str, array: Array) -> np.ndarray:
    """Our array as the files have it, contiguous."""
    axes, array = our_axes(name, array.ndim), to_numpy(array)
    return np.ascontiguousarray(array if axes is None else array.transpose(np.argsort(axes)))


def open_weights(folder: Path, stem: str) -> dict[str, Stored]:
    """The tensors of STEM.safetensors, of its shards or of its half precision variants, by their names in the files.

    Nothing but the headers is read. Raises UserError for what is missing, damaged, or only there as a pickle.
    """
    for variant in ("", ".fp16", ".bf16"):
        if (file := folder / f"{stem}{variant}.safetensors").exists():
            return _tensors(file)
        if (index := folder / f"{stem}.safetensors.index{variant}.json").exists():
            return _sharded(index)
    others = sorted(file.name for file in folder.glob(f"{stem}.*.safetensors"))
    if others:
        raise UserError(f"{folder} has no {stem}.safetensors but {listed(others)}; rename the one that you mean")
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder} holds its weights as a pickle alone ({pickles[0]}), which can run any program when it is read; "
            "convert it where you trust it: load the model with diffusers or transformers and call "
            f"save_pretrained(FOLDER, safe_serialization=True), which writes {stem}.safetensors"
        )
    raise UserError(f"{folder} has no {stem}.safetensors (nor shards of it); download the folder again, all of it")


def _sharded(index: Path) -> dict[str, Stored]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index} has no weight_map of tensors and their files")
    for file in files.values():
        if Path(file).name != file or not file.endswith(".safetensors") or not file.isprintable():
            raise UserError(f"{index} names {file[:80]!r}, which is not a .safetensors file in its own folder")
    shards = {file: _tensors(index.parent / file) for file in sorted(set(files.values()))}
    missing = [f"{name} in {file}" for name, file in files.items() if name not in shards[file]]
    if missing:
        raise UserError(f"{index} names what is not there: {listed(missing)}; download the folder again")
    return {name: shards[file][name] for name, file in files.items()}


def _tensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="numpy"):  # it checks the header: sizes, offsets, and that the file is whole
            pass
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        if _is_pointer(file):
            raise UserError(f"{file} is a Git LFS pointer, not the weights; fetch them with: git lfs pull") from e
        what = str(e.strerror if isinstance(e, OSError) and e.strerror else e)[:150]
        raise UserError(f"{file} is missing, truncated or damaged ({what}); download it again") from e
    header.pop("__metadata__", None)
    return {
        name: Stored(file, told["dtype"], 8 + length + told["data_offsets"][0], tuple(told["shape"]))
        for name, told in header.items()
    }


def _is_pointer(file: Path) -> bool:
    try:
        with open(file, "rb") as f:
            return f.read(24) == b"version https://git-lfs."
    except OSError:
        return False


def load_weights(module: Module, stored: Mapping[str, Stored], source: str) -> None:
    """Give the module's parameters the stored tensors, by the keys that diffusers and transformers have today.

    Raises UserError naming what is missing, left over, of another shape or not made of floats, before any is read.
    """
    state = {name: replace(tensor, axes=our_axes(name, tensor.ndim)) for name, tensor in stored.items()}
    foreign = [f"{name} ({tensor.kind})" for name, tensor in state.items() if tensor.kind not in DTYPES]
    if foreign:
        raise UserError(f"{source}: weights are float32, float16, bfloat16 or float64, not {listed(foreign)}")
    try:
        module.check({name: tensor.shape for name, tensor in state.items()}, f"{source}: the weights")
    except ValueError as e:
        raise UserError(str(e)) from e
    parameters = dict(module.named_parameters())
    arrays = parallel_map(lambda name: state[name].read(), parameters, num_threads())
    for parameter, array in zip(parameters.values(), arrays, strict=True):
        parameter.data = array


# ---- their keys

_CLIP_PREFIX = re.compile(r"^text_model\.|(?<![a-z_])(?:embeddings|encoder)\.")


def clip_keys(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """A CLIPTextModel's tensors by our paths, without position_ids, the numbers 0, 1, 2, ... of older files."""
    state = {_CLIP_PREFIX.sub("", name): tensor for name, tensor in stored.items()}
    state.pop("position_ids", None)
    return state


_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLDER_KEY = re.compile(rf"\.attentions\.\d+\.({'|'.join(_OLDER)})\.(weight|bias)$")


def current_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by the keys that diffusers has had since 0.17, whatever their age; the arrays are not copied.

    Before, the self-attention over an image's positions (AutoencoderKL's, UNet2DModel's) had query, key, value and
    proj_attn for to_q, to_k, to_v and to_out.0, in some files as 1x1 convolutions. Works in their layout and in ours.
    Raises UserError where a file has both.
    """
    current = {}
    for name, array in state.items():
        older = _OLDER_KEY.search(name)
        if older:
            name = f"{name[: older.start(1)]}{_OLDER[older[1]]}.{older[2]}"
            if array.ndim > 2:
                array = array.reshape([n for n in array.shape if n != 1])
            if name in state:
                raise UserError(f"the weights have {older[0][1:]} beside {name}, which is the same of today")
        current[name] = array
    return current
