"""The human-ratings data set: 23,703 short texts, each rated by 15 to 99 people from -4 to +4.

C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM-14 (MIT licence). This module turns the authors' archive into the records that
the stages read. Two departures: a text's mean is that of its single ratings (the archive's own
means of 199 contrived tweets differ from theirs), and texts are split by near-duplicate group.
"""

import hashlib
import html
import json
import math
import random
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

SOURCES = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
HEADERS = {
    "movies": "Movie review:",
    "products": "Product review:",
    "editorials": "Editorial:",
    "tweets": "Tweet:",
}
SPLITS = ("train", "validation", "test")
HALVED = ("train", "validation")
KINDS = ("demonstrations", "comparisons", "prompts", "ratings")
# Upper ends of the parts on [0, 1): 10% test, 2% validation, 4% openings for PPO, 84% train.
PARTS = (("test", 0.10), ("validation", 0.12), ("prompts", 0.16), ("train", 1.0))
HALVES = (("proxy", 0.5), ("gold", 1.0))
"""Of the texts of a split: comparisons of two reward models that are to have none in common."""
SAME_TEXT = 0.7
"""Jaccard similarity of two texts' words from which on they may not be in different splits."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Snippet:
    """One rated text."""

    id: str
    """Source and the archive's id, for example `products-12_3`."""
    source: str
    document: str
    """Reviews and editorials were cut into sentences; this names the whole they come from."""
    text: str
    ratings: tuple[int, ...]
    """Single ratings, -4 (most negative) to 4."""

    @cached_property
    def mean(self) -> float:
        """Mean of the single ratings; rounded, so that equal means are equal numbers."""
        return round(sum(self.ratings) / len(self.ratings), 6)

    @property
    def line(self) -> str:
        """The text behind the header of its source."""
        return f"{HEADERS[self.source]} {self.text}"


def file_names() -> list[str]:
    """Return the names of all files that `build` writes."""
    corpus = [f"corpus.{source}.{split}.jsonl" for source in SOURCES for split in SPLITS]
    halves = [f"comparisons-{half}.{split}.jsonl" for half, _ in HALVES for split in HALVED]
    return corpus + halves + [f"{kind}.{split}.jsonl" for kind in KINDS for split in SPLITS]


def build(archive: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Write every file of the data set into `folder`; returns records per file and source."""
    parts = split(read_snippets(archive))
    counts: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    for name in SPLITS:
        files: dict[str, list[dict[str, Any]]] = {
            f"corpus.{source}.{name}.jsonl": [
                _document(s) for s in parts[name] if s.source == source
            ]
            for source in SOURCES
        }
        files[f"demonstrations.{name}.jsonl"] = demonstrations(parts[name])
        files[f"comparisons.{name}.jsonl"] = comparisons(parts[name])
        if name in HALVED:
            for half, texts in split(parts[name], HALVES).items():
                files[f"comparisons-{half}.{name}.jsonl"] = comparisons(texts)
        pool, per_text = (parts["prompts"], 2) if name == "train" else (parts[name], 1)
        files[f"prompts.{name}.jsonl"] = prompts(pool, per_text, seen)
        files[f"ratings.{name}.jsonl"] = [_rating(s) for s in parts[name]]
        for file, records in files.items():
            _write(folder / file, records)
            counts[file] = dict(Counter(record["source"] for record in records))
    return counts


def read_snippets(archive: Path) -> list[Snippet]:
    """Return the texts of the archive in its order, whitespace and HTML entities normalised."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(_member(outer, "hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=inner) as tar:
            return [
                snippet
                for source, stem in SOURCES.items()
                for snippet in _source_snippets(tar, source, stem)
            ]


def split(
    snippets: Sequence[Snippet], parts: Sequence[tuple[str, float]] = PARTS
) -> dict[str, list[Snippet]]:
    """Divide texts over the parts, group by group: near-duplicates and documents stay together.

    Within a source the groups are ordered by a hash, so that each part has its share of it.
    """
    words = [frozenset(_WORD.findall(s.text.lower())) or frozenset([s.text]) for s in snippets]
    groups = _Groups(len(snippets))
    for first, second in similar_pairs(words, SAME_TEXT):
        groups.join(first, second)
    documents: dict[str, int] = {}
    for index, snippet in enumerate(snippets):
        groups.join(index, documents.setdefault(snippet.document, index))
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(snippets)):
        members[groups.root(index)].append(index)
    part_of: dict[int, str] = {}
    for source in SOURCES:
        own = sorted(
            (g for g in members.values() if snippets[g[0]].source == source),
            key=lambda g: _hash(snippets[g[0]].id),
        )
        total, before = sum(len(g) for g in own), 0
        for group in own:
            place = (before + len(group) / 2) / total
            part = next(name for name, end in parts if place < end)
            part_of.update(dict.fromkeys(group, part))
            before += len(group)
    return {name: [s for i, s in enumerate(snippets) if part_of[i] == name] for name, _ in parts}


def similar_pairs(sets: Sequence[frozenset[str]], threshold: float) -> Iterator[tuple[int, int]]:
    """Yield every pair of positions whose sets have a Jaccard similarity of at least `threshold`.

    Exact: two such sets share an element among the rarest |x| - ceil(threshold * |x|) + 1 of each.
    Source: prefix filtering, Bayardo et al., "Scaling up all pairs similarity search", WWW 2007.
    """
    frequency = Counter(element for elements in sets for element in elements)
    sizes = [len(elements) for elements in sets]
    index: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(sets)), key=lambda i: sizes[i]):
        rare_first = sorted(sets[i], key=lambda element: (frequency[element], element))
        size = sizes[i]
        seen: set[int] = set()
        for element in rare_first[: size - math.ceil(threshold * size - 1e-9) + 1]:
            for j in index[element]:
                if j in seen or sizes[j] < threshold * size - 1e-9:
                    continue
                seen.add(j)
                shared = len(sets[i] & sets[j])
                if shared >= threshold * (size + sizes[j] - shared) - 1e-9:
                    yield j, i
            index[element].append(i)


def demonstrations(snippets: Iterable[Snippet]) -> list[dict[str, Any]]:
    """Take what people found positive, 6 to 60 words: an opening and how its author went on."""
    records = []
    for snippet in snippets:
        words = snippet.text.split()
        if snippet.mean > 0 and 6 <= len(words) <= 60:
            opening = random.Random(f"demonstration {snippet.id}").randint(2, 5)
            records.append(
                {
                    "id": snippet.id,
                    "source": snippet.source,
                    "prompt": f"{HEADERS[snippet.source]} {' '.join(words[:opening])}",
                    "response": f" {' '.join(words[opening:])}",
                    "rating": snippet.mean,
                }
            )
    return _shuffled(records)


def comparisons(snippets: Iterable[Snippet]) -> list[dict[str, Any]]:
    """Group the texts of each source in K = 4 to 9, ranked by mean rating, ties kept.

    Every text is in one comparison; fewer than four texts of a source make one of K = 2 or 3.
    """
    by_source: dict[str, list[Snippet]] = defaultdict(list)
    for snippet in snippets:
        by_source[snippet.source].append(snippet)
    records = []
    for source, texts in by_source.items():
        rng = random.Random(f"comparisons {source}")
        rest = sorted(texts, key=lambda s: _hash(f"comparison {s.id}"))
        while len(rest) >= 2:
            # K never leaves one, two or three texts behind.
            sizes = [k for k in range(4, 10) if len(rest) - k == 0 or len(rest) - k >= 4]
            size = rng.choice(sizes) if sizes else len(rest)
            records.append(_comparison(source, rest[:size]))
            rest = rest[size:]
    return _shuffled(records)


def prompts(snippets: Iterable[Snippet], per_text: int, seen: set[str]) -> list[dict[str, Any]]:
    """Take `per_text` openings of 2 to 5 words of each text, none that is in `seen` (updated)."""
    records = []
    for snippet in snippets:
        words = snippet.text.split()
        lengths = list(range(2, min(5, len(words) - 1) + 1))
        random.Random(f"prompt {snippet.id}").shuffle(lengths)
        taken = 0
        for length in lengths:
            prompt = f"{HEADERS[snippet.source]} {' '.join(words[:length])}"
            if taken < per_text and prompt not in seen:
                seen.add(prompt)
                taken += 1
                records.append(
                    {"id": f"{snippet.id}-{length}", "source": snippet.source, "prompt": prompt}
                )
    return _shuffled(records)


class _Groups:
    """Disjoint sets of positions (union-find with path halving)."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def root(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, first: int, second: int) -> None:
        low, high = sorted((self.root(first), self.root(second)))
        self._parent[high] = low


def _source_snippets(tar: tarfile.TarFile, source: str, stem: str) -> Iterator[Snippet]:
    ratings = {}
    for number, _mean, _deviation, single in _table(tar, f"{stem}_anonDataRatings.txt"):
        ratings[number] = tuple(int(rating) for rating in json.loads(single))
    for number, _mean, text in _table(tar, f"{stem}_GroundTruth.txt"):
        # Some entities were escaped twice.
        clean = " ".join(html.unescape(html.unescape(text)).split())
        document, _, _sentence = number.partition("_")
        yield Snippet(f"{source}-{number}", source, f"{source}-{document}", clean, ratings[number])


def _table(tar: tarfile.TarFile, name: str) -> list[list[str]]:
    """Return the cells of a tab-separated file: UTF-8 with or without mark, else Latin-1."""
    file = tar.extractfile(_member(tar, name))
    assert file is not None, f"{name} is a regular file of an archive whose hash was checked"
    raw = file.read()
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        content = raw.decode("latin-1")
    return [line.rstrip("\r").split("\t") for line in content.split("\n") if line.strip()]


def _member(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    return next(m for m in tar.getmembers() if m.isfile() and Path(m.name).name == name)


def _document(snippet: Snippet) -> dict[str, Any]:
    return {"id": snippet.id, "source": snippet.source, "text": snippet.line}


def _rating(snippet: Snippet) -> dict[str, Any]:
    return {
        "id": snippet.id,
        "source": snippet.source,
        "text": snippet.text,
        "mean": snippet.mean,
        "ratings": list(snippet.ratings),
    }


def _comparison(source: str, texts: Sequence[Snippet]) -> dict[str, Any]:
    return {
        "id": texts[0].id,
        "source": source,
        "prompt": HEADERS[source],
        "responses": [f" {s.text}" for s in texts],
        # 1 + how many are better: ties share the best rank ("1224").
        "ranks": [1 + sum(other.mean > s.mean for other in texts) for s in texts],
        "ratings": [s.mean for s in texts],
        "text_ids": [s.id for s in texts],
        "single_ratings": [list(s.ratings) for s in texts],
    }


def _shuffled(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mix the sources: by hash, so that the first n of a file are a sample of it."""
    return sorted(records, key=lambda record: _hash(record["id"]))


def _hash(text: str) -> str:
    return hashlib.sha256(f"rayrlhf human-ratings {text}".encode()).hexdigest()


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
