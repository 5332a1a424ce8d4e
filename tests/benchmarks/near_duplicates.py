"""Recall and precision of the search for near-duplicates, on a corpus with planted ones.

    python tests/benchmarks/near_duplicates.py [--documents 4000] [--repeats 1]

Half of the documents are originals, made of texts of the built-in ratings; the others are copies of
an original each, with 5%, 10% or 20% of their words changed. What counts is the exact Jaccard index
of a pair's word n-grams: at 0.8 and above the pair has to be found, below it must not be. Twice:

words      single words (ngram=1), changed here and there
passages   the default (ngram=5), changed in one passage; changed here and there, 5% of the words
           would be a quarter of the 5-grams, and no copy would have J >= 0.8

`documents_per_s` is of one core that hashes, writes, searches and reads back as the job's tasks do.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rayrlhf.config import NearDuplicates
from rayrlhf.data import builtin
from rayrlhf.data.buckets import Group, Shuffle, to_drop
from rayrlhf.data.documents import text_hash
from rayrlhf.data.near_duplicates import Bands, Search, Writer, search_partition
from rayrlhf.data.ngrams import jaccard, ngram_hashes

SHARES = (0.05, 0.1, 0.2)
Places = Callable[[random.Random, int, int], list[int]]


def here_and_there(rng: random.Random, words: int, count: int) -> list[int]:
    return rng.sample(range(words), count)


def one_passage(rng: random.Random, words: int, count: int) -> list[int]:
    start = rng.randrange(words - count + 1)
    return list(range(start, start + count))


def planted(
    count: int, places: Places, seed: int = 0
) -> tuple[list[str], list[tuple[int, int, float]]]:
    """Return texts, and (original, copy, part of words changed)."""
    rng = random.Random(seed)
    file = Path(builtin.resolve("builtin:human-ratings/corpus.movies.train.jsonl"))
    lines = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    vocabulary = sorted({word for line in lines for word in line.split()})
    originals = [" ".join(rng.choice(lines) for _ in range(8)) for _ in range(count // 2)]
    texts, pairs = list(originals), []
    for number, original in enumerate(originals):
        words, share = original.split(), SHARES[number % len(SHARES)]
        for place in places(rng, len(words), round(share * len(words))):
            words[place] = rng.choice(vocabulary)
        pairs.append((number, len(texts), share))
        texts.append(" ".join(words))
    return texts, pairs


def search(texts: list[str], bands: Bands) -> tuple[set[bytes], float]:
    """Return the hashes that the job's tasks drop, and the seconds that they take."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "documents").mkdir()
        started = time.perf_counter()
        writer = Writer(work / "documents", "000000", False, bands)
        writer.add(texts, [text_hash(text) for text in texts])
        parts, rules = writer.finish(), Search(name, bands.threshold, num_buckets=4)
        found = [search_partition(p, rules, parts) for p in range(bands.num_partitions)]
        shuffle = Shuffle(name, 4, [], [account["file"] for account in found])
        groups = [Group("train", bucket=bucket) for bucket in range(4)]
        dropped = {digest for group in groups for digest in to_drop(shuffle, group)}
        return dropped, time.perf_counter() - started


def measure(documents: int, repeats: int, ngram: int, places: Places) -> dict[str, float]:
    """Plant, search, compare with the truth; print a table."""
    texts, pairs = planted(documents, places)
    settings = NearDuplicates(ngram=ngram)
    bands = Bands(**settings.model_dump(), num_partitions=4)
    ngrams = ngram_hashes(texts, ngram)
    truth = {(a, b): jaccard(ngrams[a], ngrams[b]) for a, b, _ in pairs}
    runs = [search(texts, bands) for _ in range(repeats)]
    dropped = runs[0][0]
    hashes = [text_hash(text) for text in texts]
    # Of a pair the later one in the order of hashes goes.
    goes = {(a, b): max(hashes[a], hashes[b]) for a, b in truth}
    expected = {goes[pair] for pair, index in truth.items() if index >= bands.threshold}
    found: Counter[str] = Counter()
    for a, b, share in pairs:
        found[f"{share:.0%} planted"] += 1
        found[f"{share:.0%} with J >= 0.8"] += truth[a, b] >= bands.threshold
        found[f"{share:.0%} dropped"] += goes[a, b] in dropped
    print(f"ngram={ngram}, changed {places.__name__.replace('_', ' ')}")
    for what, count in found.items():
        print(f"{what:>20}: {count}")
    return {
        "recall": len(expected & dropped) / len(expected),
        "precision": len(expected & dropped) / max(1, len(dropped)),
        "planted_at_0.8": len(expected),
        "documents_per_s": len(texts) / min(seconds for _, seconds in runs),
    }


def main() -> None:
    """Measure both; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="400 documents, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.documents = 400
    figures: dict[str, float] = {}
    for name, ngram, places in (("words", 1, here_and_there), ("passages", 5, one_passage)):
        measured = measure(arguments.documents, arguments.repeats, ngram, places)
        figures |= {f"{key}_{name}": value for key, value in measured.items()}
    ratios = {f"ratio_{key}": value for key, value in figures.items() if key.startswith("recall")}
    rest = {key: value for key, value in figures.items() if not key.startswith("recall")}
    print(json.dumps(ratios | rest))


if __name__ == "__main__":
    main()
