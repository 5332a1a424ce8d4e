"""Texts to token ids, word by word: what `tokenizers` gives, several times as fast.

A BPE merges nothing across the pieces that its pre-tokenizer cuts a text into, and most pieces are
words that came before. So a text is cut by the pre-tokenizer's own pattern, and each different word
is encoded once, by `tokenizers`, and looked up from then on. Whatever this does not hold for, a
tokenizer of another kind or a text with characters that Unicode versions disagree on, is encoded
as a whole.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import regex
from tokenizers import Tokenizer

MAX_WORDS = 2**19
"""Words that are remembered, about 100 MB; when there are more, it begins anew."""
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""The pattern of `ByteLevel(use_regex=True)`."""
_GPT2_ASCII = re.compile(
    r"""'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+""", re.ASCII
)
"""The same for ASCII texts, by Python's own engine: twice as fast."""
# Letters, marks and signs of blocks without gaps whose classes are those of Unicode 6 for good; no
# control character but tab and newline, which libraries do not agree on either.
_STABLE = regex.compile(
    "[\t\n -~\u00a0-\u017e\u0180-\u0377\u0384-\u038a\u038c\u038e-\u03a1\u03a3-\u0523"
    "\u2010-\u2027\u2030-\u205e\u20a0-\u20b5\u2190-\u21ff\u3041-\u3096\u30a1-\u30fe"
    "\u4e00-\u9fa5\uac00-\ud7a3\U0001f600-\U0001f640]*+"
)


class Encoder:
    """A tokenizer.json; a special token's name inside a text is plain text."""

    def __init__(self, folder: str | Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        pattern = word_pattern(json.loads(self.tokenizer.to_str()))
        self._words: Any = None if pattern is None else regex.compile(pattern)
        self._ascii: Any = _GPT2_ASCII if pattern == GPT2 else self._words
        self._ids: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each text alone, without special tokens."""
        words = [self._cut(text) for text in texts]
        self._learn(set().union(*(cut for cut in words if cut is not None)))
        rest = [text for text, cut in zip(texts, words, strict=True) if cut is None]
        whole = iter(self._whole(rest))
        ids = self._ids
        return [
            np.fromiter(
                next(whole) if cut is None else chain.from_iterable(map(ids.__getitem__, cut)),
                dtype=np.int32,
            )
            for cut in words
        ]

    def _cut(self, text: str) -> list[str] | None:
        """Return the words of a text, None where they can't be told for sure."""
        if self._words is None or _STABLE.fullmatch(text) is None:
            return None
        words: list[str] = (self._ascii if text.isascii() else self._words).findall(text)
        return words if sum(map(len, words)) == len(text) else None

    def _learn(self, words: set[str]) -> None:
        if len(self._ids) > MAX_WORDS:
            self._ids.clear()
        new = [word for word in words if word not in self._ids]
        self._ids.update(zip(new, self._whole(new), strict=True))

    def _whole(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [item.ids for item in encoded]


def word_pattern(tokenizer: dict[str, Any]) -> str | None:
    """Return the pattern that a tokenizer.json cuts texts by; None: it does more than that."""
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    plain = model["type"] == "BPE" and not model.get("dropout") and tokenizer["normalizer"] is None
    # A token that is added, but not special, is found before the text is cut.
    if not plain or not all(token["special"] for token in added):
        return None
    first = tokenizer["pre_tokenizer"] or {}
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        own = steps[0]["use_regex"] and not steps[0]["add_prefix_space"]
        return GPT2 if own else None
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, level = steps
    whole = split["behavior"] == "Isolated" and not split["invert"]
    if not whole or level["use_regex"] or level["add_prefix_space"]:
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return pattern
