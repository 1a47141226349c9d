"""A folder of one's own pictures: its three layouts, what people have in such folders, and what is wrong with them."""

import json
import os

import pytest
from PIL import Image

from minidiff.data import folder
from minidiff.data.images import read_image
from minidiff.errors import UserError


def add(path, *names):
    """Tiny pictures."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path / name)


def describe(path, *records):
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    (path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def found(path):
    """(name relative to the folder, captions, label) of each item."""
    return [(i.path.relative_to(path).as_posix(), i.captions, i.label) for i in folder.items(path)]


def refuses(path, *words):
    """All the words are in the one sentence of the error."""
    with pytest.raises(UserError) as e:
        folder.items(path)
    for word in words:
        assert str(word) in str(e.value)
    assert "\n" not in str(e.value)


# Class folders


def test_class_folders(tmp_path):
    add(
        tmp_path,
        "red_panda/b.jpg",
        "red_panda/a.png",
        "cat/1/x y.JPG",
        "cat/1/deep/er/z.WebP",
        "grizzly-bear__2/a.Tiff",
    )
    assert found(tmp_path) == [
        ("cat/1/deep/er/z.WebP", ("cat",), "cat"),
        ("cat/1/x y.JPG", ("cat",), "cat"),
        ("grizzly-bear__2/a.Tiff", ("grizzly bear 2",), "grizzly bear 2"),
        ("red_panda/a.png", ("red panda",), "red panda"),
        ("red_panda/b.jpg", ("red panda",), "red panda"),
    ]
    assert read_image(folder.items(tmp_path)[0].path, 2).shape == (2, 2, 3)


def test_what_else_lies_in_folders_is_passed_over(tmp_path):
    add(tmp_path, "cat/a.jpg", ".thumbnails/b.jpg", "cat/.c.jpg", "cat/.trash/d.jpg", ".e.jpg")
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "cat/._a.jpg",
        "README.txt",
        "cat/notes.md",
    ):
        (tmp_path / name).write_bytes(b"\0\1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "album.jpg").mkdir()
    assert found(tmp_path) == [("cat/a.jpg", ("cat",), "cat")]


def test_a_hidden_folder_may_be_named(tmp_path):
    add(tmp_path, ".data/cat/a.jpg")
    assert found(tmp_path / ".data") == [("cat/a.jpg", ("cat",), "cat")]


def test_umlauts_composed_and_taken_apart(tmp_path):
    add(tmp_path, "Käfer/größe 1.jpg", "Vo\u0308gel/u\u0308.jpg")
    assert [i.label for i in folder.items(tmp_path)] == ["Käfer", "Vögel"]
    assert all(i.path.is_file() for i in folder.items(tmp_path))


def test_links_to_pictures_and_folders_are_followed(tmp_path):
    add(tmp_path, "elsewhere/a.jpg", "elsewhere/deep/b.jpg", "mine/cat/x.jpg")
    (tmp_path / "mine" / "cat" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "mine" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "hound").symlink_to(tmp_path / "elsewhere")
    assert [name for name, _, _ in found(tmp_path / "mine")] == [
        "cat/linked.jpg",
        "cat/x.jpg",
        "dog/a.jpg",
        "dog/deep/b.jpg",
        "hound/a.jpg",
        "hound/deep/b.jpg",
    ]


def test_links_in_a_circle_end(tmp_path):
    add(tmp_path, "mine/cat/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "mine" / "cat" / "up").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "mine" / "dog")
    assert [name for name, _, _ in found(tmp_path / "mine")] == ["cat/a.jpg", "dog/b.jpg"]


def test_pictures_that_cannot_be_read_are_listed(tmp_path):
    """`read_image` says what is wrong with them: none is passed over in silence."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    items = folder.items(tmp_path)
    assert [i.path.name for i in items] == ["gone.jpg", "phone.HEIC"]
    for item in items:
        with pytest.raises(UserError, match=item.path.name):
            read_image(item.path, 8)


def test_pictures_outside_the_class_folders(tmp_path):
    add(tmp_path, "cat/a.jpg", "stray.jpg")
    refuses(tmp_path, "stray.jpg is in no class folder; move it")


@pytest.mark.parametrize("name", ["_-_", "🐕", "!!!"])
def test_a_class_without_a_name(tmp_path, name):
    add(tmp_path, f"{name}/a.jpg", "cat/a.jpg")
    refuses(tmp_path, "class folder", name, "holds no words; rename it")


@pytest.mark.parametrize(
    "parts",
    [
        ["train", "val"], ["train"], ["Train", "valid", "test"], ["validation", "test"], ["train2017", "val2017"],
        ["training", "testing"], ["dev", "eval", "train_1"],
    ],
)  # fmt: skip
def test_parts_of_a_data_set_are_no_classes(tmp_path, parts):
    for part in parts:
        add(tmp_path, f"{part}/cat/a.jpg", f"{part}/dog/a.jpg")
    refuses(tmp_path, f"{tmp_path} are parts of a data set, not classes; name one, such as {tmp_path}/{min(parts)}")
    assert [label for _, _, label in found(tmp_path / parts[0])] == ["cat", "dog"]
    add(tmp_path, "bus/a.jpg")  # then these are classes, among them that of trains
    assert len(found(tmp_path)) == 1 + 2 * len(parts)


def test_metadata_one_level_down_is_not_passed_over(tmp_path):
    add(tmp_path, "a/x.jpg", "b/images/x.jpg", "c/x.jpg")
    describe(tmp_path / "b", {"file_name": "images/x.jpg", "text": "A dog"})
    refuses(tmp_path, "name one, such as", tmp_path / "b")
    assert found(tmp_path / "b") == [("images/x.jpg", ("A dog",), None)]


def test_metadata_further_down_and_in_a_table_are_not_passed_over(tmp_path):
    add(tmp_path, "a/train/x.jpg", "b/x.jpg")
    describe(tmp_path / "a" / "train", {"file_name": "x.jpg", "text": "A dog"})
    refuses(tmp_path, "name one, such as", tmp_path / "a" / "train")
    add(tmp_path / "other", "x.jpg")
    (tmp_path / "other" / "metadata.csv").write_text("file_name,text\nx.jpg,A dog")
    refuses(tmp_path / "other", "metadata.csv is not read; write metadata.jsonl")


def test_classes_one_level_too_deep(tmp_path):
    add(tmp_path, "flowers/rose/a.jpg", "flowers/daisy/a.jpg")
    refuses(
        tmp_path, f"all pictures are in subfolders of {tmp_path}/flowers; if these are the classes, name that folder"
    )
    assert {label for _, _, label in found(tmp_path / "flowers")} == {"rose", "daisy"}
    add(tmp_path, "flowers/a.jpg")
    assert {label for _, _, label in found(tmp_path)} == {"flowers"}


def test_classes_of_the_same_words_are_one(tmp_path):
    add(tmp_path, "Red Panda/a.jpg", "red_panda/b.jpg", "cat/a.jpg")
    assert {label for _, _, label in found(tmp_path)} == {"Red Panda", "cat"}


def test_folders_that_link_to_each_other_end(tmp_path):
    names = [f"c{i}" for i in range(12)]
    add(tmp_path, *(f"mine/{name}/a.jpg" for name in names))
    for name in names:
        for other in names:
            if other != name:
                (tmp_path / "mine" / name / f"to-{other}").symlink_to(tmp_path / "mine" / other)
    assert len(found(tmp_path / "mine")) == 12 * 12


def test_folders_almost_without_end(tmp_path, monkeypatch):
    add(tmp_path, "cat/a.jpg")
    monkeypatch.setattr(folder, "_pictures", lambda path: _endless())
    refuses(tmp_path, str(tmp_path), "folders within folders")


def _endless():
    yield from _endless()


def test_half_characters_and_accents_taken_apart(tmp_path):
    add(tmp_path, "a.jpg", "b.jpg")
    describe(
        tmp_path,
        '{"file_name": "a.jpg", "text": "a \\ud800 dog"}',
        {"file_name": "b.jpg", "text": "a cafe\u0301"},
    )
    captions = [texts[0] for _, texts, _ in found(tmp_path)]
    assert captions == ["a ? dog", "a caf\u00e9"]
    describe(tmp_path, {"file_name": "a.jpg", "text": None, "caption": "a dog"})
    assert found(tmp_path) == [("a.jpg", ("a dog",), None)]


def test_a_class_whose_name_is_not_utf_8(tmp_path):
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(place)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    add(tmp_path, "dog/a.jpg")
    Image.new("RGB", (4, 4)).save(os.fsdecode(place) + "/a.jpg")
    labels = [label for _, _, label in found(tmp_path)]
    assert [label.encode() for label in sorted(labels)] == [b"caf?", b"dog"]


def test_pictures_without_captions(tmp_path):
    add(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "notes.txt").write_text("of no picture")
    refuses(tmp_path, str(tmp_path), "have no captions", "folder for each class", "metadata.jsonl", ".txt file")


def test_no_folder(tmp_path):
    add(tmp_path, "a.jpg")
    refuses(tmp_path / "nowhere", "nowhere does not exist; name a folder of pictures")
    refuses(tmp_path / "a.jpg", "a.jpg is a file; name a folder of pictures")


def test_no_pictures(tmp_path):
    refuses(tmp_path, str(tmp_path), "holds no pictures", ".jpg")
    (tmp_path / "film.mp4").touch()
    (tmp_path / "empty").mkdir()
    add(tmp_path, ".hidden/a.jpg")
    refuses(tmp_path, "holds no pictures")


# Text files


def test_text_files(tmp_path):
    add(tmp_path, "b.JPG", "a.png", "deep/c.v2.jpg", "d.jpg")
    (tmp_path / "b.txt").write_text("A dog\n\n  on  a sofa \n\n", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes("\ufeffEin Käfer\r\n".encode())
    (tmp_path / "deep" / "c.v2.txt").write_text("A cat")
    (tmp_path / "d.TXT").write_text("A mouse")
    assert found(tmp_path) == [
        ("a.png", ("Ein Käfer",), None),
        ("b.JPG", ("A dog", "on a sofa"), None),
        ("d.jpg", ("A mouse",), None),
        ("deep/c.v2.jpg", ("A cat",), None),
    ]


def test_a_text_may_have_the_pictures_whole_name_and_any_line_ends(tmp_path):
    add(tmp_path, "cat/a.jpg", "cat/b.jpg")
    (tmp_path / "cat" / "a.jpg.txt").write_bytes("A cat\r\non a\u2028mat\rasleep\n".encode())
    (tmp_path / "cat" / "b.txt").write_text("A dog")
    assert [texts for _, texts, _ in found(tmp_path)] == [("A cat", "on a mat", "asleep"), ("A dog",)]


def test_text_files_win_over_class_folders(tmp_path):
    add(tmp_path, "cat/a.jpg")
    (tmp_path / "cat" / "a.txt").write_text("A tabby")
    assert found(tmp_path) == [("cat/a.jpg", ("A tabby",), None)]


def test_a_picture_without_its_text(tmp_path):
    add(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.txt").write_text("A dog")
    refuses(tmp_path, "b.jpg has no b.txt with its caption")


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf\n", b"!!!\n_\n"])
def test_a_text_without_a_caption(tmp_path, content):
    add(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(content)
    refuses(tmp_path, "a.txt holds no words; write a caption")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_text_in_another_encoding(tmp_path, encoding):
    add(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_text("Ein Käfer", encoding=encoding)
    refuses(tmp_path, "a.txt is not UTF-8", "save it as UTF-8")


# metadata.jsonl


def test_metadata(tmp_path):
    add(tmp_path, "b.jpg", "unnamed.jpg", "deep/Ä 1.PNG")
    describe(
        tmp_path,
        {"file_name": "b.jpg", "text": "  A dog\n on a  sofa "},
        "",
        {"file_name": "./deep/Ä 1.PNG", "caption": ["A cat", " ", "A\u2028tabby"], "licence": 3},
        {"file_name": "a.jpg", "text": "A mouse", "caption": "passed over"},
        "  ",
    )
    (tmp_path / "b.txt").write_text("passed over")
    assert found(tmp_path) == [
        ("a.jpg", ("A mouse",), None),
        ("b.jpg", ("A dog on a sofa",), None),
        ("deep/Ä 1.PNG", ("A cat", "A tabby"), None),
    ]


def test_metadata_with_a_byte_order_mark_and_windows_lines(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(
        b'\xef\xbb\xbf{"file_name": "a.jpg", "text": "A dog"}\r\n{"file_name": "b.jpg", "text": "A cat"}\r\n'
    )
    assert found(tmp_path) == [("a.jpg", ("A dog",), None), ("b.jpg", ("A cat",), None)]


GOOD = {"file_name": "a.jpg", "text": "A dog"}


@pytest.mark.parametrize(
    "record, words",
    [
        ('{"file_name": "b.jpg", "text": ', ["is not JSON", "write one object a line"]),
        ("file_name,text", ["is not JSON"]),
        ("[" * 100_000, ["is not JSON"]),
        ("[]", ['no "file_name"']),
        ("3", ['no "file_name"']),
        ({"text": "A cat"}, ['no "file_name"']),
        ({"file_name": 3, "text": "A cat"}, ['no "file_name"']),
        ({"file_name": "b.jpg"}, ['no "text"']),
        ({"file_name": "b.jpg", "text": 3}, ['no "text"']),
        ({"file_name": "b.jpg", "text": None}, ['no "text"']),
        ({"file_name": "b.jpg", "text": {"en": "A cat"}}, ['no "text"']),
        ({"file_name": "b.jpg", "text": ["A cat", 3]}, ['no "text"']),
        ({"file_name": "b.jpg", "text": ""}, ["a caption without words"]),
        ({"file_name": "b.jpg", "text": " \n"}, ["a caption without words"]),
        ({"file_name": "b.jpg", "text": []}, ["a caption without words"]),
        ({"file_name": "b.jpg", "caption": [" ", "🐕"]}, ["a caption without words"]),
        ({"file_name": "a.jpg", "text": "A cat"}, ["names a.jpg a second time"]),
        ({"file_name": "./a.jpg", "text": "A cat"}, ["names a.jpg a second time"]),
        ({"file_name": "", "text": "A cat"}, ["inside the folder, ''"]),
        ({"file_name": "../b.jpg", "text": "A cat"}, ["inside the folder, '../b.jpg'"]),
        ({"file_name": "/b.jpg", "text": "A cat"}, ["inside the folder, '/b.jpg'"]),
        ({"file_name": "deep\\b.jpg", "text": "A cat"}, ["has a backslash in", "write / between folders"]),
        ({"file_name": "C:b.jpg", "text": "A cat"}, ["inside the folder"]),
        ({"file_name": "b\0.jpg", "text": "A cat"}, ["inside the folder, 'b\\x00.jpg'"]),
        ('{"file_name": "\\ud800.jpg", "text": "A cat"}', ["inside the folder, '\\ud800.jpg'"]),
        ({"file_name": "b" * 5000, "text": "A cat"}, ["inside the folder, 'bbb"]),
    ],
)
def test_a_wrong_line_is_named(tmp_path, record, words):
    describe(tmp_path, GOOD, "", record)
    refuses(tmp_path, "metadata.jsonl, line 3 ", *words)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_metadata(tmp_path, content):
    add(tmp_path, "cat/a.jpg")
    (tmp_path / "metadata.jsonl").write_bytes(content)
    refuses(tmp_path, "metadata.jsonl is empty")


def test_metadata_in_another_encoding(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "Ein Käfer"}', encoding="latin-1")
    refuses(tmp_path, "metadata.jsonl is not UTF-8 text (byte 37)")
