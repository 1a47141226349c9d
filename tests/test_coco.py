"""COCO's caption files: what they list, and a sentence about every way in which one can be wrong."""

import json
import os

import pytest

from minidiff.data import coco
from minidiff.data.images import Item
from minidiff.errors import UserError

IMAGES = [
    {"id": 30, "file_name": "c.jpg", "height": 480, "width": 640, "license": 1},
    {"id": 7, "file_name": "a.jpg", "height": 480, "width": 640, "license": 1},
    {"id": 200, "file_name": "sub/d ü.jpg"},
    {"id": 100, "file_name": "uncaptioned.jpg"},
    {"id": 101, "file_name": "blank.jpg"},
]
ANNOTATIONS = [
    {"id": 1, "image_id": 7, "caption": "  A dog\n on a  sofa. "},
    {"id": 2, "image_id": 200, "caption": "Two cats"},
    {"id": 3, "image_id": 7, "caption": "A sofa with a dog"},
    {"id": 4, "image_id": 30, "caption": "A bus"},
    {"id": 5, "image_id": 101, "caption": " \n"},
    {"id": 6, "image_id": 7, "caption": ""},
    {"id": 8, "image_id": 101, "caption": "!!! \U0001f415"},
]
CAPTIONS = [("a.jpg", ("A dog on a sofa.", "A sofa with a dog")), ("c.jpg", ("A bus",)), ("sub/d ü.jpg", ("Two cats",))]


def write(folder, images=IMAGES, annotations=ANNOTATIONS, name="train2017", image_folder=None):
    """A dataset in the published layout; the path of its caption file."""
    (folder / (image_folder or name)).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    file = folder / "annotations" / f"captions_{name}.json"
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def refuses(path, *words, split="train"):
    """All the words are in the one sentence of the error."""
    with pytest.raises(UserError) as e:
        coco.items(path, split)
    for word in words:
        assert word in str(e.value)
    assert "\n" not in str(e.value)


def test_items_are_in_the_order_of_their_ids(tmp_path):
    write(tmp_path)
    assert coco.items(tmp_path) == [Item(tmp_path / "train2017" / name, captions) for name, captions in CAPTIONS]


def test_a_caption_file_may_be_named(tmp_path):
    file = write(tmp_path)
    write(tmp_path, name="train2014")
    assert [item.path for item in coco.items(file, "ignored")] == [tmp_path / "train2017" / n for n, _ in CAPTIONS]


def test_a_caption_file_may_be_named_from_its_own_folder(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path / "annotations")
    path = coco.items(coco.Path("captions_train2017.json"))[0].path
    assert os.path.samefile(path.parent, tmp_path / "train2017")


def test_images_may_lie_in_a_folder_of_that_name(tmp_path):
    file = write(tmp_path, image_folder="images/train2017")
    for path in (tmp_path, file):
        assert coco.items(path)[0].path == tmp_path / "images" / "train2017" / "a.jpg"


def test_the_split_chooses_the_file(tmp_path):
    write(tmp_path)
    write(tmp_path, IMAGES[:1], ANNOTATIONS[3:4], name="val2017")
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    (tmp_path / "annotations" / "._captions_val2017.json").write_bytes(b"\0\5\x16\7")
    assert [item.path.parent.name for item in coco.items(tmp_path, "val")] == ["val2017"]
    assert [item.path for item in coco.items(tmp_path)] == [tmp_path / "train2017" / name for name, _ in CAPTIONS]


def test_a_byte_order_mark_is_allowed(tmp_path):
    file = write(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(coco.items(tmp_path)) == 3


def test_what_is_missing_is_named(tmp_path):
    refuses(tmp_path / "nowhere", "there is no folder and no caption file", "nowhere", "that COCO was unpacked in")
    refuses(tmp_path, "there is no", "captions_train*.json", "unpack COCO's annotations")
    file = write(tmp_path)
    refuses(tmp_path, "captions_val*.json", split="val")
    (tmp_path / "train2017").rmdir()
    refuses(tmp_path, "there is no folder", "train2017", "captions_train2017.json", "unpack train2017.zip")
    refuses(file, "there is no folder", str(tmp_path / "train2017"))


def test_several_files_of_a_split(tmp_path):
    write(tmp_path)
    write(tmp_path, name="train2014")
    refuses(tmp_path, "holds captions_train2014.json, captions_train2017.json; name the file")
    assert coco.items(tmp_path, "train2014")[0].path.parent.name == "train2014"


def test_a_caption_file_of_another_name(tmp_path):
    file = write(tmp_path)
    refuses(file.rename(file.with_name("my_captions.json")), "my_captions.json is not named after its image folder")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"images": [', b"\xff\xfe\0", b"\x89PNG\r\n", b"[" * 100_000, b"1" * 5000, b'{"images": [], }'],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_not_json(tmp_path, content):
    file = write(tmp_path)
    file.write_bytes(content)
    refuses(tmp_path, "captions_train2017.json")


@pytest.mark.parametrize("content", [[], "x", None, 3, {}, {"images": []}, {"images": {}, "annotations": []}])
def test_json_of_another_kind(tmp_path, content):
    write(tmp_path).write_text(json.dumps(content))
    refuses(tmp_path, "captions_train2017.json: '", "' must be a list", "as COCO publishes it")


@pytest.mark.parametrize(
    "image, words",
    [
        ({"file_name": "x.jpg"}, ["'id' must be a whole number", "got {'file_name': 'x.jpg'}"]),
        ({"id": "5", "file_name": "x.jpg"}, ["'id' must be a whole number"]),
        ({"id": 5.0, "file_name": "x.jpg"}, ["'id' must be a whole number"]),
        ({"id": True, "file_name": "x.jpg"}, ["'id' must be a whole number"]),
        ({"id": None, "file_name": "x.jpg"}, ["'id' must be a whole number"]),
        ({"id": 5}, ["'file_name' must be text"]),
        ({"id": 5, "file_name": ["x.jpg"]}, ["'file_name' must be text"]),
        (5, ["'id' must be a whole number", "got 5"]),
        (None, ["'id' must be a whole number"]),
        ([["id", 5]], ["'id' must be a whole number"]),
        ({"id": 7, "file_name": "x.jpg"}, ["has the id 7 of an image before it"]),
        ({"id": 5, "file_name": ""}, ["names no file inside the image folder, ''"]),
        ({"id": 5, "file_name": "/etc/x.jpg"}, ["inside the image folder, '/etc/x.jpg'"]),
        ({"id": 5, "file_name": "../x.jpg"}, ["inside the image folder, '../x.jpg'"]),
        ({"id": 5, "file_name": "a/../../x.jpg"}, ["inside the image folder"]),
        ({"id": 5, "file_name": "..\\x.jpg"}, ["inside the image folder"]),
        ({"id": 5, "file_name": "C:/x.jpg"}, ["inside the image folder"]),
        ({"id": 5, "file_name": "x\0.jpg"}, ["inside the image folder, 'x\\x00.jpg'"]),
        ({"id": 5, "file_name": "\ud800.jpg"}, ["inside the image folder, '\\ud800.jpg'"]),
        ({"id": 5, "file_name": "x" * 5000}, ["inside the image folder, 'xxx"]),
    ],
)
def test_a_wrong_image_entry_is_named(tmp_path, image, words):
    write(tmp_path, [*IMAGES, image])
    refuses(tmp_path, "captions_train2017.json: images[5]", *words)


@pytest.mark.parametrize(
    "annotation, words",
    [
        ({"caption": "A dog"}, ["'image_id' must be a whole number"]),
        ({"image_id": "7", "caption": "A dog"}, ["'image_id' must be a whole number"]),
        ({"image_id": 7}, ["'caption' must be text"]),
        ({"image_id": 7, "caption": None}, ["'caption' must be text"]),
        ({"image_id": 7, "caption": ["A dog"]}, ["'caption' must be text"]),
        ("A dog", ["'image_id' must be a whole number", "got 'A dog'"]),
        ({"image_id": 8, "caption": "A dog"}, ["describes the image 8, which is not listed"]),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path, annotation, words):
    write(tmp_path, annotations=[*ANNOTATIONS, annotation])
    refuses(tmp_path, "captions_train2017.json: annotations[7]", *words)


def test_a_long_entry_is_shortened(tmp_path):
    file = write(tmp_path, [{"file_name": "x" * 10_000}])
    deep = {f"{i}" * 30: {f"{k}" * 30: ["x" * 30] * 9 for k in range(9)} for i in range(9)}
    for content in (file.read_text(), json.dumps(deep), json.dumps([deep] * 9)):
        file.write_text(content)
        with pytest.raises(UserError) as e:
            coco.items(tmp_path)
        assert len(str(e.value)) < 160 + len(str(file))


@pytest.mark.parametrize(
    "images, annotations", [([], []), (IMAGES, []), (IMAGES, ANNOTATIONS[4:5]), (IMAGES, ANNOTATIONS[6:])]
)
def test_a_file_without_captions(tmp_path, images, annotations):
    write(tmp_path, images, annotations)
    refuses(tmp_path, "captions_train2017.json has no image with a caption")
