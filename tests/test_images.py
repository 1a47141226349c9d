"""Reading image files: the same pixels from every format and mode, and a sentence about what cannot be read."""

import os
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from minidiff.data import images
from minidiff.data.images import FORMATS, IMAGE_SUFFIXES, _load, read_image, stays_inside
from minidiff.errors import UserError

RED, GREEN, BLUE, YELLOW = (200, 20, 40), (30, 180, 60), (20, 40, 210), (230, 220, 20)
SIZE = 16


def quadrants(upper_left, upper_right, lower_left, lower_right, side=48):
    """A picture uint8 (side, side, channels) of four parts."""
    rows = [[upper_left, upper_right], [lower_left, lower_right]]
    picture = np.array(rows, np.uint8).reshape(2, 2, -1)
    return picture.repeat(side // 2, axis=0).repeat(side // 2, axis=1)


COLOURS = quadrants(RED, GREEN, BLUE, YELLOW)


def corners(image):
    """The colours (2, 2, 3) of an image's corners, each of which must be one flat patch."""
    assert image.dtype == np.uint8 and image.shape == (SIZE, SIZE, 3)
    patches = image.reshape(2, SIZE // 2, 2, SIZE // 2, 3).transpose(0, 2, 1, 3, 4).astype(int)
    patches = np.stack(
        [[patches[0, 0, :4, :4], patches[0, 1, :4, -4:]], [patches[1, 0, -4:, :4], patches[1, 1, -4:, -4:]]]
    )
    colours = np.median(patches, axis=(2, 3))
    assert np.abs(patches - colours[:, :, None, None]).max() <= 6
    return colours


def assert_corners(image, expected, tolerance=0):
    expected = np.array(expected, int).reshape(2, 2, -1)
    assert np.abs(corners(image) - expected).max() <= tolerance


def png(width, height, depth, kind, pixels, transparency=None):
    """The bytes of a PNG file; `pixels` has a filter byte before each row. Kinds: 0 grey, 2 RGB, 3 palette."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    keyed = b"" if transparency is None else chunk(b"tRNS", transparency)
    return b"\x89PNG\r\n\x1a\n" + header + keyed + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def rows_of(array, kind):
    """The pixels of a PNG file: each row in big-endian numbers behind a filter byte of 0."""
    return b"".join(b"\0" + row.astype(kind).tobytes() for row in array)


@pytest.mark.parametrize(
    "name, options, tolerance",
    [
        ("x.png", {}, 0),
        ("x.bmp", {}, 0),
        ("x.ppm", {}, 0),
        ("x.webp", {"lossless": True}, 0),
        ("x.tif", {}, 0),
        ("x.tiff", {"compression": "tiff_lzw"}, 0),
        ("x.tif", {"compression": "tiff_deflate"}, 0),
        ("x.jp2", {}, 0),
        ("x.JPG", {"quality": 95}, 5),
        ("x.jpeg", {"quality": 95, "progressive": True}, 5),
        ("x.jpe", {"quality": 95, "format": "MPO"}, 5),
        ("x.jfif", {"quality": 95, "format": "JPEG"}, 5),
    ],
)
def test_every_format(tmp_path, name, options, tolerance):
    Image.fromarray(COLOURS).save(tmp_path / name, **options)
    image = read_image(tmp_path / name, SIZE)
    assert_corners(image, (RED, GREEN, BLUE, YELLOW), tolerance)
    assert image.flags.writeable and image.flags.c_contiguous


def test_avif_where_pillow_reads_it(tmp_path):
    if ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    Image.fromarray(COLOURS).save(tmp_path / "x.avif", quality=95)
    assert_corners(read_image(tmp_path / "x.avif", SIZE), (RED, GREEN, BLUE, YELLOW), 6)


def test_the_suffix_does_not_matter(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "png_in_truth.jpg", format="PNG")
    assert_corners(read_image(tmp_path / "png_in_truth.jpg", SIZE), (RED, GREEN, BLUE, YELLOW))


def test_greyscale(tmp_path):
    Image.fromarray(quadrants(0, 60, 130, 255)[..., 0]).save(tmp_path / "l.png")
    Image.fromarray(quadrants(0, 60, 130, 255)[..., 0]).save(tmp_path / "l.jpg", quality=95)
    grey = np.repeat(np.array([0, 60, 130, 255])[:, None], 3, axis=1)
    assert_corners(read_image(tmp_path / "l.png", SIZE), grey)
    assert_corners(read_image(tmp_path / "l.jpg", SIZE), grey, 4)


def test_black_and_white(tmp_path):
    Image.fromarray(quadrants(0, 255, 255, 0)[..., 0]).convert("1").save(tmp_path / "1.png")
    assert_corners(read_image(tmp_path / "1.png", SIZE), [(0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3])


def test_palettes(tmp_path):
    picture = Image.fromarray(COLOURS).quantize(4)
    assert picture.mode == "P"
    for name in ("p.png", "p.gif", "p.bmp", "p.tif"):
        picture.save(tmp_path / name)
        assert_corners(read_image(tmp_path / name, SIZE), (RED, GREEN, BLUE, YELLOW))


@pytest.mark.parametrize("name", ["p.png", "p.gif"])
def test_a_transparent_palette_entry_is_white(tmp_path, name):
    picture = Image.fromarray(COLOURS).quantize(4)
    picture.save(tmp_path / name, transparency=picture.getpixel((0, 0)))
    assert_corners(read_image(tmp_path / name, SIZE), ((255,) * 3, GREEN, BLUE, YELLOW))


def test_a_palette_with_an_alpha_for_each_entry(tmp_path):
    picture = Image.fromarray(quadrants(0, 1, 2, 3)[..., 0], "L")
    picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    picture.save(tmp_path / "p.png", transparency=bytes([255, 0, 255, 51]))
    expected = [(0, 0, 0), (255, 255, 255), (0, 200, 0), (204, 204, 244)]  # 0.2 of the last, 0.8 of white
    assert_corners(read_image(tmp_path / "p.png", SIZE), expected, 1)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_transparent_pixels_are_white_and_half_transparent_ones_mixed(tmp_path, name):
    picture = quadrants((200, 0, 0, 255), (0, 0, 0, 0), (0, 0, 200, 51), (9, 99, 9, 0))
    Image.fromarray(picture).save(tmp_path / name, **({"lossless": True, "exact": True} if name == "x.webp" else {}))
    expected = [(200, 0, 0), (255, 255, 255), (204, 204, 244), (255, 255, 255)]
    assert_corners(read_image(tmp_path / name, SIZE), expected, 1)


def test_grey_with_alpha(tmp_path):
    Image.fromarray(quadrants((0, 255), (100, 255), (0, 0), (100, 51))).save(tmp_path / "la.png")
    expected = [(0,) * 3, (100,) * 3, (255,) * 3, (224,) * 3]
    assert_corners(read_image(tmp_path / "la.png", SIZE), expected, 1)


def test_grey_that_was_multiplied_with_its_alpha(tmp_path):
    """A TIFF whose second sample is associated alpha, which Pillow reads and does not write."""
    pixels = quadrants((0, 255), (100, 255), (0, 0), (20, 51))
    short, long, n = 3, 4, 48
    entries = [
        (256, short, 1, n), (257, short, 1, n), (258, short, 2, 8 | 8 << 16), (259, short, 1, 1), (262, short, 1, 1),
        (273, long, 1, 200), (277, short, 1, 2), (278, short, 1, n), (279, long, 1, pixels.size), (338, short, 1, 1),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    (tmp_path / "la.tif").write_bytes(head.ljust(200, b"\0") + pixels.tobytes())
    expected = [(0,) * 3, (100,) * 3, (255,) * 3, (224,) * 3]
    assert_corners(read_image(tmp_path / "la.tif", SIZE), expected, 2)


def test_whatever_pillow_raises_is_a_sentence(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30), RED).save(tmp_path / "x.png")

    def fail(*args):
        raise ValueError("conversion not supported")

    for name in ("_to_rgb", "_turn_upright"):
        with monkeypatch.context() as m:
            m.setattr(images, name, fail)
            refuses(tmp_path / "x.png", r"cannot be read, .*\(conversion not supported\)")


def test_a_colour_that_stands_for_transparent_is_white(tmp_path):
    (tmp_path / "rgb.png").write_bytes(png(48, 48, 8, 2, rows_of(COLOURS, "u1"), struct.pack(">HHH", *RED)))
    assert_corners(read_image(tmp_path / "rgb.png", SIZE), ((255,) * 3, GREEN, BLUE, YELLOW))
    grey = quadrants(0, 60, 130, 200)[..., 0]
    (tmp_path / "l.png").write_bytes(png(48, 48, 8, 0, rows_of(grey, "u1"), struct.pack(">H", 60)))
    assert_corners(read_image(tmp_path / "l.png", SIZE), [(0,) * 3, (255,) * 3, (130,) * 3, (200,) * 3])
    grey = grey.astype(np.int64) * 257
    (tmp_path / "i.png").write_bytes(png(48, 48, 16, 0, rows_of(grey, ">u2"), struct.pack(">H", 60 * 257)))
    assert_corners(read_image(tmp_path / "i.png", SIZE), [(0,) * 3, (255,) * 3, (130,) * 3, (200,) * 3])


CYAN_INK, RED_INK, BLACK_INK, NO_INK = (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)
INK_COLOURS = [(0, 255, 255), (255, 0, 0), (0, 0, 0), (255, 255, 255)]


def test_cmyk(tmp_path):
    inks = Image.fromarray(quadrants(CYAN_INK, RED_INK, BLACK_INK, NO_INK), "CMYK")
    inks.save(tmp_path / "x.tif")
    inks.save(tmp_path / "x.jpg", quality=95, subsampling=0)
    assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()  # so its numbers are inverted: 255 is no ink
    assert_corners(read_image(tmp_path / "x.tif", SIZE), INK_COLOURS)
    assert_corners(read_image(tmp_path / "x.jpg", SIZE), INK_COLOURS, 4)


def test_ycck(tmp_path):
    """Photoshop's CMYK JPEGs hold the inks C, M, Y as luma and chroma, and say so in Adobe's segment."""
    inks = quadrants(CYAN_INK, RED_INK, BLACK_INK, NO_INK)
    ycc = np.asarray(Image.fromarray(inks[..., :3]).convert("YCbCr"))
    stored = np.concatenate((255 - ycc, inks[..., 3:]), axis=-1)  # Pillow inverts as it saves
    Image.fromarray(stored, "CMYK").save(tmp_path / "x.jpg", quality=95, subsampling=0)
    content = bytearray((tmp_path / "x.jpg").read_bytes())
    transform = content.index(b"Adobe") + 11
    assert content[transform] == 0
    content[transform] = 2
    (tmp_path / "x.jpg").write_bytes(content)
    assert_corners(read_image(tmp_path / "x.jpg", SIZE), INK_COLOURS, 6)


def test_ycbcr_tiff(tmp_path):
    Image.fromarray(COLOURS).convert("YCbCr").save(tmp_path / "x.tif", compression="jpeg", quality=95)
    assert_corners(read_image(tmp_path / "x.tif", SIZE), (RED, GREEN, BLUE, YELLOW), 5)


RAMP = np.arange(65536).reshape(256, 256)
RAMP_IN_8_BITS = np.round(RAMP / 257).astype(np.uint8)[..., None].repeat(3, axis=-1)


def test_16_bit_grey_uses_the_full_range(tmp_path):
    (tmp_path / "x.png").write_bytes(png(256, 256, 16, 0, rows_of(RAMP, ">u2")))
    Image.fromarray(RAMP.astype("<u2")).save(tmp_path / "little.tif")
    Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "wide.tif")
    modes = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            modes[path.name] = image.mode
        np.testing.assert_array_equal(read_image(path, 256), RAMP_IN_8_BITS, err_msg=path.name)
    assert modes["little.tif"] == "I;16" and modes["big.tif"] == "I;16B" and modes["wide.tif"] == "I"


def test_grey_tiffs_of_12_bits_and_with_white_as_zero(tmp_path):
    ramp = (RAMP >> 4).astype(np.uint16)  # 0..4095
    packed = np.stack([ramp[:, ::2] >> 4, (ramp[:, ::2] & 15) << 4 | ramp[:, 1::2] >> 8, ramp[:, 1::2] & 255], axis=-1)
    (tmp_path / "12.tif").write_bytes(tiff(256, 256, 12, 1, packed.astype(np.uint8).tobytes()))
    expected = np.rint(ramp / 4095 * 255)
    np.testing.assert_array_equal(read_image(tmp_path / "12.tif", 256), np.repeat(expected[..., None], 3, axis=-1))
    (tmp_path / "negative.tif").write_bytes(tiff(256, 256, 16, 0, RAMP.astype("<u2").tobytes()))
    np.testing.assert_array_equal(read_image(tmp_path / "negative.tif", 256), 255 - RAMP_IN_8_BITS)


def tiff(width, height, bits, photometric, data):
    """An uncompressed grey TIFF, little-endian."""
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 122)]
    tags += [(277, 3, 1), (278, 3, height), (279, 4, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + data


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_few_bits_is_white(tmp_path, bits):
    """The key is in the file's own bits: of 4 pixels 0, 1, 0, 1 it names 1."""
    row = np.packbits([int(b) for v in (0, 1, 0, 1) for b in f"{v:0{bits}b}"]).tobytes()
    chunk = struct.pack(">H", 1)
    (tmp_path / "x.png").write_bytes(png(4, 4, bits, 0, (b"\0" + row) * 4, chunk))
    pixels = read_image(tmp_path / "x.png", 4)
    assert (pixels[:, 1::2] == 255).all() and (pixels[:, ::2] == 0).all()


def test_a_transparent_colour_of_16_bits_is_white(tmp_path):
    colours = np.array([[[0x1234] * 3, [0x3434] * 3]] * 2, ">u2")
    data = b"".join(b"\0" + row.tobytes() for row in colours)
    (tmp_path / "x.png").write_bytes(png(2, 2, 16, 2, data, struct.pack(">HHH", *[0x1234] * 3)))
    pixels = read_image(tmp_path / "x.png", 2)
    assert (pixels[:, 0] == 255).all() and (pixels[:, 1] == 0x34).all()


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    for i in range(4):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(images, "MANY", 1000)
    at_once, most = [], []
    plain = images._to_rgb

    def watched(image, path):
        at_once.append(path)
        most.append(len(at_once))
        time.sleep(0.01)
        at_once.remove(path)
        return plain(image, path)

    monkeypatch.setattr(images, "_to_rgb", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: read_image(tmp_path / f"{i}.png", 8), range(4)))
    assert max(most) == 1 and not images._large.locked()


def test_16_bit_colour(tmp_path):
    deep = COLOURS.astype(np.int64) * 257
    (tmp_path / "x.png").write_bytes(png(48, 48, 16, 2, rows_of(deep, ">u2")))
    assert_corners(read_image(tmp_path / "x.png", SIZE), (RED, GREEN, BLUE, YELLOW))


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_the_first_of_several_frames(tmp_path, name):
    frames = [Image.fromarray(c) for c in (COLOURS, COLOURS[::-1], 255 - COLOURS)]
    options = {"lossless": True} if name == "x.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
    assert_corners(read_image(tmp_path / name, SIZE), (RED, GREEN, BLUE, YELLOW), 2)


# Where the file's first row and first column lie in the upright picture, by orientation (EXIF 2.3, section 4.6.4).
FIRST_ROW_AND_COLUMN = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_as(upright, orientation):
    """The pixels of the file that shows `upright` when the orientation is applied."""
    row, column = FIRST_ROW_AND_COLUMN[orientation]
    stored = upright.swapaxes(0, 1) if row in ("left", "right") else upright
    stored = stored[::-1] if row in ("bottom", "right") else stored
    return np.ascontiguousarray(stored[:, ::-1] if column in ("bottom", "right") else stored)


def save_with_orientation(path, upright, orientation, **options):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored_as(upright, orientation)).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", FIRST_ROW_AND_COLUMN)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
def test_exif_orientations(tmp_path, name, orientation):
    upright = np.pad(COLOURS, ((0, 0), (3, 3), (0, 0)), mode="edge")  # wider than high
    options = {"x.jpg": {"quality": 95}, "x.webp": {"lossless": True}}.get(name, {})
    save_with_orientation(tmp_path / name, upright, orientation, **options)
    assert_corners(read_image(tmp_path / name, SIZE), (RED, GREEN, BLUE, YELLOW), 6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"])
def test_damaged_exif_data_is_no_reason_to_refuse(tmp_path, exif):
    for name in ("x.jpg", "x.png"):
        Image.fromarray(COLOURS).save(tmp_path / name, quality=95, exif=exif)
        assert_corners(read_image(tmp_path / name, SIZE), (RED, GREEN, BLUE, YELLOW), 5)


def photograph(width, height):
    """Something like a photograph: coarse and fine detail, in colours that differ from place to place."""
    rng = np.random.default_rng(0)
    picture = np.full((height, width, 3), 128.0)
    for cells in (4, 16, 64, 256):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) - 128) * 0.4
    return picture.clip(0, 255).astype(np.uint8)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_no_worse(tmp_path):
    save_with_orientation(tmp_path / "x.jpg", photograph(1100, 820), 6, quality=92)
    with Image.open(tmp_path / "x.jpg") as image:
        whole = ImageOps.fit(ImageOps.exif_transpose(image), (24, 24), Image.Resampling.LANCZOS)
    assert _load(tmp_path / "x.jpg", 24, ExitStack()).size == (275, 205)
    assert np.abs(read_image(tmp_path / "x.jpg", 24).astype(int) - np.asarray(whole)).max() <= 4


def test_a_jpeg_that_is_not_large_is_decoded_whole(tmp_path):
    Image.fromarray(photograph(300, 250)).save(tmp_path / "x.jpg")
    assert _load(tmp_path / "x.jpg", 32, ExitStack()).size == (300, 250)


@pytest.mark.parametrize("turned", [False, True])
def test_the_crop_is_the_middle(tmp_path, turned):
    left, right = np.full((30, 30, 3), RED, np.uint8), np.full((30, 30, 3), BLUE, np.uint8)
    wide = np.concatenate((left, quadrants(GREEN, YELLOW, RED, BLUE, side=30), right), axis=1)
    picture = wide.swapaxes(0, 1) if turned else wide
    Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", 30)
    middle = wide[:, 30:60]
    np.testing.assert_array_equal(image, middle.swapaxes(0, 1) if turned else middle)


def test_small_pictures_are_enlarged(tmp_path):
    Image.fromarray(quadrants(RED, GREEN, BLUE, YELLOW, side=2)).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", SIZE)
    assert image.shape == (SIZE, SIZE, 3)
    for y, x, colour in ((0, 0, RED), (0, -1, GREEN), (-1, 0, BLUE), (-1, -1, YELLOW)):
        assert np.abs(image[y, x].astype(int) - colour).max() <= 60  # the filter overshoots
    Image.new("RGB", (1000, 1), RED).save(tmp_path / "line.png")
    assert (read_image(tmp_path / "line.png", 8) == RED).all()


def test_a_fine_pattern_becomes_its_mean(tmp_path):
    """Every second column white: a filter without antialiasing would see only one of the two."""
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "x.png")
    assert np.abs(read_image(tmp_path / "x.png", 16)[2:-2, 2:-2].astype(int) - 127.5).max() <= 3


# Wrong input


def refuses(path, words):
    """The one sentence of the error, which must name the file."""
    with pytest.raises(UserError, match=words) as e:
        read_image(path, SIZE)
    assert path.name in str(e.value) and "\n" not in str(e.value)


def test_what_is_no_image_file(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("<html>404 Not Found</html>")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    refuses(tmp_path / "missing.jpg", "there is no image file")
    refuses(tmp_path / "dangling.jpg", "there is no image file")
    refuses(tmp_path / "with\0zero.jpg", "there is no image file")
    refuses(tmp_path / "folder.jpg", "is a folder")
    refuses(tmp_path / ("x" * 300 + ".jpg"), r"cannot be read, .* \(File name too long\)")
    refuses(tmp_path / "empty.png", "is empty")
    refuses(tmp_path / "text.jpg", r"is not an image that can be read here \(JPEG, PNG, WEBP")


def test_postscript_is_not_handed_to_ghostscript(tmp_path):
    (tmp_path / "x.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "EPS" and "EPS" not in FORMATS
    refuses(tmp_path / "x.jpg", "is not an image that can be read here")


def test_an_image_without_pixels(tmp_path):
    (tmp_path / "x.png").write_bytes(png(0, 3, 8, 0, b"\0\0\0"))
    (tmp_path / "x.ppm").write_bytes(b"P6 0 3 255\n")
    refuses(tmp_path / "x.png", "is not an image")
    refuses(tmp_path / "x.ppm", "is not an image")


SAVED_AS = {
    "x.jpg": {},
    "progressive.jpg": {"progressive": True},
    "x.png": {},
    "x.gif": {},
    "x.bmp": {},
    "x.ppm": {},
    "x.webp": {},
    "x.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "x.jp2": {},
}


@pytest.mark.parametrize("name, options", SAVED_AS.items())
def test_truncated_files(tmp_path, name, options):
    Image.fromarray(photograph(60, 40)).save(tmp_path / name, **options)
    content = (tmp_path / name).read_bytes()
    for keep in (1, 4, 12, 40, len(content) // 3, len(content) // 2, len(content) * 9 // 10):
        (tmp_path / name).write_bytes(content[:keep])
        refuses(tmp_path / name, "truncated or damaged|is not an image")


@pytest.mark.parametrize("name, options", SAVED_AS.items())
@pytest.mark.parametrize("warning", ["error", "ignore"])
def test_damage_ends_in_pixels_or_in_a_sentence(tmp_path, name, options, warning):
    """Bytes overwritten at random; whatever Pillow makes of them, nothing but a UserError leaves."""
    rng = np.random.default_rng(1)
    Image.fromarray(photograph(24, 16)).save(tmp_path / name, **options)
    content = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
    for _ in range(30):
        damaged = content.copy()
        damaged[rng.integers(min(len(content), 400), size=3)] = rng.integers(256, size=3)
        (tmp_path / name).write_bytes(damaged.tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter(warning)
            try:
                assert read_image(tmp_path / name, 8).shape == (8, 8, 3)
            except UserError as e:
                assert name in str(e)


@pytest.mark.parametrize("warning", ["error", "ignore"])  # Pillow only warns of up to twice the limit
@pytest.mark.parametrize("side, refused", [(10, False), (11, True), (14, True), (15, True), (30, True)])
def test_decompression_bombs(tmp_path, monkeypatch, side, refused, warning):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (side, side), RED).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter(warning)
        if refused:
            refuses(tmp_path / "x.png", "has more than 100 pixels, the limit against decompression bombs")
        else:
            assert (read_image(tmp_path / "x.png", 4) == RED).all()


def test_a_bomb_is_not_decoded(tmp_path):
    (tmp_path / "x.png").write_bytes(png(60000, 60000, 1, 0, b"\0" * 100))
    refuses(tmp_path / "x.png", "has more than 89478485 pixels")


def test_without_a_limit_there_are_no_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("RGB", (30, 30), RED).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", 4) == RED).all()


def test_numbers_without_a_known_range(tmp_path):
    Image.fromarray(np.linspace(-3, 4e5, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tif")
    refuses(tmp_path / "float.tif", "holds floating-point pixels; save it as")
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tif")
    refuses(tmp_path / "lab.tif", "holds CIELAB pixels")
    for value in (-1, 65536):
        Image.fromarray(np.full((8, 8), value, np.int32)).save(tmp_path / "wide.tif")
        refuses(tmp_path / "wide.tif", r"outside 0\.\.65535")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_no_file_stays_open(tmp_path):
    for name, options in SAVED_AS.items():
        Image.fromarray(photograph(60, 40)).save(tmp_path / name, **options)
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"truncated_{name}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"rubbish_{name}").write_bytes(b"rubbish")
    before = len(os.listdir("/proc/self/fd"))
    kept = []  # an error that is kept keeps the frames that raised it
    for path in tmp_path.iterdir():
        try:
            kept.append(read_image(path, 8))
        except UserError as e:
            kept.append(e)
    assert len(os.listdir("/proc/self/fd")) == before and len(kept) == 3 * len(SAVED_AS)


def test_several_threads_read_what_one_reads(tmp_path):
    paths = [tmp_path / f"{i:02d}{suffix}" for i in range(10) for suffix in (".jpg", ".png", ".tif")]
    for i, path in enumerate(paths):
        save_with_orientation(path, photograph(60 + i, 40), 1 + i % 8)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(read_image, paths, [SIZE] * len(paths)))
    for path, image in zip(paths, together, strict=True):
        np.testing.assert_array_equal(image, read_image(path, SIZE))


def test_suffixes():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"} <= IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)


@pytest.mark.parametrize(
    "name", ["a.jpg", "a/b c/ü.jpg", "./a.jpg", "..a.jpg", "a..b/c.jpg", ".hidden/a.jpg", "🐕.jpg"]
)
def test_names_inside(name):
    assert stays_inside(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "/", "/a.jpg", "//host/share/a.jpg", "..", "../a.jpg", "a/../../b.jpg", "a/..", "a\\b.jpg"]
    + ["..\\a.jpg", "\\a.jpg", "\\\\host\\share\\a.jpg", "C:\\a.jpg", "C:/a.jpg", "c:a.jpg", "a/..\\..\\b.jpg"]
    + ["a\0.jpg", "\ud800.jpg", "\udfff", "x" * 1001],
)
def test_names_outside(name):
    assert not stays_inside(name)
