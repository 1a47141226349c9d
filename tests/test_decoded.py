"""Decoded pictures are kept once, found again, and never taken for those of other data."""

import json
import os
import sys

import numpy as np
import pytest

from minidiff.data.decoded import ARRAY, FACTS, decoded, stamps
from minidiff.errors import UserError


@pytest.fixture
def make(rng):
    """Writes four random pictures, the same each time, and counts its calls."""
    pixels = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)

    def make(path):
        make.calls += 1
        np.save(path, make.pixels)
        return {"labels": [1, 2]}

    make.calls, make.pixels = 0, pixels
    return make


def test_it_is_made_once_and_mapped_read_only(tmp_path, make):
    for _ in range(3):
        array, facts = decoded(tmp_path / "cache", "set", ["a", 1], make)
        assert isinstance(array, np.memmap) and array.dtype == np.uint8 and (array == make.pixels).all()
        assert facts["labels"] == [1, 2] and len(facts["content"]) == 64
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert make.calls == 1 and len(list((tmp_path / "cache").iterdir())) == 1


def test_other_origins_have_other_arrays(tmp_path, make):
    first, facts = decoded(tmp_path, "set", ["a", 1], make)
    for i, other in enumerate((["a", 2], ["b", 1], {"a": 1}, ["a", 1, None]), 2):
        make.pixels = make.pixels + np.uint8(1)
        array, about = decoded(tmp_path, "set", other, make)
        assert make.calls == i and (array != first).all() and about["content"] != facts["content"]
    assert (decoded(tmp_path, "set", ["a", 1], make)[0] == first).all() and make.calls == 5


def test_the_content_is_that_of_the_pixels_alone(tmp_path, make):
    contents = {decoded(tmp_path, name, [name], make)[1]["content"] for name in ("a", "b")}
    assert len(contents) == 1


def test_stamps_tell_files_apart(tmp_path, monkeypatch):
    file = tmp_path / "x"
    missing = stamps([file])
    file.write_bytes(b"one")
    os.utime(file, ns=(0, 10**18))
    seen = [missing, stamps([file])]
    os.utime(file, ns=(0, 10**18 + 1))
    seen.append(stamps([file]))
    file.write_bytes(b"longer")
    os.utime(file, ns=(0, 10**18))
    seen.append(stamps([file]))
    file.chmod(0o600)
    seen.append(stamps([file]))  # it may be readable now
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    monkeypatch.chdir(tmp_path)
    assert stamps([type(file)("x")]) == seen[-1]  # the same file, named from the working folder
    changed = file.stat().st_ctime_ns
    assert json.loads(json.dumps(seen[-1])) == [[str(file), 6, 10**18, changed, 0o100600]]


def test_files_that_change_places_are_other_files(tmp_path, make):
    one, two = tmp_path / "1.bmp", tmp_path / "2.bmp"
    for file in (one, two):
        file.write_bytes(b"same size")
        os.utime(file, ns=(0, 10**18))
    decoded(tmp_path / "cache", "set", ["a"], make, [one, two])
    decoded(tmp_path / "cache", "set", ["a"], make, [one, two])
    assert make.calls == 1
    for old, new in ((one, tmp_path / "x"), (two, one), (tmp_path / "x", two)):
        old.rename(new)
    decoded(tmp_path / "cache", "set", ["a"], make, [one, two])
    assert make.calls == 2


def test_files_that_change_while_they_are_read(tmp_path, make):
    file = tmp_path / "1.bmp"
    file.write_bytes(b"before")

    def meddled(path):
        file.write_bytes(b"after!")
        return make(path)

    with pytest.raises(UserError, match=r"1\.bmp changed while the pictures were decoded; run the command"):
        decoded(tmp_path / "cache", "set", ["a"], meddled, [tmp_path / "0.bmp", file])
    assert not list((tmp_path / "cache").iterdir())


# ---- damaged, or of other data


def kept(tmp_path, make):
    decoded(tmp_path, "set", ["a"], make)
    (place,) = tmp_path.iterdir()
    return place


def refused(tmp_path, make, *words):
    place = next(p for p in tmp_path.iterdir() if p.name.startswith("set-"))
    before = {p: p.read_bytes() for p in place.iterdir()} if place.is_dir() else None
    with pytest.raises(UserError) as e:
        decoded(tmp_path, "set", ["a"], make)
    for word in (place, "remove this folder", *words):
        assert str(word) in str(e.value)
    assert "\n" not in str(e.value)
    assert make.calls == 1 and (before is None or before == {p: p.read_bytes() for p in place.iterdir()})


@pytest.mark.parametrize("name", [ARRAY, FACTS])
@pytest.mark.parametrize("keep", [0, 1, 9, 60, 130, -1])
def test_a_truncated_file(tmp_path, make, name, keep):
    file = kept(tmp_path, make) / name
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, make, "is damaged")


def test_a_damaged_header_of_an_array(tmp_path, make):
    """NumPy reads it as Python, which finds many ways to fail."""
    place = kept(tmp_path, make)
    whole = (place / ARRAY).read_bytes()
    outcomes = set()
    for at in range(128):
        for byte in b"\0\n(#'\xff":
            (place / ARRAY).write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            try:
                array, _ = decoded(tmp_path, "set", ["a"], make)
                outcomes.add(array.tobytes() == make.pixels.tobytes())
            except UserError as e:
                outcomes.add("remove this folder" in str(e) and "\n" not in str(e))
    assert outcomes == {True} and make.calls == 1


def test_one_cache_for_several_people(tmp_path, make, monkeypatch):
    before = os.umask(0o022)
    try:
        place = kept(tmp_path, make)
        assert place.stat().st_mode & 0o777 == 0o755 and (place / ARRAY).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)

    def forbidden(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(np.lib.format, "open_memmap", forbidden)
    with pytest.raises(UserError, match=r"images\.npy may not be read; check its permissions"):
        decoded(tmp_path, "set", ["a"], make)


@pytest.mark.parametrize("name", [ARRAY, FACTS])
def test_a_missing_file(tmp_path, make, name):
    (kept(tmp_path, make) / name).unlink()
    refused(tmp_path, make, "is damaged", name)


@pytest.mark.parametrize("text", ["{}", "[]", "7", "null", "{,}", '{"fingerprint": "x"}', "[" * 100_000, "\ud800"])
def test_broken_facts(tmp_path, make, text):
    (kept(tmp_path, make) / FACTS).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(tmp_path, make, "is damaged")


def test_a_file_of_other_data(tmp_path, make):
    """An array of the same shape, and both files of another set."""
    place = kept(tmp_path, make)
    whole = {p: p.read_bytes() for p in place.iterdir()}
    make.calls, make.pixels = 0, make.pixels ^ np.uint8(1)
    decoded(tmp_path / "other", "set", ["b"], make)
    (other,) = (tmp_path / "other").iterdir()
    for name in (ARRAY, FACTS):
        (place / name).write_bytes((other / name).read_bytes())
        refused(tmp_path, make, "made from other data")
    (place / ARRAY).write_bytes(whole[place / ARRAY])
    refused(tmp_path, make, "made from other data")
    for path, data in whole.items():
        path.write_bytes(data)
    decoded(tmp_path, "set", ["a"], make)


@pytest.mark.parametrize("change", ["shape", "dtype", "order", "objects", "archive", "one bit"])
def test_an_array_of_another_kind(tmp_path, make, change):
    place, pixels = kept(tmp_path, make), make.pixels
    arrays = {
        "shape": pixels.reshape(2, 8, 16, 3), "dtype": pixels.view(np.int8), "order": np.asfortranarray(pixels),
        "objects": pixels.astype(object), "one bit": pixels ^ (np.arange(768).reshape(pixels.shape) == 5),
    }  # fmt: skip
    with open(place / ARRAY, "wb") as file:
        np.savez(file, pixels) if change == "archive" else np.save(file, arrays[change])
    refused(tmp_path, make)


def test_a_file_in_the_place_of_the_folder(tmp_path, make):
    place = kept(tmp_path, make)
    for file in place.iterdir():
        file.unlink()
    place.rmdir()
    place.write_bytes(b"")
    refused(tmp_path, make, "is damaged")


def test_facts_that_were_changed(tmp_path, make):
    file = kept(tmp_path, make) / FACTS
    about = json.loads(file.read_text())
    for facts in ({}, {**about["facts"], "labels": [1, 9]}, {**about["facts"], "more": 1}, [], None):
        file.write_text(json.dumps({**about, "facts": facts}))
        refused(tmp_path, make)
    file.write_text(json.dumps(about["facts"]))
    refused(tmp_path, make, "is damaged")


def test_another_version_makes_its_own(tmp_path, make, monkeypatch):
    decoded(tmp_path, "set", ["a"], make)
    monkeypatch.setattr(sys.modules[decoded.__module__], "VERSION", 0)
    decoded(tmp_path, "set", ["a"], make)
    assert make.calls == 2 and len(list(tmp_path.iterdir())) == 2


# ---- a maker that fails, and two at once


@pytest.mark.parametrize("error", [UserError("a broken picture"), KeyboardInterrupt()])
def test_a_maker_that_fails_leaves_nothing_behind(tmp_path, make, error):
    def fail(path):
        np.save(path, make.pixels)
        raise error

    with pytest.raises(type(error)):
        decoded(tmp_path, "set", ["a"], fail)
    assert not list(tmp_path.iterdir())
    decoded(tmp_path, "set", ["a"], make)
    assert make.calls == 1


def test_a_maker_that_makes_no_pictures_is_a_fault_of_the_program(tmp_path, make):
    make.pixels = make.pixels.astype(np.float32)
    with pytest.raises(ValueError, match="float32"):
        decoded(tmp_path, "set", ["a"], make)
    assert not list(tmp_path.iterdir())


def test_two_at_once_make_one(tmp_path, make):
    """Another process finishes while this one is still at work."""

    def slow(path):
        decoded(tmp_path, "set", ["a"], make)
        np.save(path, make.pixels)
        return {"labels": [1, 2]}

    array, facts = decoded(tmp_path, "set", ["a"], slow)
    assert (array == make.pixels).all() and facts["labels"] == [1, 2]
    assert make.calls == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_rename_that_fails_for_another_reason_is_told(tmp_path, make, monkeypatch):
    def fail(*paths):
        raise PermissionError(13, "not allowed")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(UserError, match="not allowed"):
        decoded(tmp_path, "set", ["a"], make)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_told(tmp_path, make):
    def fill(path):
        path.write_bytes(b"some of it")
        raise OSError("Not enough free space to write 153600000 bytes")  # as NumPy says it, without a file

    (tmp_path / "file").touch()
    cases = [
        (tmp_path / "cache", fill, "Not enough free space"),
        (tmp_path / "file", make, "File exists"),
        (tmp_path / "file" / "cache", make, "Not a directory"),
    ]
    for folder, maker, why in cases:
        with pytest.raises(UserError) as e:
            decoded(folder, "set", ["a"], maker)
        for word in (f"cannot be kept in {folder} ({why}", "make room", "--data.cache"):
            assert word in str(e.value)
    assert make.calls == 0 and not list((tmp_path / "cache").iterdir())
