"""Downloads from a local server that stalls, truncates, corrupts and lies."""

import hashlib
import http.server
import re
import socket
import threading

import numpy as np
import pytest

from minidiff import download as module
from minidiff.download import FILES, File, checksum, download
from minidiff.errors import UserError

DATA = np.random.default_rng(0).bytes(10_000)
OTHER = np.random.default_rng(1).bytes(10_000)
HALF = len(DATA) // 2
MD5 = hashlib.md5(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Takes the next of the server's answers, or gives the file properly when there is none left."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        answers = self.server.answers
        (answers.pop(0) if answers else serve)(self)

    def start(self):
        """The first byte asked for."""
        given = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(given[1]) if given else 0

    def answer(self, status, body=b"", **headers):
        """Send the status, the headers (Content_Length=5 and the like) and the body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *args):
        pass


def serve(handler, data=DATA, keep=None):
    """The file as a good server gives it; `keep`: the connection ends when so many bytes have gone."""
    start, n = handler.start(), len(data)
    if start >= n:
        return handler.answer(416, Content_Range=f"bytes */{n}")
    status, extra = (206, {"Content_Range": f"bytes {start}-{n - 1}/{n}"}) if start else (200, {})
    handler.answer(status, data[start:][:keep], Content_Length=n - start, **extra)


def ignore_range(handler, data=DATA, keep=None):
    handler.answer(200, data[:keep], Content_Length=len(data))


def without_length(handler, data=DATA):
    """Whatever is asked for: these bytes, until the connection closes."""
    handler.answer(200, data)


def cut(n):
    """Only the first n bytes of the answer, under the full Content-Length."""
    return lambda handler: serve(handler, keep=n)


def status(code, **headers):
    return lambda handler: handler.answer(code, b"no", Content_Length=2, **headers)


@pytest.fixture(scope="module")
def shared_server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = False  # so that closing waits for every answer's end
        server.released = threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def server(shared_server, monkeypatch):
    """The server with a clean record; ("tiny", "binary") is what it serves, and no attempt waits for another."""
    shared_server.requests, shared_server.answers = [], []
    shared_server.url = f"http://127.0.0.1:{shared_server.server_port}"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "PAUSES", (0, 0, 0))
    monkeypatch.setitem(FILES, ("tiny", "binary"), File(f"{shared_server.url}/tiny.tar.gz", len(DATA), MD5))
    return shared_server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


def holds(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def ranges(server):
    return [given and given.removeprefix("bytes=") for _, given in server.requests]


def fetches(server, folder, asked, mirror=None):
    """The download comes out right, in requests for these ranges, and leaves nothing else."""
    assert download("tiny", folder, mirror=mirror) == folder / "tiny.tar.gz"
    assert holds(folder) == {"tiny.tar.gz": DATA}
    assert ranges(server) == asked


def fails(server, folder, words, asked, left=None):
    """The download ends in one sentence that holds the words, after these requests, and leaves these files."""
    with pytest.raises(UserError) as e:
        download("tiny", folder)
    sentence = str(e.value)
    assert "\n" not in sentence
    for word in [f"cannot fetch {server.url}/tiny.tar.gz: ", "--mirror", "put it in", str(folder), MD5, *words]:
        assert word in sentence
    assert ranges(server) == asked
    assert holds(folder) == (left or {})


PART = "tiny.tar.gz.part"


def left_before(folder, data):
    folder.mkdir()
    (folder / "tiny.tar.gz.part").write_bytes(data)


def test_the_published_files():
    assert {key: (file.name, file.bytes, file.md5) for key, file in FILES.items()} == {
        ("cifar10", "python"): ("cifar-10-python.tar.gz", 170498071, "c58f30108f718f92721af3b95e74349a"),
        ("cifar10", "binary"): ("cifar-10-binary.tar.gz", 170052171, "c32a1d4ab5d03f1284b67883e8d87530"),
    }
    assert all(file.url == f"https://www.cs.toronto.edu/~kriz/{file.name}" for file in FILES.values())


def test_checksum(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert checksum(tmp_path / "abc") == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321, A.5
    (tmp_path / "long").write_bytes(DATA * 20)
    assert checksum(tmp_path / "long") == hashlib.md5(DATA * 20).hexdigest()


def test_a_good_server(server, folder, capsys):
    fetches(server, folder / "made" / "too", [None])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"fetching {server.url}/tiny.tar.gz" in err and "slow" in err and "Ctrl-C" in err


def test_what_is_there_already_is_verified_and_not_fetched(server, folder):
    fetches(server, folder, [None])
    fetches(server, folder, [None])


@pytest.mark.parametrize(
    "there, words", [(OTHER, "it has the MD5 sum"), (DATA[:-1], "it has 9999 bytes"), (b"", "it has 0 bytes")]
)
def test_a_wrong_file_in_the_way_is_left_alone(server, folder, there, words):
    folder.mkdir()
    (folder / "tiny.tar.gz").write_bytes(there)
    with pytest.raises(UserError, match=rf"tiny\.tar\.gz is not the published file: {words}.*remove it"):
        download("tiny", folder)
    assert holds(folder) == {"tiny.tar.gz": there} and server.requests == []


def test_a_broken_connection_goes_on_where_it_ended(server, folder, capsys):
    server.answers = [cut(HALF), cut(100)]
    fetches(server, folder, [None, f"{HALF}-", f"{HALF + 100}-"])
    assert capsys.readouterr().err.count("the connection ended early; trying again in 0 s") == 2


def test_what_an_earlier_call_left_is_gone_on_with(server, folder):
    left_before(folder, DATA[:7])
    fetches(server, folder, ["7-"])


def test_a_whole_part_needs_no_request(server, folder):
    left_before(folder, DATA)
    fetches(server, folder, [])


def test_a_server_without_ranges_sends_what_is_there_once_more(server, folder):
    left_before(folder, DATA[:HALF])
    server.answers = [ignore_range]
    fetches(server, folder, [f"{HALF}-"])


def test_a_server_without_ranges_that_breaks_early_shortens_nothing(server, folder):
    left_before(folder, DATA[:HALF])
    server.answers = [lambda handler: ignore_range(handler, keep=100)]
    fetches(server, folder, [f"{HALF}-"] * 2)


def test_something_else_without_a_length_spares_what_is_there(server, folder):
    left_before(folder, DATA[:HALF])
    server.answers = [lambda handler: without_length(handler, b"log in")] * 9
    words = ["the connection ended early", f"so far {HALF} of {len(DATA)} bytes"]
    fails(server, folder, words, [f"{HALF}-"] * 4, {PART: DATA[:HALF]})


def test_a_server_without_ranges_that_breaks_is_given_up(server, folder):
    """It sends bytes every time, but the file never gets longer."""
    server.answers = [lambda handler: ignore_range(handler, keep=HALF)] * 9
    words = ["the connection ended early", f"so far {HALF} of {len(DATA)} bytes"]
    fails(server, folder, words, [None, *[f"{HALF}-"] * 3], {"tiny.tar.gz.part": DATA[:HALF]})


def test_a_stall_is_a_broken_connection(server, folder, monkeypatch, capsys):
    def stall(handler):
        serve(handler, keep=HALF)
        server.released.wait()

    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    monkeypatch.setattr(module.time, "sleep", lambda pause: monkeypatch.setattr(module, "TIMEOUT", 30))
    server.answers = [stall]
    fetches(server, folder, [None, f"{HALF}-"])
    assert "timed out; trying again" in capsys.readouterr().err


def test_a_server_that_accepts_and_never_answers(server, folder, monkeypatch, capsys):
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    server.answers = [lambda handler: server.released.wait()] * 4
    with pytest.raises(UserError, match=rf"timed out \(so far 0 of {len(DATA)} bytes\)"):
        download("tiny", folder)
    assert holds(folder) == {} and capsys.readouterr().err.count("timed out; trying again") == 3


def test_the_end_without_a_length_is_found_by_the_size(server, folder):
    server.answers = [lambda handler: without_length(handler, DATA[:HALF])]
    fetches(server, folder, [None, f"{HALF}-"])


def test_a_chunked_answer_that_ends_inside_a_chunk(server, folder):
    server.answers = [lambda handler: handler.answer(200, b"1388\r\n" + DATA[:100], Transfer_Encoding="chunked")]
    fetches(server, folder, [None, "100-"])


def test_a_short_answer_of_a_range_is_asked_for_the_rest(server, folder):
    left_before(folder, DATA[:7])
    n = len(DATA)
    server.answers = [lambda h: h.answer(206, DATA[7:9], Content_Length=2, Content_Range=f"bytes 7-8/{n}")]
    fetches(server, folder, ["7-", "9-"])


def test_attempts_count_only_while_no_byte_comes(server, folder):
    server.answers = [cut(0), cut(0), cut(0), cut(1), cut(0), cut(0), cut(1), cut(1), cut(1), cut(0), cut(0)]
    fetches(server, folder, [*[None] * 4, *["1-"] * 3, "2-", "3-", *["4-"] * 3])


def test_attempts_come_to_an_end_and_what_came_stays(server, folder):
    server.answers = [cut(HALF), *[cut(0)] * 9]
    words = ["the connection ended early", f"so far {HALF} of {len(DATA)} bytes"]
    fails(server, folder, words, [None, *[f"{HALF}-"] * 3], {"tiny.tar.gz.part": DATA[:HALF]})
    server.answers = []
    fetches(server, folder, [None, *[f"{HALF}-"] * 4])


def test_pauses_grow_and_begin_anew_when_bytes_came(server, folder, monkeypatch):
    pauses = []
    monkeypatch.setattr(module, "PAUSES", (1, 2, 3))
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    server.answers = [cut(0), cut(0), cut(1), cut(0), cut(0)]
    fetches(server, folder, [None, None, None, "1-", "1-", "1-"])
    assert pauses == [1, 2, 1, 2, 3]


def test_other_bytes_of_the_right_size(server, folder):
    server.answers = [lambda handler: serve(handler, OTHER)]
    fails(server, folder, ["what came has the MD5 sum"], [None])


def test_wrong_pieces_begin_again_once(server, folder):
    """What an earlier call left was of another file, or the disk has spoilt it."""
    left_before(folder, OTHER[:HALF])
    fetches(server, folder, [f"{HALF}-", None])


@pytest.mark.parametrize("before", [OTHER, DATA + b"x"])
def test_a_wrong_part_that_is_not_short_begins_again(server, folder, before):
    left_before(folder, before)
    fetches(server, folder, [None])


def test_wrong_pieces_begin_again_only_once(server, folder):
    left_before(folder, OTHER[:HALF])
    server.answers = [serve, cut(HALF), lambda handler: serve(handler, OTHER)]
    fails(server, folder, ["what came has the MD5 sum"], [f"{HALF}-", None, f"{HALF}-"])


@pytest.mark.parametrize("before, then", [(DATA, OTHER), (OTHER, DATA)])
def test_wrong_pieces_from_a_server_without_ranges_begin_again_once(server, folder, before, then):
    left_before(folder, before[:HALF])
    server.answers = [lambda handler: ignore_range(handler, then)]
    fetches(server, folder, [f"{HALF}-", None])


def test_too_much_is_refused_by_its_length_and_spares_what_is_there(server, folder):
    left_before(folder, DATA[:HALF])
    server.answers = [lambda handler: ignore_range(handler, DATA + b"x")]
    words = ["the server's file has 10001 bytes, where 10000 are published"]
    fails(server, folder, words, [f"{HALF}-"], {"tiny.tar.gz.part": DATA[:HALF]})


def test_an_endless_answer_is_stopped(server, folder):
    def endless(handler):
        handler.answer(200, DATA)
        try:
            while True:
                handler.wfile.write(DATA)
        except OSError:
            stopped.set()

    stopped = threading.Event()
    server.answers = [endless]
    fails(server, folder, ["what came has", f"bytes, where {len(DATA)} are published"], [None])
    assert stopped.wait(5)


def test_too_much_after_a_right_range(server, folder):
    """The whole file comes under the name of its second half."""
    left_before(folder, DATA[:HALF])
    n = len(DATA)
    server.answers = [lambda h: h.answer(206, DATA, Content_Range=f"bytes {HALF}-{n - 1}/{n}")]
    fetches(server, folder, [f"{HALF}-", None])


@pytest.mark.parametrize(
    "span",
    ["bytes 0-9999/10000", f"bytes {HALF + 1}-9999/10000", "bytes */10000", f"bytes {'9' * 5000}-9999/*", "x", ""],
)
def test_a_content_range_that_is_not_what_was_asked_for(server, folder, span):
    left_before(folder, DATA[:HALF])
    server.answers = [lambda handler: handler.answer(206, DATA[HALF:], Content_Range=span)]
    fetches(server, folder, [f"{HALF}-", None])


def test_a_content_range_of_another_file(server, folder):
    left_before(folder, DATA[:HALF])
    server.answers = [lambda handler: serve(handler, DATA + b"x")]
    words = ["the server's file has 10001 bytes, where 10000 are published"]
    fails(server, folder, words, [f"{HALF}-"], {"tiny.tar.gz.part": DATA[:HALF]})


def test_a_content_range_that_does_not_know_the_size(server, folder):
    left_before(folder, DATA[:HALF])
    server.answers = [lambda handler: handler.answer(206, DATA[HALF:], Content_Range=f"bytes {HALF}-9999/*")]
    fetches(server, folder, [f"{HALF}-"])


def test_a_range_that_the_server_refuses(server, folder):
    left_before(folder, DATA[:HALF])
    server.answers = [status(416)]
    fetches(server, folder, [f"{HALF}-", None])


def test_a_server_whose_file_is_shorter_and_says_nothing(server, folder):
    def short(handler):
        handler.answer(416) if handler.start() else without_length(handler, DATA[:HALF])

    server.answers = [short] * 9
    words = ["the connection ended early", f"so far {HALF} of {len(DATA)} bytes"]
    fails(server, folder, words, [None, f"{HALF}-", None, None], {"tiny.tar.gz.part": DATA[:HALF]})


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/xhtml+xml", "Text/HTML; charset=x"])
def test_a_message_spares_what_is_there(server, folder, kind):
    left_before(folder, DATA[:HALF])
    server.answers = [lambda handler: handler.answer(200, b"rate limited", Content_Type=kind)] * 9
    fails(server, folder, ["a web page or a message comes in the file's place"], [f"{HALF}-"], {PART: DATA[:HALF]})


def test_two_at_once_do_not_write_one_file(server, folder):
    left_before(folder, DATA[:HALF])
    with module._alone(folder / PART), pytest.raises(UserError, match=r"another download is writing .*; wait for it"):
        download("tiny", folder)
    assert holds(folder) == {PART: DATA[:HALF]} and not server.requests
    fetches(server, folder, [f"{HALF}-"])


def test_a_part_that_is_a_link_is_not_written(server, folder, tmp_path):
    folder.mkdir()
    (tmp_path / "other").write_bytes(b"precious")
    (folder / PART).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="is a link; remove it"):
        download("tiny", folder)
    assert (tmp_path / "other").read_bytes() == b"precious"


def test_the_command(server, folder, capsys, monkeypatch):
    from minidiff.cli import main

    monkeypatch.setitem(FILES, ("cifar10", "binary"), FILES["tiny", "binary"])
    out = folder / "with space"
    assert main(["download", "cifar10", "--out", str(out), "--mirror", server.url]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}/tiny.tar.gz; to train on it: minidiff train cifar10 --data '{out}'\n"
    (out / "tiny.tar.gz").write_bytes(b"")
    assert main(["download", "cifar10", "--out", str(out)]) == 1
    assert "is not the published file" in capsys.readouterr().err


def test_a_web_page_spares_what_is_there(server, folder):
    left_before(folder, DATA[:HALF])
    server.answers = [lambda handler: handler.answer(200, b"<html>log in", Content_Type="text/html; charset=utf-8")]
    words = ["a web page or a message comes in the file's place"]
    fails(server, folder, words, [f"{HALF}-"], {"tiny.tar.gz.part": DATA[:HALF]})


@pytest.mark.parametrize("code, words", [(404, "404, Not Found"), (403, "403, Forbidden"), (204, "204 without")])
def test_statuses_that_stay_are_not_tried_again(server, folder, code, words):
    server.answers = [status(code)]
    fails(server, folder, [f"the server answers {words}"], [None])


def test_a_status_without_a_phrase(server, folder):
    server.answers = [lambda handler: handler.wfile.write(b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n")]
    fails(server, folder, ["the server answers 404, Not Found"], [None])


def test_a_file_system_without_locks(server, folder, monkeypatch):
    def flock(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    fetches(server, folder, [None])


@pytest.mark.parametrize("code", [500, 503, 429])
def test_statuses_that_pass(server, folder, code):
    server.answers = [status(code)] * 2
    fetches(server, folder, [None] * 3)


def test_a_server_that_stays_ill(server, folder):
    server.answers = [status(500)] * 9
    fails(server, folder, ["the server answers 500, Internal Server Error"], [None] * 4)


def test_an_answer_that_is_not_http(server, folder):
    server.answers = [lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n")]
    fetches(server, folder, [None, None])


def test_redirects_keep_the_range(server, folder):
    left_before(folder, DATA[:HALF])
    server.answers = [status(302, Location="/elsewhere")]
    fetches(server, folder, [f"{HALF}-"] * 2)
    assert [path for path, _ in server.requests] == ["/tiny.tar.gz", "/elsewhere"]


def test_redirects_without_end(server, folder):
    server.answers = [status(302, Location="/tiny.tar.gz")] * 99
    with pytest.raises(UserError, match="the server answers 302") as e:
        download("tiny", folder)
    assert "\n" not in str(e.value) and holds(folder) == {}


def test_redirects_to_a_file_of_this_machine(server, folder, tmp_path):
    (tmp_path / "secret").write_bytes(DATA)
    server.answers = [status(302, Location=f"file://{tmp_path}/secret")]
    fails(server, folder, ["the server answers 302", "not allowed"], [None])


def test_nobody_listens(server, folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(UserError) as e:
            download("tiny", folder, mirror=mirror)
    for word in [f"cannot fetch {mirror}/tiny.tar.gz: ", "refused", "so far 0 of 10000", f"get {server.url}/tiny"]:
        assert word in str(e.value)
    assert holds(folder) == {} and server.requests == []


def test_ctrl_c_keeps_what_came(server, folder, monkeypatch):
    def interrupt(chunks):
        yield next(chunks)
        raise KeyboardInterrupt

    chunks = module._chunks
    server.answers = [cut(HALF)]
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(module, "_chunks", lambda response: interrupt(chunks(response)))
        download("tiny", folder)
    came = holds(folder)["tiny.tar.gz.part"]
    assert 0 < len(came) <= HALF and DATA.startswith(came)
    fetches(server, folder, [None, f"{len(came)}-"])


@pytest.mark.parametrize(
    "mirror, path",
    [
        ("", "/tiny.tar.gz"),
        ("/", "/tiny.tar.gz"),
        ("/sets/cifar", "/sets/cifar/tiny.tar.gz"),
        ("/sets/cifar/", "/sets/cifar/tiny.tar.gz"),
        ("/sets/tiny.tar.gz", "/sets/tiny.tar.gz"),
        ("/sets/tiny.tar.gz?download=1", "/sets/tiny.tar.gz?download=1"),
        ("/sets?key=1", "/sets/tiny.tar.gz?key=1"),
    ],
)
def test_mirrors(server, folder, monkeypatch, capsys, mirror, path):
    monkeypatch.setitem(FILES, ("tiny", "binary"), File("http://nowhere.invalid/tiny.tar.gz", len(DATA), MD5))
    fetches(server, folder, [None], mirror=server.url + mirror)
    assert server.requests == [(path, None)]
    err = capsys.readouterr().err
    assert f"fetching {server.url}{path}" in err and "slow" not in err


@pytest.mark.parametrize(
    "mirror",
    ["file:///etc", "ftp://host/", "host/folder", "/folder", "", "http:", "http://", "http://:80/", "http://[::1/x",
     "http://host:99999/", "http://host:port/"],
)  # fmt: skip
def test_mirrors_that_are_no_urls(server, folder, mirror):
    with pytest.raises(UserError, match="--mirror wants a URL that begins with http:// or https://, got"):
        download("tiny", folder, mirror=mirror)
    assert not folder.exists() and server.requests == []


@pytest.mark.parametrize("path", ["/a b", "/a\nHost: other", "/ä"])
def test_mirrors_with_characters_that_no_url_has(server, folder, path):
    with pytest.raises(UserError, match="this is not a URL"):
        download("tiny", folder, mirror=server.url + path)
    assert holds(folder) == {} and server.requests == []


def test_names_and_forms(server, folder):
    with pytest.raises(UserError, match="there is no download 'cifar100'; choose from: cifar10, tiny"):
        download("cifar100", folder)
    with pytest.raises(UserError, match="cifar10 has no form 'matlab'; choose from: python, binary"):
        download("cifar10", folder, "matlab")
    assert not folder.exists()


def test_a_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.*choose another folder with --out"):
            download("tiny", folder)
    assert holds(tmp_path) == {"file": b"mine"} and server.requests == []


@pytest.mark.parametrize("name", ["tiny.tar.gz", "tiny.tar.gz.part"])
def test_a_folder_in_the_files_way(server, folder, name):
    (folder / name / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        download("tiny", folder)
    assert [str(p.relative_to(folder)) for p in folder.rglob("*")] == [name, f"{name}/mine"]


def test_a_full_disk_is_no_broken_connection(server, folder, monkeypatch):
    def full(response):
        yield from chunks(response)
        raise OSError(28, "No space left on device")

    chunks = module._chunks
    monkeypatch.setattr(module, "_chunks", full)
    with pytest.raises(UserError, match=r"tiny\.tar\.gz: No space left on device; make room"):
        download("tiny", folder)
    assert ranges(server) == [None]
