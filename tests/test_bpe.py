"""CLIP's tokenizer: what its parts do, the files it reads, and the ids that transformers gives to the same strings."""

import functools
import gzip
import json
import random
import sys
import unicodedata
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import import_or_skip

from minidiff.errors import UserError
from minidiff.text import CLIPTokenizer
from minidiff.text.bpe import END, START, byte_symbols, fold, merge_pairs, word_pattern

# ---- a small vocabulary, learned here

CORPUS = """a photo of the red cat; the other cat's photograph, of 2 dogs! it's theirs, they're here... isn't that
a painting of a small house in the mountains; Das Mädchen über dem Fluß; la forêt près de l'école; ΣΟΦΟΣ σοφός
Привет, мир! красный кот и синий кот; שלום עולם; مرحبا بالعالم; 赤い猫の写真、 红色的猫; 한국어 고양이; नमस्ते दुनिया
👨‍👩‍👧 🐈🐈 ❤️ ½ Ⅷ"""


def spelled(word):
    *symbols, last = (byte_symbols()[byte] for byte in word.encode())
    return [*symbols, last + "</w>"]


@functools.cache
def learned(number=200):
    """The merges of the corpus: the most frequent pair of neighbours, again and again."""
    words, merges = [spelled(word) for word in word_pattern().findall(fold(CORPUS))], []
    while len(merges) < number:
        best = max(sorted(Counter(pair for word in words for pair in pairwise(word)).items()), key=lambda item: item[1])
        merges.append(best[0])
        words = [merge_pairs(word, {best[0]: 0}) for word in words]
    return tuple(merges)


def vocabulary(merges):
    """CLIP's numbering: the bytes, the bytes at a word's end, what the merges make, start and end."""
    latin = sorted(byte_symbols())
    tokens = [*latin, *(symbol + "</w>" for symbol in latin), *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}


def tokenizer(**special):
    return CLIPTokenizer(vocabulary(learned()), learned(), **special)


def write_folder(folder, merges, config=None, special=None):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges)), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def added_token(content):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


CONFIG = {
    "bos_token": {"__type": "AddedToken", **added_token(START)},
    "eos_token": {"__type": "AddedToken", **added_token(END)},
    "unk_token": {"__type": "AddedToken", **added_token(END)},
    "pad_token": END, "do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer",
}  # fmt: skip
FOLDERS = {
    "no config": (None, None),
    "Stable Diffusion 1": (CONFIG, {"bos_token": added_token(START), "pad_token": END}),
    "Stable Diffusion 2": (CONFIG, {"bos_token": added_token(START), "pad_token": "!"}),
}


# ---- its parts


def test_every_byte_has_a_symbol_that_can_be_printed():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256 and all(symbol.isprintable() and not symbol.isspace() for symbol in symbols)
    assert [symbols[ord(c)] for c in "az09!~é"] == list("az09!~é") and symbols[0] == "Ā" and symbols[0x20] == "Ġ"


def test_merges_are_applied_in_the_order_of_their_ranks():
    ranks = {pair: rank for rank, pair in enumerate([("b", "c"), ("a", "b"), ("a", "bc"), ("a", "a"), ("aa", "abc")])}
    assert merge_pairs(list("abc"), ranks) == ["abc"]
    assert merge_pairs(list("abab"), ranks) == ["ab", "ab"]
    assert merge_pairs(list("aaaaa"), ranks) == ["aa", "aa", "a"]
    assert merge_pairs(list("aaabcab"), ranks) == ["aaabc", "ab"]
    assert merge_pairs(list("x"), ranks) == ["x"] and merge_pairs(list("xyz"), {}) == ["x", "y", "z"]


def test_words_are_those_of_clips_pattern_for_every_character_there_is():
    kinds = {kind: [] for kind in "LNs."}
    for c in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(c)[0]
        space = category == "Z" or c in "\t\n\v\f\r\x85"
        kinds["s" if space else category if category in "LN" else "."].append(c)
    L, N, S, others = ("".join(characters) for characters in kinds.values())
    findall = word_pattern().findall
    assert findall(L) == [L] and findall(N) == list(N) and findall(S) == [] and findall(others) == [others]
    assert len(L) > 100_000 and len(N) > 1000 and len(S) > 20


@pytest.mark.parametrize(
    "text, words",
    [
        ("", []),
        (" \t\n\u3000\x85\u00a0", []),
        ("A  Photo,\tof\nTWO cats!?", ["a", "photo", ",", "of", "two", "cats", "!?"]),
        ("it's I'LL they'Re won't o'clock ''s", ["it", "'s", "i", "'ll", "they", "'re", "won", "'t", "o", "'"]
         + ["clock", "''", "s"]),
        ("year 2024 x2½Ⅷ", ["year", "2", "0", "2", "4", "x", "2", "½", "ⅷ"]),
        ("e\u0301 É \u212b", ["é", "é", "å"]),
        ("q\u0301x", ["q", "\u0301", "x"]),
        ("ΣΑΣ İ ẞ ﬁ", ["σασ", "i", "\u0307", "ß", "ﬁ"]),
        ("日本語の猫 x一y", ["日本語の猫", "x一y"]),
        ("👨\u200d👩\u200d👧🐈 a\x1cb\x00c", ["👨\u200d👩\u200d👧🐈", "a", "\x1c", "b", "\x00", "c"]),
        ("_a_--b", ["_", "a", "_--", "b"]),
        ("a<|startoftext|>b!<|ENDOFTEXT|>!<|other|>", ["a", START, "b", "!", END, "!<|", "other", "|>"]),
    ],
)  # fmt: skip
def test_a_text_is_split_into_words(text, words):
    assert tokenizer().split(text) == words


def test_no_byte_is_lost():
    clip = tokenizer()
    tokens = {i: token for token, i in clip.ids.items()}
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    for text in (*CORPUS.split("\n"), *strings(300)):
        for word in clip.split(text):
            if word not in (START, END):
                symbols = "".join(tokens[i] for i in clip.word_ids(word))
                assert symbols.endswith("</w>")
                assert bytes(byte_of[s] for s in symbols.removesuffix("</w>")).decode() == word


def test_ids_begin_and_end_and_are_padded():
    clip = tokenizer()
    start, end, a, cat = (clip.ids[token] for token in (START, END, "a</w>", "cat</w>"))
    ids, mask = clip(["a cat", "", "a<|endoftext|>"], 6)
    assert ids.dtype == np.int64 and mask.dtype == bool
    assert ids.tolist() == [[start, a, cat, end, end, end], [start, end] + [end] * 4, [start, a, end, end, end, end]]
    assert mask.sum(axis=1).tolist() == [4, 2, 4] and mask[:, 0].all()
    ids, mask = tokenizer(pad="!")(["a cat!", "cat"], 6)
    assert ids.tolist() == [[start, a, cat, 0, end, 0], [start, cat, end, 0, 0, 0]]
    assert mask.sum(axis=1).tolist() == [5, 3]


def test_words_that_do_not_fit_are_cut_and_named():
    clip = tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = clip(["a cat of a"], 6)[0]
    with pytest.warns(UserWarning, match=r"longer than the 6 tokens read; cut off: red cats$"):
        cut, mask = clip(["a cat of a red cats"], 6)
    assert cut.tolist() == whole.tolist() and mask.all()
    with pytest.warns(
        UserWarning, match=r"longer than the 3 tokens read; cut off: xqzw b$"
    ):  # a word that begins inside
        ids = clip(["xqzw b"], 3)[0]
    assert ids[0, 0] == clip.start and ids[0, 2] == clip.end and ids[0, 1] == clip.word_ids("xqzw")[0]
    with pytest.warns(UserWarning) as told:
        assert clip(["a " * 100_000], 77)[1].all()
    assert len(told) == 1 and len(str(told[0].message)) < 400


def test_bytes_that_the_vocabulary_lacks_become_the_unknown_token():
    ids = {"c": 0, "a": 1, "t</w>": 2, "at</w>": 3, START: 4, END: 5}
    clip = CLIPTokenizer(ids, [("a", "t</w>")])
    assert clip(["cat", "xat"], 5)[0].tolist() == [[4, 0, 3, 5, 5], [4, 5, 3, 5, 5]] and len(clip) == 6


def test_what_cannot_be_tokenized_is_refused():
    with pytest.raises(UserError, match="half a character"):
        tokenizer()(["caf\udce9"], 5)
    with pytest.raises(ValueError, match="a context of at least 2, for their start and end, got 1"):
        tokenizer()(["a"], 1)


# ---- its files


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_names_the_special_tokens(tmp_path, name):
    clip = CLIPTokenizer.from_folder(write_folder(tmp_path, learned(), *FOLDERS[name]))
    last = len(clip) - 1
    assert (clip.start, clip.end, clip.pad) == (last - 1, last, 0 if name == "Stable Diffusion 2" else last)
    assert (
        clip(["The red cat's photo!"], 20)[0][0, 1:5].tolist() == tokenizer()(["the red cat's"], 20)[0][0, 1:5].tolist()
    )


def rewrite(name, change):
    def apply(folder):
        path = folder / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return apply


def changed(name, **values):
    return rewrite(name, lambda text: json.dumps({**json.loads(text), **values}))


BROKEN = [
    (lambda f: (f / "vocab.json").unlink(), "cannot read .*vocab.json: No such file"),
    (lambda f: (f / "merges.txt").unlink(), "cannot read .*merges.txt: No such file"),
    (rewrite("vocab.json", lambda text: text[:1000]), "vocab.json is not valid JSON"),
    (rewrite("vocab.json", lambda text: "[" * 100_000), "vocab.json is not valid JSON"),
    (rewrite("vocab.json", lambda text: "[1, 2]"), "vocab.json must hold a JSON object, not list"),
    (rewrite("vocab.json", lambda text: "{}"), "not a table of tokens and their numbers"),
    (changed("vocab.json", cat="7"), "not a table of tokens and their numbers"),
    (changed("vocab.json", cat=True), "not a table of tokens and their numbers"),
    (changed("vocab.json", cat=-1), "not a table of tokens and their numbers"),
    (changed("vocab.json", new=7), "gives two tokens the same number"),
    (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"), "merges.txt is not UTF-8"),
    (rewrite("merges.txt", lambda text: text + "a b c\n"), "merges.txt: merge 201 must be two tokens, got 'a b c'"),
    (rewrite("merges.txt", lambda text: text.replace("\n", "\n\n", 1)), "merges.txt: merge 1 must be two tokens"),
    (rewrite("merges.txt", lambda text: ""), "merges.txt: merge 1 must be two tokens, got ''"),
    (rewrite("merges.txt", lambda text: text + "zz q\n"), "the vocabulary lacks 'zz', 'zzq', of the merges"),
    (changed("tokenizer_config.json", pad_token="<pad>"), "the vocabulary lacks '<pad>', of the"),
    (changed("tokenizer_config.json", pad_token=5), "must name tokens by a text, not 5$"),
    (changed("tokenizer_config.json", bos_token={}), "must name tokens by a text, not {}$"),
    (rewrite("tokenizer_config.json", lambda text: "null"), "must hold a JSON object, not NoneType"),
    (
        changed("tokenizer_config.json", added_tokens_decoder={"0": {"content": "<cat>"}, "1": {"content": END}}),
        "adds tokens to CLIP's, which this tokenizer does not know: '<cat>'$",
    ),
]


@pytest.mark.parametrize("damage, told", BROKEN)
def test_broken_files_are_refused_in_one_sentence(tmp_path, damage, told):
    folder = write_folder(tmp_path / "tokenizer", learned(), CONFIG)
    damage(folder)
    with pytest.raises(UserError, match=told) as error:
        CLIPTokenizer.from_folder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_tokenizer_json_alone_is_enough(tmp_path):
    merges = [list(pair) for pair in learned()]
    for form in (merges, [" ".join(pair) for pair in merges]):
        model = {"type": "BPE", "vocab": vocabulary(learned()), "merges": form}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        assert (
            CLIPTokenizer.from_folder(tmp_path)(["red cat"], 9)[0].tolist() == tokenizer()(["red cat"], 9)[0].tolist()
        )
    for model in (None, {}, {"vocab": {}}, {"vocab": {"a": 0}, "merges": None}, {"vocab": {"a": 0}, "merges": [["a"]]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        with pytest.raises(UserError, match=r"not a table of tokens|merge 1 must be two tokens"):
            CLIPTokenizer.from_folder(tmp_path)


# ---- the same ids as transformers

# Ranges of characters. Its tables are of Unicode 9 where it composes marks, and newer than Python's elsewhere: nothing
# here that changed since.
RANGES = [
    *[(0x20, 0x7F)] * 4, (0x00, 0x20), (0x7F, 0xA1), (0xA0, 0x250), (0x300, 0x350), (0x370, 0x400), (0x400, 0x530),
    (0x5B0, 0x5F0), (0x621, 0x660), (0x904, 0x970), (0xE01, 0xE3A), (0x1100, 0x1200), (0x1E00, 0x2000),
    (0x2000, 0x2070), (0x2070, 0x2200), (0x2600, 0x27C0), (0x3000, 0x3100), (0x3200, 0x3400), (0x4E00, 0x9FA0),
    (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xF900, 0xFA00), (0xFB00, 0xFB50), (0xFE00, 0xFE10), (0xFF01, 0xFFFE),
    (0x1D400, 0x1D800), (0x1F1E6, 0x1F200), (0x1F300, 0x1F650), (0x20000, 0x20100), (0xE0020, 0xE0080),
]  # fmt: skip
BITS = [
    "'s", "'T", " 'RE", "'ve", "'M", "'ll", "'D", "’s", START, END, "<|", "|>", "!", "!!!", " ", "\t\n", "\u3000",
    "\u200d", "\ufe0f", "👨\u200d👩\u200d👧", "e\u0301", "\u212b", "ΣΑΣ", "İ", "ß", "ﬁ", "12", "½", "Ⅷ", "_", "--",
    "\x1c", "\x85", "\u2028", "&amp;", "一二三", "a photo of", "Photography", "THE cat", "mountains", "www.",
    "\ufffd", "\x00",
]  # fmt: skip


@functools.cache
def strings(number):
    """Strings of all kinds of characters, empty and long ones among them."""
    rng = random.Random(1)
    made = [
        "",
        " ",
        "a" * 3000,
        "ab" * 2000,
        "x " * 500,
        "!" * 3000,
        "🐈" * 500,
        "".join(rng.choices("etaoin", k=2000)),
    ]
    while len(made) < number:
        text = ""
        for _ in range(rng.choice([1, 2, 3, 5, 8, 20])):
            text += (
                rng.choice(BITS)
                if rng.random() < 0.4
                else "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.choice([1, 2, 5])))
            )
            text += " " * (rng.random() < 0.3)
        made.append("".join(c for c in text if unicodedata.category(c) != "Cn"))
    return made


def words_of(clip, number):
    """Strings of the vocabulary's own tokens, some of them glued together."""
    rng, byte_of = random.Random(2), {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    spellings = [token.removesuffix("</w>") for token in clip.ids if token not in (START, END)]
    words = [bytes(map(byte_of.get, spelling)).decode(errors="ignore") for spelling in spellings]
    return ["".join(word + " " * rng.randrange(2) for word in rng.choices(words, k=20)) for _ in range(number)]


def all_ids(clip, text):
    return [clip.start, *(i for word in clip.split(text) for i in clip.word_ids(word)), clip.end]


def assert_same_ids(folder, number):
    transformers = import_or_skip("transformers")
    kind = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
    theirs, ours = kind.from_pretrained(str(folder)), CLIPTokenizer.from_folder(folder)
    assert len(theirs) == len(ours) and (theirs.bos_token_id, theirs.eos_token_id) == (ours.start, ours.end)
    texts, seen = strings(number - number // 4) + words_of(ours, number // 4), set()
    for text, wanted in zip(texts, theirs(texts, verbose=False)["input_ids"], strict=True):
        assert all_ids(ours, text) == wanted, repr(text)
        seen.update(wanted)
    assert len(seen) > min(len(ours) // 4, 2 * number)  # the comparison reaches the vocabulary

    texts = texts[:200] + texts[-200:]
    wanted = theirs(texts, padding="max_length", truncation=True, max_length=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids, mask = ours(texts, 20)
    assert np.array_equal(ids, wanted["input_ids"]) and np.array_equal(mask, wanted["attention_mask"])
    assert mask.all(axis=1).any() and not mask.all(axis=1).all()


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_transformers(tmp_path, name):
    assert_same_ids(write_folder(tmp_path, learned(), *FOLDERS[name]), 1000)


@pytest.mark.parametrize("name", ["Stable Diffusion 1", "Stable Diffusion 2"])
def test_a_folder_that_transformers_saved_gives_the_same_ids(tmp_path, name):
    transformers = import_or_skip("transformers")
    folder = write_folder(tmp_path / "first", learned(), *FOLDERS[name])
    transformers.CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(str(tmp_path / "saved"))
    assert_same_ids(tmp_path / "saved", 300)


# ---- CLIP's own vocabulary, where it lies beside the project

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "clip" / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def real_merges():
    if not REAL.exists():
        pytest.skip(f"compares with CLIP's own vocabulary, which is not here ({REAL})")
    lines = gzip.decompress(REAL.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    return tuple(tuple(line.split()) for line in lines)


def test_clips_own_vocabulary(tmp_path, real_merges):
    clip = CLIPTokenizer.from_folder(write_folder(tmp_path, real_merges))
    assert len(clip) == 49408 and (clip.start, clip.end) == (49406, 49407)
    assert all_ids(clip, "A photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("name, number", [("Stable Diffusion 1", 10_000), ("Stable Diffusion 2", 1000)])
def test_ids_of_clips_own_vocabulary_are_those_of_transformers(tmp_path, real_merges, name, number):
    assert_same_ids(write_folder(tmp_path, real_merges, *FOLDERS[name]), number)
