"""Our word tokenizer as the files of transformers' PreTrainedTokenizerFast, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minidiff.errors import UserError
from minidiff.files import read_json
from minidiff.text import WordTokenizer
from minidiff.text.words import END, PAD, SPECIAL, START, UNKNOWN

FOLDED = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "NFC"}]}
"""tokenizers' words for what `split_words` does to a caption before it looks for words."""


def tokenizer_files(tokenizer: WordTokenizer, context: int) -> dict[str, dict[str, Any]]:
    """The files of a PreTrainedTokenizerFast that gives the same ids and masks: {name: content}."""
    special = {name: tokenizer.ids[name] for name in SPECIAL}
    frame = [{"SpecialToken": {"id": START, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
             {"SpecialToken": {"id": END, "type_id": 0}}]  # fmt: skip
    about = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = {
        "version": "1.0",
        "truncation": {"max_length": context, "strategy": "LongestFirst", "direction": "Right", "stride": 0},
        "padding": {
            "strategy": {"Fixed": context}, "direction": "Right", "pad_id": special[PAD], "pad_token": PAD,
            "pad_type_id": 0, "pad_to_multiple_of": None,
        },
        "added_tokens": [{"id": i, "content": name, **about} for name, i in special.items()],
        "normalizer": FOLDED,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": r"[\W_]+"}, "behavior": "Removed", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing", "single": frame, "pair": frame,
            "special_tokens": {name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in (START, END)},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": tokenizer.ids, "unk_token": UNKNOWN},
    }  # fmt: skip
    roles = {"bos_token": START, "eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, **roles}
    return {"tokenizer.json": words, "tokenizer_config.json": config}


def word_tokenizer(folder: Path) -> WordTokenizer | None:
    """The tokenizer that `export_folder` wrote; None where the folder's is of another kind. UserError if damaged."""
    file = folder / "tokenizer.json"
    model = read_json(file).get("model") if file.exists() else None
    if not isinstance(model, dict) or model.get("type") != "WordLevel":
        return None
    ids = model.get("vocab")
    words = sorted(ids, key=lambda word: str(ids[word]).zfill(9)) if isinstance(ids, dict) else []
    tokenizer = WordTokenizer(words[len(SPECIAL) :])
    if tokenizer.ids != ids:
        raise UserError(f"{file}: its words are not those of a tokenizer that minidiff wrote")
    return tokenizer
