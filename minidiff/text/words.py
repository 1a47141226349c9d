"""A tokenizer for a small closed vocabulary: one word, one token."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from minidiff.errors import UserError

PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unknown>"
SPECIAL = (PAD, START, END, UNKNOWN)


def split_words(caption: str) -> list[str]:
    """The caption's words: lower case, letters and digits; accents, which may stand by themselves, joined to theirs."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", caption.lower()))


class WordTokenizer:
    """Captions -> token ids. The empty caption, start and end alone, is the unconditional input.

    words: the vocabulary; their ids follow those of the four special tokens, in the order given. ValueError if one is
    given twice.
    """

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.ids = {word: i for i, word in enumerate((*SPECIAL, *words))}
        if len(self.ids) != len(SPECIAL) + len(self.words):
            raise ValueError(f"the vocabulary of {len(self.words)} words has a word twice")

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, caption: str) -> list[str]:
        """The words that the caption's tokens stand for."""
        return split_words(caption)

    def unknown(self, caption: str) -> list[str]:
        """The words of the caption that are not in the vocabulary."""
        return [word for word in self.split(caption) if word not in self.ids]

    def __call__(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Captions -> ids int64 (B, length), mask bool (B, length), False on padding.

        Raises UserError for a caption of more than length - 2 words.
        """
        if length < 2:
            raise ValueError(f"captions need a length of at least 2, for their start and end, got {length}")
        ids = np.full((len(captions), length), self.ids[PAD], dtype=np.int64)
        for row, caption in zip(ids, captions, strict=True):
            words = self.split(caption)
            if len(words) > length - 2:
                raise UserError(f"{caption!r} has {len(words)} words; the model reads at most {length - 2}")
            tokens = [START, *(word if word in self.ids else UNKNOWN for word in words), END]
            row[: len(tokens)] = [self.ids[token] for token in tokens]
        return ids, ids != self.ids[PAD]
