"""CIFAR-10 in its four forms: the same pixels from each, and of a file that is not what it should be one sentence."""

import contextlib
import copyreg
import gzip
import io
import os
import pickle
import random
import struct
import tarfile

import numpy as np
import pytest

from minidiff.data import cifar10
from minidiff.data.cifar10 import AGAIN, ARCHIVES, BATCHES, CLASSES, FOLDERS, captions, files_of, locate, read
from minidiff.errors import UserError

PYTHON, BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
FORMS = [*FOLDERS, *ARCHIVES]
STEMS = [stem for stems in BATCHES.values() for stem in stems]


# ---- writing what the authors publish


class Opcodes(bytes):
    """Goes into a pickle as it stands."""


def text(string):
    """Opcodes that push these bytes as Python 2's str."""
    return (b"U" + bytes([len(string)]) if len(string) < 256 else b"T" + struct.pack("<i", len(string))) + string


def python2(value):
    """Opcodes that push a value, as Python 2 wrote them with protocol 2; `pickletools` has their meaning."""
    if isinstance(value, Opcodes):
        return bytes(value)
    if isinstance(value, bytes):
        return text(value)
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, np.ndarray):
        return array(value.tobytes(), value.shape)
    begin, end = {list: (b"](", b"e"), tuple: (b"(", b"t"), dict: (b"}(", b"u")}[type(value)]
    parts = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
    return begin + b"".join(map(python2, parts)) + end


def array(pixels, shape, code=b"u1", columns_first=False):
    """Opcodes that push an array, its parts put into the pickle's memory as cPickle does."""
    about = python2((3, b"|", None, None, None, -1, -1, 0))
    dtype = Opcodes(b"cnumpy\ndtype\nq\x02" + python2((code, 0, 1)) + b"R" + about + b"b")
    state = python2((1, shape, dtype, columns_first, pixels))
    empty = b"cnumpy.core.multiarray\n_reconstruct\nq\x00(cnumpy\nndarray\nq\x01" + python2((0,)) + text(b"b") + b"tR"
    return Opcodes(empty + state + b"b")


def pickled(value):
    return b"\x80\x02" + python2(value) + b"."


def batch(planes, labels, /, **changes):
    """The record of a batch; `changes` replaces parts of it, None takes them out."""
    names = [b"picture_%d.png" % i for i in range(len(labels))]
    record = {"batch_label": b"a batch", "labels": labels, "data": planes, "filenames": names, **changes}
    return {key.encode(): value for key, value in record.items() if value is not None}


META = {b"num_cases_per_batch": 10000, b"label_names": [name.encode() for name in CLASSES], b"num_vis": 3072}


def small_cifar(n=4, seed=0):
    """{batch's stem: (planes uint8 (n, 3072), labels)}, all classes among the training batches where n >= 2."""
    rng = np.random.default_rng(seed)
    return {
        stem: (rng.integers(0, 256, (n, 3072), np.uint8), [(i * n + k) % 10 for k in range(n)])
        for i, stem in enumerate(STEMS)
    }


def write_python(folder, batches, dump=pickled, meta=META):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (planes, labels) in batches.items():
        (folder / stem).write_bytes(dump(batch(planes, labels)))
    (folder / "batches.meta").write_bytes(dump(meta))


def write_binary(folder, batches):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (planes, labels) in batches.items():
        records = np.concatenate([np.array(labels, np.uint8)[:, None], planes], axis=1)
        (folder / f"{stem}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")


def write_form(parent, name, batches):
    """One of FORMS in the folder `parent`; returns its path."""
    form = {**FOLDERS, **ARCHIVES}[name]
    folder = parent / (PYTHON if form == "python" else BINARY)
    (write_python if form == "python" else write_binary)(folder, batches)
    if name in ARCHIVES:
        with tarfile.open(parent / name, "w:gz") as tar:
            tar.add(folder, folder.name)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return parent / name


def refused(call, *words):
    """The one sentence of a UserError, which holds these words."""
    with pytest.raises(UserError) as e:
        call()
    sentence = str(e.value)
    assert "\n" not in sentence and len(sentence) < 500, sentence
    for word in words:
        assert str(word) in sentence, sentence
    return sentence


# ---- the four forms


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("split", BATCHES)
def test_pixels_labels_and_names_are_the_same_from_every_form(tmp_path, name, split):
    batches = small_cifar()
    form = write_form(tmp_path, name, batches)
    before = sorted(tmp_path.rglob("*"))
    images, labels, names = read(tmp_path, split)
    planes = np.concatenate([batches[stem][0] for stem in BATCHES[split]])
    assert images.dtype == np.uint8 and images.shape == (len(planes), 32, 32, 3) and images.flags.c_contiguous
    for y, x, channel in [(0, 0, 0), (0, 31, 0), (31, 0, 1), (5, 7, 2), (31, 31, 2)]:
        assert (images[:, y, x, channel] == planes[:, channel * 1024 + y * 32 + x]).all()
    assert (images.transpose(0, 3, 1, 2).reshape(-1, 3072) == planes).all()
    assert labels.tolist() == [label for stem in BATCHES[split] for label in batches[stem][1]]
    assert names == CLASSES
    again = read(form, split)
    assert (again[0] == images).all() and (again[1] == labels).all()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_found_itself_and_in_its_parent(tmp_path, name):
    path = write_form(tmp_path, name, small_cifar(1))
    kind = {**FOLDERS, **ARCHIVES}[name]
    assert locate(tmp_path) == locate(path) == (path, kind)
    files = files_of(tmp_path)
    assert files == [path] if path.is_file() else len(files) == 7 and all(f.parent == path for f in files)


def test_a_folder_is_taken_before_an_archive_and_the_binary_form_before_the_pickles(tmp_path):
    for name in reversed(FORMS):
        write_form(tmp_path, name, small_cifar(1))
        assert locate(tmp_path)[0].name == name


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_found_in_a_folder_of_the_same_name(tmp_path, name):
    """As where an archive was unpacked into a folder made for it."""
    path = write_form(tmp_path / name, name, small_cifar(1))
    assert locate(tmp_path / name)[0] == path


def test_the_classes_may_have_other_names_but_a_file_of_names_is_not_needed(tmp_path):
    other = [b"Tree", *META[b"label_names"][1:]]
    write_python(tmp_path / PYTHON, small_cifar(1), meta={b"label_names": other})
    assert read(tmp_path)[2] == ("tree", *CLASSES[1:])
    (tmp_path / PYTHON / "batches.meta").unlink()
    assert read(tmp_path)[2] == CLASSES


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("kind", [bytes, str])
def test_a_pickle_that_python_3_wrote_again(tmp_path, protocol, kind):
    def dump(record):
        if kind is str:
            record = {key.decode(): value for key, value in record.items()}
            if "label_names" in record:
                record["label_names"] = list(CLASSES)
        return pickle.dumps(record, protocol)

    batches = small_cifar()
    write_python(tmp_path / PYTHON, batches, dump)
    images, _, names = read(tmp_path, "test")
    assert (images.transpose(0, 3, 1, 2).reshape(-1, 3072) == batches["test_batch"][0]).all() and names == CLASSES


@pytest.mark.parametrize("protocol, asked", [(2, "_codecs.encode"), (5, "numeric._frombuffer")])
def test_python_3_pickles_that_need_other_names_are_refused(tmp_path, protocol, asked):
    write_python(tmp_path / PYTHON, small_cifar(1), lambda record: pickle.dumps(record, protocol))
    refused(lambda: read(tmp_path), "data_batch_1", asked, "no file of CIFAR-10 needs")


def test_captions_name_the_class():
    for name in CLASSES:
        texts = captions(name)
        assert len(texts) >= 2 and all(f"a {name}" in t or f"an {name}" in t for t in texts)
    assert captions("airplane")[0] == "an airplane" and captions("bird")[0] == "a bird"


# ---- what is missing, cut off, too large


@pytest.mark.parametrize("name", FORMS)
def test_a_missing_batch_is_named(tmp_path, name):
    batches = small_cifar(1)
    del batches["data_batch_3"]
    path = write_form(tmp_path, name, batches)
    refused(lambda: read(tmp_path), path, "lacks data_batch_3", "minidiff download cifar10")
    assert len(read(tmp_path, "test")[0]) == 1


def test_nothing_there(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    paths = {name: tmp_path for name in ("file", "my.tar.gz", "cifar-10-binary.tar.gz")}  # where to put it instead
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / PYTHON, *(tmp_path / name for name in paths)):
        sentence = refused(lambda path=path: read(path), "there is no CIFAR-10 in", path, *FORMS)
        assert sentence.endswith(f"minidiff download cifar10 --out {paths.get(path.name, path)}")


def test_a_batch_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_binary(tmp_path / BINARY, small_cifar(1))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cifar10.Path, "read_bytes", refuse)
    refused(lambda: read(tmp_path), "data_batch_1.bin cannot be read (Permission denied); check its permissions")


@pytest.mark.parametrize("name", [PYTHON, BINARY])
@pytest.mark.parametrize("keep", [0, 1, 5, 100, 3072, -1])
def test_a_truncated_batch_is_named(tmp_path, name, keep):
    write_form(tmp_path, name, small_cifar(2))
    file = next(file for file in (tmp_path / name).iterdir() if file.name.startswith("data_batch_2"))
    file.write_bytes(file.read_bytes()[:keep])
    refused(lambda: read(tmp_path), file, AGAIN)


@pytest.mark.parametrize("name", FORMS)
def test_an_oversized_batch_is_not_read(tmp_path, monkeypatch, name):
    write_form(tmp_path, name, small_cifar(2))
    monkeypatch.setattr(cifar10, "MOST_BYTES", 6000)
    refused(lambda: read(tmp_path), name, "data_batch_1", "more than a file of CIFAR-10 can have", AGAIN)


@pytest.mark.parametrize("name", [PYTHON, BINARY])
def test_a_batch_of_too_many_images_is_named(tmp_path, monkeypatch, name):
    write_form(tmp_path, name, small_cifar(3))
    monkeypatch.setattr(cifar10, "MOST_IMAGES", 2)
    refused(lambda: read(tmp_path), "data_batch_1", "has 3 images", "1 to 2", AGAIN)


def test_binary_records_with_a_wrong_label(tmp_path):
    batches = small_cifar(3)
    batches["data_batch_4"][1][2] = 10
    write_binary(tmp_path / BINARY, batches)
    refused(lambda: read(tmp_path), "data_batch_4.bin", "image 2", "0..9", AGAIN)


@pytest.mark.parametrize(
    "names", [["cat"] * 10, list(CLASSES[:9]), [*CLASSES, "more"], [], [*CLASSES[:9], "!!!"], [*CLASSES[:9], "Cat!"]]
)
def test_wrong_names_in_the_binary_form(tmp_path, names):
    write_binary(tmp_path / BINARY, small_cifar(1))
    (tmp_path / BINARY / "batches.meta.txt").write_text("\n".join(names))
    refused(lambda: read(tmp_path), "batches.meta.txt", "10 different classes")


def test_class_names_with_a_byte_order_mark_and_umlauts(tmp_path):
    write_binary(tmp_path / BINARY, small_cifar(1))
    names = ["flugzeug", "vögel", *CLASSES[2:]]
    (tmp_path / BINARY / "batches.meta.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(names).encode())
    assert read(tmp_path)[2] == tuple(names)
    (tmp_path / BINARY / "batches.meta.txt").write_bytes("\n".join(names).encode("latin-1"))
    assert read(tmp_path)[2] == tuple(names)


def test_a_batch_cut_at_a_whole_record_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MOST_IMAGES", 6)
    write_binary(tmp_path / BINARY, small_cifar(6))
    assert len(read(tmp_path)[0]) == 30
    file = tmp_path / BINARY / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[: 4 * 3073])
    refused(lambda: read(tmp_path), "data_batch_3.bin has 4 images and others 6", AGAIN)


def test_a_test_batch_cut_at_a_whole_record_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MOST_IMAGES", 6)
    write_binary(tmp_path / BINARY, small_cifar(6))
    file = tmp_path / BINARY / "test_batch.bin"
    file.write_bytes(file.read_bytes()[: 4 * 3073])
    refused(lambda: read(tmp_path, "test"), "test_batch.bin has 4 images and others 6", AGAIN)
    beside = tmp_path / BINARY / "data_batch_1.bin"
    beside.write_bytes(b"short")
    refused(lambda: read(tmp_path, "test"), "data_batch_1.bin has 5 bytes", AGAIN)
    beside.unlink()
    assert len(read(tmp_path, "test")[0]) == 4  # nothing to tell it from a small set


def test_a_link_of_another_name(tmp_path):
    write_binary(tmp_path / "real" / BINARY, small_cifar(1))
    (tmp_path / "mine").symlink_to(tmp_path / "real" / BINARY)
    assert len(read(tmp_path / "mine")[0]) == 5


@pytest.mark.parametrize(
    "names", [None, 7, b"airplane", [b"cat"] * 10, [b""] * 10, [1] * 10, META[b"label_names"][1:], []]
)
def test_wrong_names_in_the_pickled_form(tmp_path, names):
    write_python(tmp_path / PYTHON, small_cifar(1), meta={b"label_names": names})
    refused(lambda: read(tmp_path), "batches.meta", "10 different classes")


# ---- pickles that hold what no batch holds


PLANES, LABELS = small_cifar(2)["test_batch"]
CUT = PLANES.tobytes()[:-1]
HUGE = Opcodes(b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000)  # a whole number of 12,000 digits


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"labels": [3, 10]}, ["image 1", "0..9"]),
        ({"labels": [-1, 3]}, ["image 0", "0..9"]),
        ({"labels": [3, HUGE]}, ["image 1", "0..9"]),
        ({"labels": [3, True]}, ["not whole numbers"]),
        ({"labels": [3.0, 1]}, ["not whole numbers"]),
        ({"labels": [b"3", 1]}, ["not whole numbers"]),
        ({"labels": [None, 1]}, ["not whole numbers"]),
        ({"labels": [3]}, ["1 labels for 2 images"]),
        ({"labels": [3, 1, 1]}, ["3 labels for 2 images"]),
        ({"labels": None}, ["lacks", "'labels'"]),
        ({"labels": (3, 1)}, ["lacks", "'labels'"]),
        ({"labels": PLANES}, ["lacks", "'labels'"]),
        ({"data": None}, ["lacks", "'data'"]),
        ({"data": PLANES.tobytes()}, ["lacks", "'data'"]),
        ({"data": [1, 2]}, ["lacks", "'data'"]),
        ({"labels": [], "data": array(b"", (0, 3072))}, ["has 0 images"]),
        ({"fine_labels": [3, 1]}, ["CIFAR-100"]),
        ({"data": array(PLANES.tobytes(), (2, 3072), b"i1")}, ["no array of bytes, 3072 an image"]),
        ({"data": array(PLANES.tobytes(), (1, 3072), b"u2")}, ["no array of bytes"]),
        ({"data": array(PLANES.tobytes(), (2, 3072), b"O8")}, ["no array of bytes"]),
        ({"data": array(PLANES.tobytes(), (2, 3072), columns_first=True)}, ["no array of bytes"]),
        ({"data": array(PLANES.tobytes(), (4, 1536))}, ["no array of bytes"]),
        ({"data": array(PLANES.tobytes(), (2, 3, 1024))}, ["no array of bytes"]),
        ({"data": array(PLANES.tobytes(), (6144,))}, ["no array of bytes"]),
        ({"data": array(PLANES.tobytes(), (3, 3072))}, ["no array of bytes"]),
        ({"data": array(PLANES.tobytes(), (-2, 3072))}, ["no array of bytes"]),
        ({"data": array(PLANES.tobytes(), (2.0, 3072))}, ["no array of bytes"]),
        ({"data": array(CUT, (2, 3072))}, ["no array of bytes"]),
        ({"data": array([1, 2], (2, 3072))}, ["no array of bytes"]),
        ({"data": array(PLANES.tobytes(), None)}, ["no array of bytes"]),
        ({"data": Opcodes(b"cnumpy\nndarray\n")}, ["lacks", "'data'"]),
        ({"data": Opcodes(b"cnumpy\nndarray\n)R")}, ["no array of bytes"]),
        ({"data": Opcodes(b"cnumpy\nndarray\n)RK\x01b")}, ["no array of bytes"]),
        ({"data": Opcodes(b"cnumpy\nndarray\n)R(K\x01K\x02K\x03tb")}, ["no array of bytes"]),
    ],
)
def test_a_batch_that_is_none(tmp_path, changes, words):
    write_python(tmp_path / PYTHON, small_cifar(2))
    (tmp_path / PYTHON / "test_batch").write_bytes(pickled(batch(PLANES, LABELS, **changes)))
    refused(lambda: read(tmp_path, "test"), tmp_path / PYTHON / "test_batch", *words, AGAIN)


@pytest.mark.parametrize("value, kind", [([1], "list"), (b"data", "bytes"), (None, "NoneType"), (7, "int")])
def test_a_pickle_of_something_else(tmp_path, value, kind):
    write_python(tmp_path / PYTHON, small_cifar(1))
    (tmp_path / PYTHON / "test_batch").write_bytes(pickled(value))
    refused(lambda: read(tmp_path, "test"), "test_batch", f"holds a {kind}, not a dictionary")


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def colliding(n):
    """Opcodes that push n whole numbers of the same hash, each with a value."""
    return b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"K\x01" for i in range(n))


def payloads(marker):
    """{what it is: a pickle that would make a folder `marker`}, or would do other things that no batch does."""
    command, path = f"mkdir {marker}".encode(), text(str(marker).encode())
    code = f"__import__('os').mkdir({str(marker)!r})".encode()
    system = b"cos\nsystem\n" + text(command) + b"\x85R"
    array_of_objects = np.array([Evil(marker)], object)
    found = {
        "os.system": b"\x80\x02" + system + b".",
        "posix.mkdir": b"\x80\x02cposix\nmkdir\n" + path + b"\x85R.",
        "builtins.eval": b"\x80\x02cbuiltins\neval\n" + text(code) + b"\x85R.",
        "__builtin__.eval": b"\x80\x02c__builtin__\neval\n" + text(code) + b"\x85R.",
        "builtins.getattr": b"\x80\x02cbuiltins\ngetattr\n0}.",
        "inside a dictionary": b"\x80\x02}(" + text(b"data") + system + b"u.",
        "inside a list inside it": b"\x80\x02}(" + text(b"labels") + b"](" + system + b"eu.",
        "beside a whole batch": pickled(batch(PLANES, LABELS, filenames=Opcodes(system))),
        "before it": b"\x80\x02" + system + b"0" + pickled(batch(PLANES, LABELS))[2:],
        "as a key": b"\x80\x02}" + system + b"K\x01s.",
        "inst": b"(" + text(command) + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text(command) + b"o.",
        "newobj": b"\x80\x02cos\nmkdir\n" + path + b"\x85\x81.",
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system" + text(command) + b"\x85R.",
        "several lines, in red": b"\x80\x04\x8c\x05os\n\x1b[\x8c\x06system\x93.",
        "a long name": b"\x80\x04\x8c\x02osX" + struct.pack("<i", 100_000) + b"x" * 100_000 + b"\x93.",
        "an attribute of an admitted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
        "numpy.load": b"\x80\x02cnumpy\nload\n" + path + b"\x85R.",
        "numpy scalar": b"\x80\x02cnumpy.core.multiarray\nscalar\n.",
        "copyreg": b"\x80\x02ccopyreg\n_reconstructor\n.",
        "a registered extension": b"\x80\x02\x82\xf0.",
        "a persistent id": b"Pmarker\n.",
        "a class's state": b"\x80\x02cnumpy\nndarray\n}" + text(b"find_class") + b"K\x01sb.",
        "too large a memory": b"\x80\x02}r\xff\xff\xff\x7f.",
        "too large a memory in decimals": b"\x80\x02}p99999999999\n.",
        "too long a string": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3fabc.",
        "a key that takes ages to hash": b"\x80\x02})" + b"2\x86" * 50 + b"K\x01s.",
        "a key nested too deep to hash": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
        "a key of marked tuples nested too deep": b"\x80\x02}" + b"(" * 100_000 + b"t" * 100_000 + b"K\x01s.",
        "frozen sets nested too deep": b"\x80\x04}" + b"(" * 100_000 + b"\x91" * 100_000 + b"K\x01s.",
        "numbers that take ages to tell apart": b"\x80\x02}(" + colliding(20_000) + b"u.",
        "the same in decimals": b"}(" + b"".join(b"I%d\nI1\n" % (i * (2**61 - 1)) for i in range(20_000)) + b"u.",
        "no end": b"\x80\x02}",
        "no pickle": b"\x00" * 100,
        "an unknown protocol": b"\x80\xff}.",
        "deep nesting": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "lone surrogates": b"\x80\x02}X\x03\x00\x00\x00\xed\xb2\x80K\x01s.",
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found[f"__reduce__, protocol {protocol}"] = pickle.dumps({b"data": Evil(marker)}, protocol)
        found[f"an array of objects, protocol {protocol}"] = pickle.dumps({b"data": array_of_objects}, protocol)
    return found


@pytest.fixture
def registered():
    """Somebody's extension registry admits os.mkdir, and has it looked up already."""
    copyreg.add_extension("os", "mkdir", 0xF0)
    yield
    copyreg.remove_extension("os", "mkdir", 0xF0)


@pytest.mark.parametrize("what", payloads("marker"))
@pytest.mark.parametrize("name", ["test_batch", "batches.meta"])
def test_nothing_in_a_pickle_is_executed(tmp_path, registered, name, what):
    marker = tmp_path / "marker"
    write_python(tmp_path / PYTHON, small_cifar(1))
    data = payloads(marker)[what]
    (tmp_path / PYTHON / name).write_bytes(data)
    sentence = refused(lambda: read(tmp_path, "test"), tmp_path / PYTHON / name, AGAIN)
    assert sentence.isprintable()
    assert not marker.exists() and [p.name for p in tmp_path.iterdir()] == [PYTHON]


@pytest.mark.parametrize(
    "what, words",
    [
        ("too large a memory", "2147483647 places in memory"),
        ("too large a memory in decimals", "99999999999 places in memory"),
        ("a key that takes ages to hash", "holds over 40 tuples, long numbers and references"),
        ("a key nested too deep to hash", "holds over 40 tuples"),
        ("a key of marked tuples nested too deep", "holds over 40 tuples"),
        ("frozen sets nested too deep", "holds over 40 tuples"),
        ("numbers that take ages to tell apart", "holds over 40 tuples"),
        ("the same in decimals", "holds over 40 tuples"),
    ],
)
def test_small_pickles_that_grow_are_not_begun(tmp_path, what, words):
    write_python(tmp_path / PYTHON, small_cifar(1))
    (tmp_path / PYTHON / "test_batch").write_bytes(payloads("marker")[what])
    refused(lambda: read(tmp_path, "test"), "test_batch", words)


def test_a_pickle_of_many_parts_is_not_begun(tmp_path):
    write_python(tmp_path / PYTHON, small_cifar(1))
    many = b"\x80\x04(" + b"\x8f" * 200_001 + b"l."  # empty sets, 200 times as large in memory as here
    (tmp_path / PYTHON / "test_batch").write_bytes(many)
    refused(lambda: read(tmp_path, "test"), "test_batch", "over 200000 parts", "nothing in it was executed")


def test_the_payloads_would_have_been_executed(tmp_path):
    """Else the test above shows nothing."""
    made = 0
    for i, data in enumerate(payloads(tmp_path / "marker").values()):
        if b"mkdir" in data and b"\x82\xf0" not in data and b"numpy" not in data[:40]:
            with contextlib.suppress(Exception):
                pickle.loads(data, encoding="bytes")
            marker = tmp_path / "marker"
            if marker.exists():
                marker.rename(tmp_path / str(i))
                made += 1
    assert made >= 12


def test_a_damaged_pickle_is_read_or_named_never_anything_else(tmp_path):
    write_python(tmp_path / PYTHON, small_cifar(1))
    file = tmp_path / PYTHON / "test_batch"
    whole = file.read_bytes()
    start = whole.index(small_cifar(1)["test_batch"][0].tobytes())
    places = [*range(start), *range(start + 3072, len(whole))]  # all but the pixels
    draw = random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.choice(places)] = draw.randrange(256)
        file.write_bytes(data)
        try:
            images, labels, _ = read(tmp_path, "test")
            assert images.shape == (1, 32, 32, 3) and 0 <= labels[0] < 10
        except UserError as e:
            assert str(file) in str(e)


# ---- archives


SPECIAL = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


def archive(path, members, folder=BINARY):
    """A .tar.gz of {name: bytes, or one of SPECIAL}; a list of pairs may name one twice."""
    pairs = members.items() if isinstance(members, dict) else members
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as tar:
        for name, content in pairs:
            info = tarfile.TarInfo(name)
            if content not in SPECIAL:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, f"{folder}/data_batch_1.bin"
                tar.addfile(info)


def whole_members():
    records = np.zeros((1, 3073), np.uint8).tobytes()
    return {f"{BINARY}/{stem}.bin": records for stem in STEMS}


BINARY_ARCHIVE = "cifar-10-binary.tar.gz"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("/tmp/evil", b"x", ["'/tmp/evil'", "outside the archive"]),
        ("../evil", b"x", ["'../evil'", "outside the archive"]),
        (f"{BINARY}/../../evil", b"x", ["outside the archive"]),
        (f"{BINARY}/../{BINARY}/data_batch_1.bin", b"x", ["outside the archive"]),
        (f"{BINARY}/link", tarfile.SYMTYPE, ["link or a device"]),
        (f"{BINARY}/link", tarfile.LNKTYPE, ["link or a device"]),
        ("elsewhere", tarfile.SYMTYPE, ["link or a device"]),
        (f"{BINARY}/device", tarfile.CHRTYPE, ["link or a device"]),
        (f"{BINARY}/device", tarfile.BLKTYPE, ["link or a device"]),
        (f"{BINARY}/pipe", tarfile.FIFOTYPE, ["link or a device"]),
        (f"{BINARY}/data_batch_1.bin", b"x", ["data_batch_1.bin' is there twice"]),
        (f"./{BINARY}/data_batch_1.bin", b"x", ["data_batch_1.bin' is there twice"]),
        ("../" + "x" * 5000 + "\n\x1b[31m", b"x", ["outside the archive"]),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_members_that_the_published_archive_has_not(tmp_path, name, content, words, first):
    pairs = [*whole_members().items()]
    pairs.insert(0 if first else len(pairs), (name, content))
    archive(tmp_path / BINARY_ARCHIVE, pairs)
    sentence = refused(lambda: read(tmp_path), tmp_path / BINARY_ARCHIVE, *words)
    assert sentence.isprintable() and [p.name for p in tmp_path.iterdir()] == [BINARY_ARCHIVE]


def test_an_archive_of_very_many_members(tmp_path):
    archive(tmp_path / BINARY_ARCHIVE, {f"{i}": b"" for i in range(1001)})
    refused(lambda: read(tmp_path), BINARY_ARCHIVE, "over 1000 members")


def test_an_archive_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    archive(tmp_path / BINARY_ARCHIVE, whole_members())

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cifar10.gzip, "open", fail)
    refused(lambda: read(tmp_path), BINARY_ARCHIVE, "cannot be read (Permission denied)", "check its permissions")


def test_other_files_in_the_archive_do_not_count(tmp_path):
    members = whole_members()
    members |= {f"{BINARY}/deep/data_batch_1.bin": b"x", "data_batch_1.bin": b"x", f"{BINARY}/readme.html": b"hello"}
    archive(tmp_path / BINARY_ARCHIVE, members)
    assert len(read(tmp_path)[0]) == 5
    archive(tmp_path / BINARY_ARCHIVE, {name.replace(BINARY, "other"): data for name, data in members.items()})
    refused(lambda: read(tmp_path), BINARY_ARCHIVE, "lacks data_batch_1.bin")


@pytest.mark.parametrize("where", ["a member", "a member's name", "behind the end"])
def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch, where):
    monkeypatch.setattr(cifar10, "MOST_IN_ARCHIVE", 200_000)
    path = tmp_path / BINARY_ARCHIVE
    name, content = (f"{BINARY}/big", bytes(300_000)) if where == "a member" else ("x" * 300_000, b"")
    archive(path, whole_members() if where == "behind the end" else {**whole_members(), name: content})
    if where == "behind the end":
        path.write_bytes(path.read_bytes() + gzip.compress(bytes(300_000)))
    refused(lambda: read(tmp_path), path, "unpacks to over 200,000 bytes")


def test_a_truncated_or_damaged_archive_is_named(tmp_path):
    path = tmp_path / BINARY_ARCHIVE
    archive(path, whole_members())
    whole = path.read_bytes()
    tar = gzip.decompress(whole)
    for keep in (0, 1, 9, 12, 100, len(whole) // 2, len(whole) - 9, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:keep])
        refused(lambda: read(tmp_path), path)
    for place in (3, len(whole) // 2, len(whole) - 20, len(whole) - 6):  # the last: nothing but the checksum is wrong
        data = bytearray(whole)
        data[place] ^= 0xFF
        path.write_bytes(data)
        refused(lambda: read(tmp_path), path)
    for data in (tar, b"no archive at all" * 100, gzip.compress(b"no tar" * 200), gzip.compress(tar[:3000])):
        path.write_bytes(data)
        refused(lambda: read(tmp_path), path, "damaged")
    path.write_bytes(whole)
    assert len(read(tmp_path)[0]) == 5


def resized(tar, name, size):
    """The tar with another size (12 bytes) in a member's header, and the header's checksum to fit."""
    data, at = bytearray(tar), tar.index(name.encode())
    data[at + 124 : at + 136] = size
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return gzip.compress(data, 1)


@pytest.mark.parametrize("name", [f"{BINARY}/data_batch_2.bin", f"{BINARY}/x/data", "elsewhere/readme"])
@pytest.mark.parametrize("size", [-512, -1, -1024, -(2**40), 2**63, 2**80])
def test_a_member_of_an_impossible_size(tmp_path, name, size):
    path = tmp_path / BINARY_ARCHIVE
    archive(path, {f"{BINARY}/x/data": b"x", **whole_members(), "elsewhere/readme": b"x"})
    field = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    path.write_bytes(resized(gzip.decompress(path.read_bytes()), name, field))
    refused(lambda: read(tmp_path), path)


def test_damaged_headers_in_a_whole_archive_are_read_or_named(tmp_path):
    path = tmp_path / BINARY_ARCHIVE
    archive(path, {**whole_members(), f"{BINARY}/{'x' * 200}": b"x"})
    tar = gzip.decompress(path.read_bytes())
    headers = [at for at in range(0, len(tar), 512) if tar[at + 257 : at + 262] == b"ustar"]
    draw = random.Random(0)
    for _ in range(100):
        data = bytearray(tar)
        at = draw.choice(headers)
        for _ in range(draw.randint(1, 4)):
            data[at + draw.randrange(512)] = draw.choice([0, 48, 57, 128, 255])
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path.write_bytes(gzip.compress(data, 1))
        with contextlib.suppress(UserError):
            read(tmp_path)
