"""Tokenizers: captions in, token ids out."""

from minidiff.text.words import WordTokenizer

__all__ = ["WordTokenizer"]
