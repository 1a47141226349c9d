"""COCO captions: photographs with about five captions each (Chen et al. 2015, arXiv:1504.00325).

A caption file is JSON: {"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "caption", ...}]}, as
described at https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from minidiff.data.images import Item, stays_inside, tidy
from minidiff.errors import UserError
from minidiff.text.words import split_words

KINDS = {int: "a whole number", str: "text", list: "a list"}


def items(path: Path, split: str = "train") -> list[Item]:
    """The pictures that have captions, by image id; whether their files exist is found out when they are read.

    path: the folder that holds `annotations/captions_{split}*.json`, such as `captions_train2017.json`, of which there
    must be one; or such a file, and `split` is ignored. Its images are in `train2017/` or `images/train2017/`, beside
    the folder of the caption file.

    Raises UserError where a file or folder is missing, or for an entry that is not as published, is there twice, or
    names a file outside the image folder.
    """
    if path.is_dir():
        file, root = _caption_file(path / "annotations", split), path
    else:
        file, root = path, Path(os.path.abspath(path)).parent.parent
    content = _read(file)
    names = _file_names(content, file)
    captions = _captions(content, file, names)
    folder = _image_folder(file, root)
    found = [Item(folder / names[i], tuple(captions[i])) for i in sorted(names) if captions[i]]
    if not found:
        raise UserError(f"{file} has no image with a caption; take the file as COCO publishes it")
    return found


def _caption_file(folder: Path, split: str) -> Path:
    files = sorted(file for file in folder.glob("captions_*.json") if file.name.startswith(f"captions_{split}"))
    if not files:
        raise UserError(f"there is no {folder / f'captions_{split}'}*.json; unpack COCO's annotations there")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder} holds {names}; name the file to use instead of the folder")
    return files[0]


def _image_folder(file: Path, root: Path) -> Path:
    name = file.stem.removeprefix("captions_")
    if name == file.stem:
        raise UserError(f"{file} is not named after its image folder; call it captions_FOLDER.json")
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return folder
    raise UserError(f"there is no folder {root / name} with the images of {file}; unpack {name}.zip there")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"there is no folder and no caption file {file}; name the folder that COCO was unpacked in")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file} is not JSON, it may be truncated ({e}); unpack it again") from e
    return {name: _field(content, name, list, str(file)) for name in ("images", "annotations")}


def _file_names(content: dict[str, Any], file: Path) -> dict[int, str]:
    """The file name of each image id."""
    names: dict[int, str] = {}
    for i, image in enumerate(content["images"]):
        where = f"{file}: images[{i}]"
        key, name = _field(image, "id", int, where), _field(image, "file_name", str, where)
        if key in names:
            raise UserError(f"{where} has the id {key} of an image before it; correct the file or unpack it again")
        if not stays_inside(name):
            raise UserError(f"{where} names no file inside the image folder, {reprlib.repr(name)}; correct the file")
        names[key] = name
    return names


def _captions(content: dict[str, Any], file: Path, names: dict[int, str]) -> dict[int, list[str]]:
    """The captions of each image id, without those that have no word."""
    captions: dict[int, list[str]] = {key: [] for key in names}
    for i, annotation in enumerate(content["annotations"]):
        where = f"{file}: annotations[{i}]"
        key, text = _field(annotation, "image_id", int, where), _field(annotation, "caption", str, where)
        if key not in captions:
            raise UserError(f"{where} describes the image {key}, which is not listed; correct the file")
        if split_words(text):
            captions[key].append(tidy(text))
    return captions


def _field(entry: Any, name: str, kind: type, where: str) -> Any:
    """A field of a JSON object. Raises UserError for anything but an object with such a field of this type."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if type(value) is not kind:
        got = reprlib.repr(entry)[:80]
        raise UserError(f"{where}: {name!r} must be {KINDS[kind]}, got {got}; take the file as COCO publishes it")
    return value
