"""Pictures of one's own: a folder whose subfolders are classes, or with captions in metadata.jsonl or in .txt files."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from minidiff.data.images import IMAGE_SUFFIXES, Item, stays_inside, tidy
from minidiff.errors import UserError
from minidiff.text.words import split_words

METADATA = "metadata.jsonl"
TABLE = "metadata.csv"
SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test|testing|eval|evaluation)[-_ ]?\d*", re.IGNORECASE)
"""The names of folders that are parts of a data set, such as train or val2017."""


def items(path: Path) -> list[Item]:
    """The pictures below a folder, by path; whether they can be read is found out when they are read.

    The first of three layouts that is there counts:

    `FOLDER/metadata.jsonl`  one object {"file_name": ..., "text": ...} a line, as in Hugging Face's imagefolder
                             (https://huggingface.co/docs/datasets/image_dataset); "caption" is taken for "text", and a
                             list of captions for one; pictures that it does not name are left out
    `FOLDER/x.jpg`, `x.txt`  captions in UTF-8, one a line, for every picture; `x.jpg.txt` is read as well
    `FOLDER/red_panda/x.jpg` caption and label are the class's name, "red panda"; the class may have subfolders

    Hidden files and folders are passed over; symbolic links are followed, but for links to folders in linked folders.
    Raises UserError for a folder without pictures, a picture without a caption, and subfolders that are no classes.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; name a folder of pictures")
    if (path / METADATA).is_file():
        return _from_metadata(path / METADATA)
    if (path / TABLE).is_file():
        raise UserError(f"{path / TABLE} is not read; write {METADATA} with the same, one object a line")
    try:
        pictures = sorted(_pictures(path), key=Path.as_posix)
    except RecursionError as e:
        raise UserError(f"{path} holds folders within folders almost without end; name one further in") from e
    if not pictures:
        raise UserError(f"{path} holds no pictures ({' '.join(sorted(IMAGE_SUFFIXES))}); name another folder")
    texts = [_caption_file(picture) for picture in pictures]
    if any(texts):
        return [Item(picture, _lines(picture, text)) for picture, text in zip(pictures, texts, strict=True)]
    return _from_classes(path, pictures)


def _pictures(folder: Path, above: tuple[Path, ...] = (), linked: bool = False) -> Iterator[Path]:
    """The image files below a folder. Of links to folders, one that leads back above and one in a linked folder are not
    followed: folders that link to each other would never end."""
    real = folder.resolve()
    if real in above:
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            link = entry.is_symlink()
            if not (link and linked):
                yield from _pictures(entry, (*above, real), link or linked)
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            yield entry


def _from_classes(folder: Path, pictures: list[Path]) -> list[Item]:
    loose = [picture for picture in pictures if picture.parent == folder]
    if len(loose) == len(pictures):
        raise UserError(
            f"the pictures in {folder} have no captions; sort them into a folder for each class, or describe them in "
            f"{METADATA} (file_name and text), or beside each in a .txt file of the same name"
        )
    if loose:
        raise UserError(f"{loose[0]} is in no class folder; move it into one of those in {folder}")
    within = [picture.relative_to(folder).parts[:-1] for picture in pictures]
    names = [parts[0] for parts in within]
    described = [
        inner
        for inner in dict.fromkeys(Path(*parts[: i + 1]) for parts in within for i in range(len(parts)))
        if any((folder / inner / table).is_file() for table in (METADATA, TABLE))
    ]
    if described or all(SPLIT.fullmatch(name) for name in names):
        one = folder / (described or names)[0]
        raise UserError(f"the subfolders of {folder} are parts of a data set, not classes; name one, such as {one}")
    if len(set(names)) == 1 and len(set(within)) > 1 and (names[0],) not in within:
        raise UserError(
            f"all pictures are in subfolders of {folder / names[0]}; if these are the classes, name that folder, else "
            "move the pictures up"
        )
    called: dict[tuple[str, ...], str] = {}  # names that differ in no word, such as Cat and cat, are one class
    labels = [_label(folder / name) for name in names]
    labels = [called.setdefault(tuple(split_words(label)), label) for label in labels]
    return [Item(picture, (label,), label) for picture, label in zip(pictures, labels, strict=True)]


def _label(folder: Path) -> str:
    """A class folder's name in words."""
    label = tidy(folder.name.replace("_", " ").replace("-", " "))
    if not split_words(label):
        raise UserError(f"the name of the class folder {folder} holds no words; rename it")
    return label


def _caption_file(picture: Path) -> Path | None:
    ways = picture.with_suffix(".txt"), picture.with_suffix(".TXT"), picture.with_name(f"{picture.name}.txt")
    return next((f for f in ways if f.is_file()), None)


def _lines(picture: Path, text: Path | None) -> tuple[str, ...]:
    """The captions in a picture's text file."""
    if text is None:
        raise UserError(f"{picture} has no {picture.stem}.txt with its caption, though others have; write one")
    captions = _captions(re.split(r"\r\n|\r|\n", _decode(text)))
    if not captions:
        raise UserError(f"{text} holds no words; write a caption into it")
    return captions


def _from_metadata(file: Path) -> list[Item]:
    found: dict[PurePosixPath, Item] = {}
    for number, line in enumerate(_decode(file).split("\n"), 1):  # splitlines would also part a caption at U+2028
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        name, captions = _record(line, where)
        if name in found:
            raise UserError(f"{where} names {name} a second time; put all its captions into one list")
        found[name] = Item(file.parent / name, captions)
    if not found:
        raise UserError(f"{file} is empty; write a line with file_name and text for each picture, or remove it")
    return sorted(found.values(), key=lambda item: item.path.as_posix())


def _record(line: str, where: str) -> tuple[PurePosixPath, tuple[str, ...]]:
    """The file name and the captions in a line of metadata.jsonl."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not JSON ({e}); write one object a line") from e
    name: Any = record.get("file_name") if isinstance(record, dict) else None
    if not isinstance(name, str):
        raise UserError(f'{where} has no "file_name" with text; write {{"file_name": ..., "text": ...}}')
    if "\\" in name:
        raise UserError(f"{where} has a backslash in {reprlib.repr(name)}; write / between folders")
    if not stays_inside(name):
        raise UserError(f"{where} names no file inside the folder, {reprlib.repr(name)}; move it there")
    text = record.get("caption") if record.get("text") is None else record["text"]
    texts = text if isinstance(text, list) else [text]
    if not all(isinstance(t, str) for t in texts):
        raise UserError(f'{where} has no "text" with a caption or a list of captions; add one')
    captions = _captions(texts)
    if not captions:
        raise UserError(f"{where} has a caption without words; write one, or remove the line")
    return PurePosixPath(name), captions


def _captions(texts: list[str]) -> tuple[str, ...]:
    """The texts with single spaces, without those that have no word."""
    return tuple(tidy(text) for text in texts if split_words(text))


def _decode(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{file} is not UTF-8 text (byte {e.start}); save it as UTF-8") from e
