"""Named rules that drop or edit documents of a corpus: Gopher's, C4's, and personal data.

Gopher: arXiv:2112.11446, appendix A.1 (quality and repetition). C4: arXiv:1910.10683, section 2.2.
A filter looks at one document and tells whether to drop it; an edit returns another text. Both are
pure, so that a document's fate does not depend on where and when it is read.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("\u2022", "\u2023", "\u25e6", "\u2043", "-", "*")
ELLIPSES = ("...", "\u2026")
EMAIL, IP = "<email>", "<ip>"
"""What stands in the place of personal data."""

_SENTENCE_END = re.compile(r"[.!?][\"')\]\u201d]*(?=\s|$)")
_LOCAL_PART = r"[\w.!#$%&'*+/=?^`{|}~-]"
# Begins where a run of these characters begins and never gives back: linear in long runs (base64).
_EMAIL = re.compile(rf"(?<!{_LOCAL_PART}){_LOCAL_PART}++@(?:[\w](?:[\w-]*[\w])?\.)+[A-Za-z]{{2,}}")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


class Document:
    """A cleaned text, and its parts, each taken apart once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What stands between white space."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, trimmed."""
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What stands between blank lines, trimmed."""
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]


def gopher_word_count(document: Document) -> bool:
    """Fewer than 50 or more than 100,000 words."""
    return not 50 <= len(document.words) <= 100_000


def gopher_word_length(document: Document) -> bool:
    """A mean word length outside 3 to 10 characters."""
    return not 3 <= _share(sum(map(len, document.words)), len(document.words)) <= 10


def gopher_symbols(document: Document) -> bool:
    """More than 0.1 hash signs or ellipses per word."""
    text, num_words = document.text, len(document.words)
    ellipses = sum(text.count(mark) for mark in ELLIPSES)
    return max(text.count("#"), ellipses) > 0.1 * num_words


def gopher_bullets(document: Document) -> bool:
    """More than 90% of the lines start with a bullet point."""
    starts = sum(line.startswith(BULLETS) for line in document.lines)
    return starts > 0.9 * len(document.lines)


def gopher_ellipses(document: Document) -> bool:
    """More than 30% of the lines end with an ellipsis."""
    return sum(line.endswith(ELLIPSES) for line in document.lines) > 0.3 * len(document.lines)


def gopher_alphabetic(document: Document) -> bool:
    """Fewer than 80% of the words have a letter."""
    letters = sum(any(c.isalpha() for c in word) for word in document.words)
    return letters < 0.8 * len(document.words)


def gopher_stop_words(document: Document) -> bool:
    """Fewer than two of the eight stop words occur."""
    return len(STOP_WORDS.intersection(word.lower() for word in document.words)) < 2


def gopher_repeated_lines(document: Document) -> bool:
    """More than 30% of the lines, or 20% of their characters, repeat an earlier line."""
    return _repeated(document.lines)


def gopher_repeated_paragraphs(document: Document) -> bool:
    """More than 30% of the paragraphs, or 20% of their characters, repeat an earlier one."""
    return _repeated(document.paragraphs)


def gopher_top_ngram(document: Document) -> bool:
    """The commonest 2-, 3- or 4-gram has more than 20%, 18% or 16% of the characters."""
    total = sum(map(len, document.words))
    for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16)):
        counts = Counter(_ngrams(document.words, n))
        if not counts:
            continue
        ngram, count = max(counts.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
        if count > 1 and count * sum(map(len, ngram)) > limit * total:
            return True
    return False


def gopher_repeated_ngrams(document: Document) -> bool:
    """Repeated 5- to 10-grams cover more than 15% to 10% of the characters."""
    words = document.words
    lengths = [len(word) for word in words]
    for n, limit in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)):
        seen: set[tuple[str, ...]] = set()
        covered = [False] * len(words)
        for start, ngram in enumerate(_ngrams(words, n)):
            if ngram in seen:
                covered[start : start + n] = [True] * n
            seen.add(ngram)
        repeated = sum(length for length, hit in zip(lengths, covered, strict=True) if hit)
        if repeated > limit * sum(lengths):
            return True
    return False


def c4_sentences(document: Document) -> bool:
    """Fewer than three sentences."""
    return len(_SENTENCE_END.findall(document.text)) < 3


def c4_lorem_ipsum(document: Document) -> bool:
    """`lorem ipsum` occurs."""
    return "lorem ipsum" in document.text.lower()


def c4_curly_bracket(document: Document) -> bool:
    """A curly bracket occurs: the page is more program than language."""
    return "{" in document.text


def c4_lines(text: str) -> str:
    """Keep lines of five words that end like a sentence; no JavaScript or policy notices.

    Marks of citations, as in Wikipedia, go too.
    """
    kept = []
    for line in text.split("\n"):
        trimmed = _CITATION.sub("", line).strip()
        lowered = trimmed.lower()
        if (
            trimmed.endswith((".", "!", "?", '"', "\u201d"))
            and not trimmed.endswith(ELLIPSES)
            and len(trimmed.split()) >= 5
            and "javascript" not in lowered
            and not any(phrase in lowered for phrase in _POLICY)
        ):
            kept.append(trimmed)
    return "\n".join(kept)


def scrub_email(text: str) -> str:
    """Replace e-mail addresses by `<email>`."""
    return _EMAIL.sub(EMAIL, text) if "@" in text else text


def scrub_ip(text: str) -> str:
    """Replace public IPv4 and IPv6 addresses by `<ip>`; private ones name nobody."""
    text = _IPV4.sub(_public_ip, text)
    return _IPV6.sub(_public_ip, text) if "::" in text or text.count(":") >= 7 else text


FILTERS: dict[str, Callable[[Document], bool]] = {
    rule.__name__: rule
    for rule in (
        gopher_word_count,
        gopher_word_length,
        gopher_symbols,
        gopher_bullets,
        gopher_ellipses,
        gopher_alphabetic,
        gopher_stop_words,
        gopher_repeated_lines,
        gopher_repeated_paragraphs,
        gopher_top_ngram,
        gopher_repeated_ngrams,
        c4_sentences,
        c4_lorem_ipsum,
        c4_curly_bracket,
    )
}
"""Rules that drop a document, cheap ones first: the first that applies gives the reason."""
EDITS: dict[str, Callable[[str], str]] = {
    rule.__name__: rule for rule in (c4_lines, scrub_email, scrub_ip)
}
"""Rules that change a text, in the order in which they are applied, before the filters."""


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _repeated(parts: Sequence[str]) -> bool:
    counts = Counter(parts)
    again = sum(count - 1 for count in counts.values())
    characters = sum((count - 1) * len(part) for part, count in counts.items())
    return again > 0.3 * len(parts) or characters > 0.2 * sum(map(len, parts))


def _ngrams(words: Sequence[str], n: int) -> "zip[tuple[str, ...]]":
    return zip(*(words[start:] for start in range(n)), strict=False)


def _public_ip(match: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(match.group())
    except ValueError:
        return match.group()
    return IP if address.is_global else match.group()
