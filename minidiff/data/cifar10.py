"""CIFAR-10 in every form in which people have it: two folders and two archives, none of them ever unpacked or executed.

    cifar-10-batches-py/   cifar-10-python.tar.gz  data_batch_1..5, test_batch: pickles of 3 x 32 x 32 planes, labels
    cifar-10-batches-bin/  cifar-10-binary.tar.gz  the same with .bin: for an image, a label byte and 3072 of planes

A pickle is a program. The published batches need three of NumPy's names; `_Unpickler` admits those, puts inert classes
in their place, and stops at anything else. Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from minidiff.data.images import tidy
from minidiff.errors import UserError
from minidiff.text.words import split_words

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
PIXELS = 3 * SIDE * SIDE
MOST_IMAGES = 10_000  # in one batch file
MOST_BYTES = 40_000_000  # of one batch file; the published ones have 31 million
MOST_IN_ARCHIVE = 8 * MOST_BYTES
MOST_OPCODES = 200_000  # in a pickle; the published ones have 30,000
MOST_MEMBERS = 1000  # of an archive; the published ones have 9
MOST_COSTLY = 40  # of COSTLY in a pickle; the published ones have few
COSTLY = frozenset("GET BINGET LONG_BINGET DUP TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET INT LONG LONG1 LONG4".split())
"""Opcodes for references to what was there before, nesting, and long numbers: of these, keys can be made that fill the
memory, exhaust the stack, or take ages to hash or to tell apart."""

FOLDERS = {"cifar-10-batches-bin": "binary", "cifar-10-batches-py": "python"}
ARCHIVES = {"cifar-10-binary.tar.gz": "binary", "cifar-10-python.tar.gz": "python"}
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
NAMES = {"binary": "batches.meta.txt", "python": "batches.meta"}
AGAIN = "remove this CIFAR-10 and fetch it again: minidiff download cifar10"


def captions(name: str) -> tuple[str, ...]:
    """What a picture of this class may be called; one of them is drawn at each visit."""
    article = "an" if name[0] in "aeiou" else "a"
    return tuple(template.format(f"{article} {name}") for template in ("{}", "a photo of {}", "a picture of {}"))


def read(path: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 (N, 32, 32, 3), labels (N,) in 0..9 and the ten class names, of "train" or "test".

    path: one of the four forms, or a folder that holds one. Raises UserError naming the file that is missing, damaged,
    too large, or holds what a batch does not hold.
    """
    source, form = locate(path)
    suffix = ".bin" if form == "binary" else ""
    wanted = [f"{stem}{suffix}" for stem in BATCHES[split]]
    files = _from_archive(source, form) if source.is_file() else _from_folder(source)
    parse = _parse_records if form == "binary" else _parse_pickle
    parts = []
    for name in wanted:
        data = files(name)
        if data is None:
            raise UserError(f"{source} lacks {name}; {AGAIN}")
        parts.append(parse(data, f"{source}/{name}"))
    planes, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    sizes = [len(part[1]) for part in parts]
    most, beside = max(sizes), BATCHES["train"][0] + suffix
    if split == "test" and most < MOST_IMAGES and (data := files(beside)) is not None:  # its one batch has no other
        most = len(parse(data, f"{source}/{beside}")[1])
    if most == MOST_IMAGES > min(sizes):
        short = wanted[sizes.index(min(sizes))]
        raise UserError(
            f"{source}/{short} has {min(sizes):,} images and others {MOST_IMAGES:,}: it is truncated; {AGAIN}"
        )
    images = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels, _class_names(files(NAMES[form]), form, f"{source}/{NAMES[form]}")


def locate(path: Path) -> tuple[Path, str]:
    """The folder or archive that `path` is or holds, and its form: "binary" or "python"."""
    for candidates, there in ((FOLDERS, Path.is_dir), (ARCHIVES, Path.is_file)):
        for name, form in candidates.items():
            if there(path / name):
                return path / name, form
            if name in (path.name, path.resolve().name) and there(path):
                return path, form
    folder = path.parent if path.is_file() or path.suffix == ".gz" else path
    raise UserError(
        f"there is no CIFAR-10 in {path}: wanted {', '.join((*FOLDERS, *ARCHIVES))}; "
        f"fetch it: minidiff download cifar10 --out {folder}"
    )


def files_of(path: Path) -> list[Path]:
    """The files that hold the images, for a fingerprint."""
    source, _ = locate(path)
    return [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())


# ---- bytes of one file in a folder or an archive: name -> bytes, or None where there is none


def _from_folder(folder: Path) -> Callable[[str], bytes | None]:
    def file(name: str) -> bytes | None:
        path = folder / name
        if not path.is_file():
            return None
        try:
            _check_size(path.stat().st_size, str(path))
            return path.read_bytes()
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror or e}); check its permissions and the disk") from e

    return file


def _from_archive(archive: Path, form: str) -> Callable[[str], bytes | None]:
    folder = next(name for name, kind in FOLDERS.items() if kind == form)
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_unpacked(archive)), mode="r:") as tar:
            for number, member in enumerate(tar):
                if number == MOST_MEMBERS:
                    raise UserError(f"{archive} has over {MOST_MEMBERS} members, more than CIFAR-10 can have; {AGAIN}")
                name, where = _member_path(member, archive), f"{archive}: its member {member.name[:80]!r}"
                if member.isreg() and str(name.parent) == folder:
                    if name.name in contents:
                        raise UserError(f"{where} is there twice; {AGAIN}")
                    _check_size(member.size, where)
                    stored = tar.extractfile(member)
                    assert stored is not None  # a regular file
                    contents[name.name] = stored.read()
    except UserError:
        raise
    except Exception as e:  # damaged headers raise more than tarfile's own errors
        raise UserError(f"{archive} is damaged ({e}); remove it and fetch it again") from e
    return contents.get


def _unpacked(archive: Path) -> bytes:
    """The tar in a .tar.gz. It is read to the end of the file, where the checksum is: tarfile stops before."""
    try:
        with gzip.open(archive) as file:
            data = file.read(MOST_IN_ARCHIVE + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"{archive} is truncated or damaged ({e}); remove it and fetch it again") from e
    except OSError as e:
        raise UserError(f"{archive} cannot be read ({e.strerror or e}); check its permissions and the disk") from e
    if len(data) > MOST_IN_ARCHIVE:
        raise UserError(f"{archive} unpacks to over {MOST_IN_ARCHIVE:,} bytes; {AGAIN}")
    return data


def _member_path(member: tarfile.TarInfo, archive: Path) -> PurePosixPath:
    name, where = PurePosixPath(member.name), f"{archive}: its member {member.name[:80]!r}"
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where} points outside the archive; {AGAIN}")
    if not (member.isreg() or member.isdir()):
        raise UserError(f"{where} is a link or a device; {AGAIN}")
    if member.size < 0:  # tarfile would go back, and read the same members for ever
        raise UserError(f"{where} has a negative size; {AGAIN}")
    return name


def _check_size(size: int, where: str) -> None:
    if size > MOST_BYTES:
        raise UserError(f"{where} has {size:,} bytes, more than a file of CIFAR-10 can have; {AGAIN}")


# ---- one batch file -> planes uint8 (n, 3072) and labels (n,)


def _parse_records(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    if not data or len(data) % (1 + PIXELS):
        raise UserError(
            f"{where} has {len(data):,} bytes, which are no whole number of records of {1 + PIXELS}: it is truncated "
            f"or not a batch of CIFAR-10; {AGAIN}"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return records[:, 1:], _checked_labels(records[:, 0], where)


def _parse_pickle(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    record = _unpickle(data, where)
    if b"fine_labels" in record:
        raise UserError(f"{where} is a batch of CIFAR-100, not of CIFAR-10; {AGAIN}")
    pixels, labels = record.get(b"data"), record.get(b"labels")
    if not isinstance(pixels, _Array) or not isinstance(labels, list):
        raise UserError(f"{where} is no batch of CIFAR-10: it lacks the array 'data' or the list 'labels'; {AGAIN}")
    planes = pixels.planes(where)
    if len(labels) != len(planes):
        raise UserError(f"{where} has {len(labels)} labels for {len(planes)} images; {AGAIN}")
    if not all(type(label) is int for label in labels):
        raise UserError(f"{where} has labels that are not whole numbers; {AGAIN}")
    return planes, _checked_labels(labels, where)


def _checked_labels(labels: Any, where: str) -> np.ndarray:
    if not 0 < len(labels) <= MOST_IMAGES:
        raise UserError(f"{where} has {len(labels)} images; a batch of CIFAR-10 has 1 to {MOST_IMAGES}; {AGAIN}")
    wrong = next((i for i, label in enumerate(labels) if not 0 <= label < len(CLASSES)), None)
    if wrong is not None:
        raise UserError(f"{where}: the label of its image {wrong} is not in 0..{len(CLASSES) - 1}; {AGAIN}")
    return np.array(labels, np.int64)


def _class_names(data: bytes | None, form: str, where: str) -> tuple[str, ...]:
    if data is None:
        return CLASSES
    if form == "binary":
        names: Any = data.split()
    else:
        names = _unpickle(data, where).get(b"label_names")
    texts = [_text(name) for name in names] if isinstance(names, list) and len(names) == len(CLASSES) else []
    if len({words for text in texts if (words := tuple(split_words(text)))}) != len(CLASSES):
        raise UserError(f"{where} does not name {len(CLASSES)} different classes; {AGAIN}")
    return tuple(texts)


def _text(name: Any) -> str:
    """A class name, which is bytes or text; of anything else ""."""
    if isinstance(name, bytes):
        try:
            name = name.decode("utf-8-sig")
        except UnicodeDecodeError:
            name = name.decode("latin-1")
    return tidy(name).lower() if isinstance(name, str) else ""


# ---- pickles, without what they could do


class _Dtype:
    """Stands where a pickle asks for numpy.dtype."""

    __slots__ = ("code",)

    def __init__(self, code: Any = None, *rest: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and the like; one byte has none


class _Array:
    """Stands where a pickle asks for numpy.ndarray or for its reconstruction."""

    __slots__ = ("state",)

    def __init__(self, *rest: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def planes(self, where: str) -> np.ndarray:
        """The pixels uint8 (n, 3072) that the state describes."""
        try:
            _, (n, width), dtype, columns_first, data = self.state
            fits = (dtype.code in (b"u1", "u1") and width == PIXELS and type(n) is int and not columns_first) and (
                isinstance(data, bytes) and len(data) == n * PIXELS
            )
        except (TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise UserError(f"{where}: its pixels are no array of bytes, {PIXELS} an image; {AGAIN}")
        return np.frombuffer(data, np.uint8).reshape(n, PIXELS)


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The inert class for a name that the published files hold; nothing else is looked up."""
        try:
            return _ADMITTED[module, name]
        except KeyError:
            what = f"{module}.{name}"[:80]
            raise pickle.UnpicklingError(f"it asks for {what!r}, which no file of CIFAR-10 needs") from None


def _check_cost(data: bytes) -> None:
    """Refuse what makes a small pickle fill the memory, exhaust the stack, or take ages."""
    costly = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == MOST_OPCODES:
            raise pickle.UnpicklingError(f"it has over {MOST_OPCODES} parts")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):  # type: ignore[operator]
            raise pickle.UnpicklingError(f"it asks for {argument} places in memory")
        costly += opcode.name in COSTLY
        if costly > MOST_COSTLY:
            raise pickle.UnpicklingError(f"it holds over {MOST_COSTLY} tuples, long numbers and references")


def _unpickle(data: bytes, where: str) -> dict[bytes, Any]:
    try:
        _check_cost(data)
        record = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as e:  # a damaged pickle can raise nearly anything
        why = " ".join(str(e).split())  # some have two lines
        raise UserError(f"{where} is damaged or not of CIFAR-10 ({why}); nothing in it was executed; {AGAIN}") from e
    if not isinstance(record, dict):
        raise UserError(f"{where} is not of CIFAR-10: it holds a {type(record).__name__}, not a dictionary; {AGAIN}")
    return {key.encode("utf-8", "replace") if isinstance(key, str) else key: value for key, value in record.items()}
