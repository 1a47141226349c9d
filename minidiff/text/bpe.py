"""CLIP's tokenizer: byte-pair encoding.

Written as UTF-8, a text in any script needs only 256 symbols, one for each byte; but then it is long. So two neighbours
that often met in the training text were joined into a new symbol, and again, 48,894 times. The list of these merges, in
the order in which they were learned, is all there is to know: a word is spelt in bytes, the last of them marked by
`</w>`, and the earliest merge that fits is applied everywhere, until none fits.

    photo = p h o t o</w> -> p h o to</w> -> p ho to</w> -> pho to</w> -> photo</w> = 1125

Sennrich et al. 2016, arXiv 1508.07909; on bytes: Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"; in CLIP: Radford et al. 2021, arXiv 2103.00020.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from minidiff.errors import UserError, UserNotice
from minidiff.files import listed, read_json, read_text

START, END = "<|startoftext|>", "<|endoftext|>"


@functools.cache
def byte_symbols() -> tuple[str, ...]:
    """A printable character for each of the 256 bytes: Latin-1's own where it has one, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256))


def fold(text: str) -> str:
    """The text composed (NFC) and in lower case, each character by itself: Σ becomes σ at a word's end too."""
    return unicodedata.normalize("NFC", text).replace("Σ", "σ").lower()


@functools.cache
def word_pattern() -> re.Pattern[str]:
    r"""What counts as a word: 's 't 're 've 'm 'll 'd | \p{L}+ | \p{N} | [^\s\p{L}\p{N}]+.

    Letters and everything else keep together, digits stand alone. `re` has no \p, so the ranges are spelt out.
    """
    kinds = "".join(unicodedata.category(chr(c))[0] for c in range(sys.maxunicode + 1))
    L, N, Z = ("".join(f"{chr(m.start())}-{chr(m.end() - 1)}" for m in re.finditer(f"{k}+", kinds)) for k in "LNZ")
    return re.compile(rf"'(?:s|t|re|ve|m|ll|d)|[{L}]+|[{N}]|[^\t-\r\x85{Z}{L}{N}]+")


def merge_pairs(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Join the neighbours whose pair has the lowest rank, everywhere in the word, until no pair has a rank."""
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=lambda pair: ranks.get(pair, math.inf))
        if best not in ranks:
            break
        joined: list[str] = []
        for symbol in symbols:
            if joined and (joined[-1], symbol) == best:
                joined[-1] += symbol
            else:
                joined.append(symbol)
        symbols = joined
    return symbols


class CLIPTokenizer:
    """Texts -> token ids, the same as transformers' CLIPTokenizer of 5.x and CLIPTokenizerFast before.

    ids: token -> id. merges: pairs of tokens, the first learned first; what they join to is a token too.
    start, end, pad: the special tokens, which a text may hold. Raises UserError where the vocabulary lacks one.

    The CLIPTokenizer of 4.x differs where ftfy is not installed: it splits CJK into single characters, drops control
    and joining characters (those of emoji in several parts) and writes Σ at a word's end as ς.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        start: str = START,
        end: str = END,
        pad: str = END,
    ):
        needed = [start, end, pad, *(token for a, b in merges for token in (a, b, a + b))]
        lacking = list(dict.fromkeys(repr(token) for token in needed if token not in ids))
        if lacking:
            raise UserError(f"the vocabulary lacks {listed(lacking)}, of the merges or the special tokens")
        self.ids = ids
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start, self.end, self.pad = ids[start], ids[end], ids[pad]
        self.special = {fold(token): ids[token] for token in (start, end, pad)}
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, self.special))})")
        self._seen: dict[str, list[int]] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> CLIPTokenizer:
        """The tokenizer of a folder with `vocab.json` and `merges.txt`, or with transformers' `tokenizer.json` alone.

        `tokenizer_config.json` and `special_tokens_map.json`, if there, name the special tokens. Raises UserError for
        what is missing, broken or unknown.
        """
        ids, merges = _vocabulary(Path(folder))
        special = _special_tokens(Path(folder))
        try:
            return cls(ids, merges, **special)
        except UserError as e:
            raise UserError(f"{folder}: {e}") from e

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, text: str) -> list[str]:
        """The text's words and special tokens, folded; white space is left out."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"{text!r} holds half a character ({text[e.start]!r}), which UTF-8 cannot write") from e
        words: list[str] = []
        for piece in self._special_pattern.split(fold(text)):
            words += [piece] if piece in self.special else word_pattern().findall(piece)
        return words

    def word_ids(self, word: str) -> list[int]:
        """The ids of one of `split`'s words; the end's stands for a byte that a small vocabulary may lack."""
        if word in self.special:
            return [self.special[word]]
        if word not in self._seen:
            symbols = [byte_symbols()[byte] for byte in word.encode()]
            symbols[-1] += "</w>"
            self._seen[word] = [self.ids.get(token, self.end) for token in merge_pairs(symbols, self.ranks)]
        return self._seen[word]

    def __call__(self, texts: Sequence[str], context: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts -> ids int64 (B, context), mask bool (B, context), False on padding.

        Warns of the words beyond the context, which are cut, and names them.
        """
        if context < 2:
            raise ValueError(f"texts need a context of at least 2, for their start and end, got {context}")
        ids = np.full((len(texts), context), self.pad, dtype=np.int64)
        mask = np.zeros(ids.shape, dtype=bool)
        for row, used, text in zip(ids, mask, texts, strict=True):
            words, tokens = self.split(text), [self.start]
            for i, word in enumerate(words):
                tokens += self.word_ids(word)
                if len(tokens) >= context:
                    cut = textwrap.shorten(" ".join(words[i:]), 300, placeholder=" ...")
                    told = f"the text is longer than the {context} tokens read; cut off: {cut}"
                    warnings.warn(told, UserNotice, stacklevel=2)
                    break
            tokens = [*tokens[: context - 1], self.end]
            row[: len(tokens)], used[: len(tokens)] = tokens, True
        return ids, mask


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    source = folder / "tokenizer.json"
    if source.exists() and not (folder / "vocab.json").exists():
        model = read_json(source).get("model")
        ids, lines = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    else:
        ids, source = read_json(folder / "vocab.json"), folder / "merges.txt"
        lines = read_text(source).rstrip("\n").split("\n")
        lines = lines[lines[0].startswith("#version") :]
    if not isinstance(ids, dict) or not ids or not all(type(i) is int and i >= 0 for i in ids.values()):
        raise UserError(f"{folder}: the vocabulary is not a table of tokens and their numbers")
    if len(set(ids.values())) < len(ids):
        raise UserError(f"{folder}: the vocabulary gives two tokens the same number")
    merges = []
    for number, line in enumerate(lines if isinstance(lines, list) else [lines], 1):
        pair = line.split(" ") if isinstance(line, str) else line
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) and token for token in pair):
            raise UserError(f"{source}: merge {number} must be two tokens, got {str(line)[:40]!r}")
        merges.append((pair[0], pair[1]))
    return ids, merges


def _special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that the folder names, by what they are called here."""
    config: dict[str, Any] = {}
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):  # the latter has the last word
        config |= read_json(file) if file.exists() else {}
    roles = {"start": "bos_token", "end": "eos_token", "pad": "pad_token"}
    named = {role: _content(config[key], folder) for role, key in roles.items() if config.get(key) is not None}
    added = config.get("added_tokens_decoder")
    others = {_content(token, folder) for token in added.values()} if isinstance(added, dict) else set()
    older = folder / "added_tokens.json"  # token -> id
    others |= set(read_json(older)) if older.exists() else set()
    others -= {START, END, *named.values()}
    if others:
        told = listed(sorted(map(repr, others)))
        raise UserError(f"{folder} adds tokens to CLIP's, which this tokenizer does not know: {told}")
    return named


def _content(token: Any, folder: Path) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise UserError(f"{folder}: its JSON files must name tokens by a text, not {token!r:.40}")
    return content
