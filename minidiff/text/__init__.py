"""Tokenizers: captions in, token ids out."""

from minidiff.text.bpe import CLIPTokenizer
from minidiff.text.words import WordTokenizer

__all__ = ["CLIPTokenizer", "WordTokenizer"]
