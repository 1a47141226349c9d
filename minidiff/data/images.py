"""Image files: what a loader finds, and how one becomes pixels. Pillow decodes; what it leaves open is decided here."""

from __future__ import annotations

import re
import unicodedata
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PureWindowsPath
from threading import Lock

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minidiff.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The only formats that are tried. Pillow knows more, and starts Ghostscript for some of them."""

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .heic .heif".split()
)
"""The suffixes, in lower case, of what loaders take for a picture. What Pillow cannot read, such as HEIC, is not passed
over: `read_image` says so."""

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF

DRAFT = 8  # a JPEG is decoded at a fraction of its size where that leaves at least this many pixels for each one wanted

MANY = 20_000_000
"""Pixels beyond which pictures are decoded one at a time: Pillow holds several copies of one."""
_large = Lock()

NO_RANGE = {"F": "floating-point", "LAB": "CIELAB"}


@dataclass(frozen=True)
class Item:
    """One picture that a loader found."""

    path: Path
    captions: tuple[str, ...]  # at least one; one of them is drawn each time the picture is visited
    label: str | None = None  # its class, where the pictures are sorted into classes


def read_image(path: Path, size: int) -> np.ndarray:
    """The middle of a picture, uint8 (size, size, 3), RGB: the largest square, scaled with a Lanczos filter.

    The EXIF orientation is applied, transparent parts are laid over white, 16 bits become 8, and of several frames the
    first is taken. Colour profiles are not applied. Safe to call from several threads.

    Raises UserError for a file that is missing, empty, damaged or no image, for more than `PIL.Image.MAX_IMAGE_PIXELS`
    pixels (a small file can hold enough of them to fill the memory), and for numbers without a known range.
    """
    length = 0
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name an image file")
        if not path.is_file():
            raise UserError(f"there is no image file {path}; put it there, or take it out of the data")
        length = path.stat().st_size
        with ExitStack() as alone:
            image = _to_rgb(_load(path, size, alone), path)
            return np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    except UserError:
        raise
    except UnidentifiedImageError as e:
        wanted = f"not an image that can be read here ({', '.join(_formats())})"
        what = wanted if length else "empty"
        raise UserError(f"{path} is {what}; replace it, or take it out of the data") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        limit = Image.MAX_IMAGE_PIXELS
        raise UserError(f"{path} has more than {limit} pixels, the limit against decompression bombs; shrink it") from e
    except Exception as e:  # what Pillow raises on damaged and on rare files is nearly every kind there is
        why = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise UserError(f"{path} cannot be read, it may be truncated or damaged ({why}); replace or remove it") from e


def tidy(text: str) -> str:
    """A caption with single spaces, composed accents (some file systems take them apart) and no half characters."""
    return " ".join(unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode()).split())


def stays_inside(name: str) -> bool:
    """Whether a file name in somebody's data can be that of a file inside its folder, under every operating system.

    It may name subfolders, with `/`, but hold no root, drive letter, backslash or `..`, and nothing that no file system
    takes: NUL, half a surrogate pair, over 1000 characters.
    """
    path = PureWindowsPath(name)
    possible = re.fullmatch(r"[^\\\0\ud800-\udfff]{1,1000}", name)
    return bool(possible and path.parts) and not path.anchor and ".." not in path.parts


@cache
def _formats() -> list[str]:
    """Those of FORMATS that the installed Pillow reads; it stumbles over the names of others."""
    known = set(Image.registered_extensions().values())
    return [name for name in FORMATS if name in known]


def _load(path: Path, size: int, alone: ExitStack) -> Image.Image:
    """The decoded picture, upright, in the file's mode; a large JPEG may come out at a fraction of its size.

    alone: holds the lock of large pictures for as long as there is one.
    """
    with open(path, "rb") as file, Image.open(file, formats=_formats()) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:  # up to twice as many, Pillow only warns
            raise Image.DecompressionBombError
        image.draft("RGB", (DRAFT * size, DRAFT * size))
        if image.width * image.height > MANY:
            alone.enter_context(_large)
        _correct_transparency(image)
        image.load()
        _turn_upright(image)
    return image


def _correct_transparency(image: Image.Image) -> None:
    """The transparent colour of a PNG in the numbers that Pillow decodes to: it leaves it in the bits of the file."""
    tile, key = getattr(image, "tile", None), image.info.get("transparency")
    stored = str(tile[0][3]) if tile else ""
    if isinstance(key, int):
        image.info["transparency"] = key * {"1": 255, "L;2": 85, "L;4": 17}.get(stored, 1)
    elif isinstance(key, tuple) and stored.startswith("RGB;16"):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _turn_upright(image: Image.Image) -> None:
    """Apply the EXIF orientation in place."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged EXIF data, which cannot say how to turn a picture that is itself whole
        return


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """The picture in mode RGB, with its transparent parts over white."""
    if image.mode in NO_RANGE:
        raise UserError(f"{path} holds {NO_RANGE[image.mode]} pixels; save it as an 8-bit or 16-bit RGB image")
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image, path)).convert("RGB")
    if image.mode == "La":  # grey that was multiplied with its alpha
        image = image.convert("LA")
    if image.mode.endswith("A") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, path: Path) -> np.ndarray:
    """Grey of up to 16 bits as uint8 (H, W), the largest value becoming 255; Pillow's own conversion clips at 255."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, 16)
    white = 2 ** min(16, bits[0] if isinstance(bits, tuple) else bits) - 1
    if values.min() < 0 or values.max() > white:
        raise UserError(f"{path} holds grey values outside 0..{white}; save it as an 8-bit or 16-bit image")
    grey = (values.astype(np.int32) * 255 + white // 2) // white  # rounded
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    return np.where(values == image.info.get("transparency"), 255, grey).astype(np.uint8)
