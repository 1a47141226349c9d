"""Downloads of published data sets: resumed where they broke off, and never named before their checksum is right.

No well-kept library does all of it (pooch verifies and does not resume, huggingface_hub resumes from its own servers);
this is urllib, with no further dependency, and a wrong answer is refused before it replaces a byte on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, InvalidURL, responses
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two downloads apart
    fcntl = None  # type: ignore[assignment]

from tqdm import tqdm

from minidiff import __version__
from minidiff.errors import UserError

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""

PAUSES = (1.0, 4.0, 16.0)
"""Seconds to wait before each new attempt; they begin anew whenever the file grew, and at their end it is given up."""

CHUNK = 1 << 16


@dataclass(frozen=True)
class File:
    """A published file: where it stands, its size in bytes and its MD5 sum in hexadecimal digits."""

    url: str
    bytes: int
    md5: str

    @property
    def name(self) -> str:
        """The file's name, the last part of its URL."""
        return self.url.rpartition("/")[2]


FILES = {
    ("cifar10", "python"): File(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a"
    ),
    ("cifar10", "binary"): File(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"
    ),
}
"""What can be downloaded, by name and form; sums as in https://www.cs.toronto.edu/~kriz/cifar.html."""


class _Broken(Exception):
    """An attempt ended before the file did; the next one may go on from there."""


class _CannotResume(Exception):
    """The server has no answer to a request that begins in the middle of the file."""


class _Failed(Exception):
    """The file cannot be had from this URL."""


def download(name: str, folder: Path, form: str = "binary", mirror: str | None = None) -> Path:
    """Fetch a published file into `folder`, which is made where it is missing; returns the file's path.

    A file that stands there already is verified, and nothing is fetched. Bytes go to NAME.part, which gets its name
    once size and MD5 sum are right; Ctrl-C or a failure leaves it, and the next call goes on from its end.

    name, form: a key of FILES.
    mirror: another server, as an http or https URL of the file itself or of the folder that holds it.

    Raises UserError for an unknown name or form, a mirror that is no URL, a file in the way that is not the published
    one, a server that fails or has other bytes, and a disk that cannot be written.
    """
    file = _published(name, form)
    url = _address(file, mirror)
    path = folder / file.name
    try:
        if path.exists():
            return _verified(path, file)
        folder.mkdir(parents=True, exist_ok=True)
        slow = "" if mirror else "its server is slow and may take an hour; "
        print(
            f"fetching {url} ({file.bytes / 1e6:.0f} MB): {slow}after Ctrl-C the same command goes on where it stopped",
            file=sys.stderr,
        )
        return _fetch(url, path, file)
    except _Failed as e:
        raise UserError(
            f"cannot fetch {url}: {e}; run the command again later, name another server (--mirror URL), or get "
            f"{file.url} in any other way and put it in {folder} (its MD5 sum must be {file.md5})"
        ) from e
    except OSError as e:
        raise UserError(
            f"{e.filename or path}: {e.strerror or e}; make room, check the permissions, or choose another folder "
            "with --out"
        ) from e


def checksum(path: Path) -> str:
    """The MD5 sum of a file in hexadecimal digits. Raises OSError where it cannot be read."""
    md5 = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK):
            md5.update(chunk)
    return md5.hexdigest()


def _published(name: str, form: str) -> File:
    forms = [f for n, f in FILES if n == name]
    if not forms:
        names = ", ".join(sorted({n for n, _ in FILES}))
        raise UserError(f"there is no download {name!r}; choose from: {names}")
    if form not in forms:
        raise UserError(f"{name} has no form {form!r}; choose from: {', '.join(forms)}")
    return FILES[name, form]


def _address(file: File, mirror: str | None) -> str:
    """The URL to fetch from: a mirror's URL ends in the file's name, or the name is added to its path."""
    if mirror is None:
        return file.url
    try:
        parts = urlsplit(mirror)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port out of range, half an IPv6 address
        usable = False
    if not usable:
        raise UserError(f"--mirror wants a URL that begins with http:// or https://, got {mirror!r}")
    if not parts.path.endswith(f"/{file.name}"):
        parts = parts._replace(path=f"{parts.path.rstrip('/')}/{file.name}")
    return parts.geturl()


def _difference(path: Path, file: File) -> str | None:
    """What tells the file at `path` from the published one, None where they are the same."""
    size = path.stat().st_size
    if size != file.bytes:
        return f"{size} bytes, where {file.bytes} are published"
    md5 = checksum(path)
    return None if md5 == file.md5 else f"the MD5 sum {md5}, where {file.md5} is published"


def _verified(path: Path, file: File) -> Path:
    difference = _difference(path, file)
    if difference:
        raise UserError(f"{path} is not the published file: it has {difference}; remove it and run the command again")
    return path


def _fetch(url: str, path: Path, file: File) -> Path:
    """Fetch and verify; bytes that were put together from pieces and are wrong get one chance from the beginning."""
    part = path.with_name(f"{path.name}.part")
    with _alone(part):
        return _fetch_alone(url, part, path, file)


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Keep another process from writing the same file. Raises UserError where one does."""
    if part.is_symlink():
        raise UserError(f"{part} is a link; remove it and run the command again")
    if not fcntl:
        yield
        return
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another download is writing {part}; wait for it") from e
        except OSError:  # a file system without locks, where nothing keeps two downloads apart either
            pass
        try:
            yield
        finally:
            if not _size(part):
                part.unlink(missing_ok=True)


def _fetch_alone(url: str, part: Path, path: Path, file: File) -> Path:
    pieced = _fill(url, part, file)
    difference = _difference(part, file)
    if difference and pieced:
        os.truncate(part, 0)
        tqdm.write(f"{part.name} had {difference}; beginning again", file=sys.stderr)
        _fill(url, part, file)
        difference = _difference(part, file)
    if difference:
        part.unlink()
        raise _Failed(f"what came has {difference}")
    os.replace(part, path)
    return path


def _fill(url: str, part: Path, file: File) -> bool:
    """Fetch what `part` lacks, in as many attempts as it takes; returns whether it was put together from pieces."""
    had = have = _size(part)
    resumes, pauses = True, iter(PAUSES)
    while have < file.bytes:
        had, asked = have, have if resumes else 0
        try:
            with _open(url, asked) as response:
                _append(response, part, _start(response, asked, file), file)
            reason = "the connection ended early"
        except _CannotResume:
            reason, resumes = "the server cannot go on in the middle of the file", False
        except _Broken as e:
            reason = str(e)
        have = _size(part)
        if have > had:
            pauses = iter(PAUSES)
        if have < file.bytes:
            pause = next(pauses, None)
            if pause is None:
                raise _Failed(f"{reason} (so far {have} of {file.bytes} bytes)")
            tqdm.write(f"{reason}; trying again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    return had > 0


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _open(url: str, start: int) -> HTTPResponse:
    """The server's answer to a request for the bytes from `start` on."""
    headers = {"User-Agent": f"minidiff/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as e:
        e.close()
        if e.code == 416:
            raise _CannotResume from e
        temporary = e.code >= 500 or e.code in (408, 429)
        phrase = " ".join(str(e.reason or responses.get(e.code, "without a reason")).split())
        raise (_Broken if temporary else _Failed)(f"the server answers {e.code}, {phrase}") from e
    except (ValueError, InvalidURL) as e:
        raise _Failed(f"this is not a URL ({e})") from e
    except (OSError, HTTPException) as e:
        raise _Broken(_said(e)) from e


def _start(response: HTTPResponse, asked: int, file: File) -> int:
    """The offset in the file at which the answer's bytes begin: the one asked for, or 0 for the whole file.

    An answer that is not about the published file is refused here, before it replaces any byte on the disk.
    """
    kind = response.headers.get("Content-Type", "").lower()
    if kind.startswith("text/") or "html" in kind or "json" in kind:
        raise _Failed("a web page or a message comes in the file's place")
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", response.headers.get("Content-Range", ""))
        if not span or int(span[1]) != asked:
            raise _CannotResume
        start, size = asked, None if span[2] == "*" else int(span[2])
    elif response.status == 200:
        start, size = 0, response.length
    else:
        raise _Failed(f"the server answers {response.status} without the file")
    if size not in (None, file.bytes):
        raise _Failed(f"the server's file has {size} bytes, where {file.bytes} are published")
    return start


def _append(response: HTTPResponse, part: Path, start: int, file: File) -> None:
    """Add the answer's bytes, which begin at `start`, to `part`; stops where more come than are published.

    What `part` has already is passed over: an answer that breaks off, or is something else, shortens nothing.
    """
    had, at = _size(part), start
    with (
        open(part, "ab") as f,
        tqdm(
            desc=file.name, total=file.bytes, initial=start, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
        ) as bar,
    ):
        for chunk in _chunks(response):
            f.write(chunk[max(0, had - at) :])
            at += len(chunk)
            bar.update(len(chunk))
            if at > file.bytes:
                break


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """The answer's bytes as they come in."""
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
    except (OSError, HTTPException) as e:
        raise _Broken(_said(e)) from e


def _said(error: Exception) -> str:
    """The error's message in one line, without its number and its wrapping."""
    cause = error.reason if isinstance(error, URLError) else error
    return " ".join((getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).split())
