"""Recall and precision of the search for near-duplicates, on a corpus with planted ones.

    python tests/benchmarks/near_duplicates.py [--documents 4000] [--repeats 1]

Half of the documents are originals, made of texts of the built-in ratings; the others are copies of
an original each, with 5%, 10% or 20% of their words changed. What counts is the exact Jaccard index
of a pair's word n-grams: at 0.8 and above the pair has to be found, below it must not be. `seconds`
is one core's time for hashing and comparing; `ratio_recall` is recall at J >= 0.8.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from rayrlhf.config import NearDuplicates
from rayrlhf.data import builtin
from rayrlhf.data.documents import text_hash
from rayrlhf.data.near_duplicates import Bands, Writer, find_in_partition
from rayrlhf.data.ngrams import jaccard, ngram_hashes

SHARES = (0.05, 0.1, 0.2)
NGRAM = 1
"""Single words, so that copies with 5%, 10% and 20% of their words changed lie on both sides of J =
0.8; with the default of 5 even the closest of them have J < 0.7."""


def planted(count: int, seed: int = 0) -> tuple[list[str], list[tuple[int, int, float]]]:
    """Return texts, and (original, copy, part of words changed)."""
    rng = random.Random(seed)
    file = Path(builtin.resolve("builtin:human-ratings/corpus.movies.train.jsonl"))
    lines = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    vocabulary = sorted({word for line in lines for word in line.split()})
    originals = [" ".join(rng.choice(lines) for _ in range(8)) for _ in range(count // 2)]
    texts, pairs = list(originals), []
    for number, original in enumerate(originals):
        words, share = original.split(), SHARES[number % len(SHARES)]
        for place in rng.sample(range(len(words)), round(share * len(words))):
            words[place] = rng.choice(vocabulary)
        pairs.append((number, len(texts), share))
        texts.append(" ".join(words))
    return texts, pairs


def main() -> None:
    """Plant, search, compare with the truth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="400 documents, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.documents = 400
    texts, pairs = planted(arguments.documents)
    settings = NearDuplicates(ngram=NGRAM)
    bands = Bands(**settings.model_dump(), num_partitions=4)
    ngrams = ngram_hashes(texts, NGRAM)
    truth = {(a, b): jaccard(ngrams[a], ngrams[b]) for a, b, _ in pairs}
    seconds = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as name:
            started = time.perf_counter()
            writer = Writer(Path(name), "000000", False, bands)
            writer.add(texts, [text_hash(text) for text in texts])
            written = [writer.finish() or {}]
            dropped: set[bytes] = set()
            for partition in range(bands.num_partitions):
                dropped |= set(find_in_partition(partition, written, Path(name), bands.threshold))
            seconds.append(time.perf_counter() - started)
    hashes = [text_hash(text) for text in texts]
    # Of a pair the later one in the order of hashes goes.
    goes = {(a, b): max(hashes[a], hashes[b]) for a, b in truth}
    expected = {goes[pair] for pair, index in truth.items() if index >= bands.threshold}
    found: Counter[str] = Counter()
    for a, b, share in pairs:
        found[f"{share:.0%} planted"] += 1
        found[f"{share:.0%} with J >= 0.8"] += truth[a, b] >= bands.threshold
        found[f"{share:.0%} dropped"] += goes[a, b] in dropped
    for what, count in found.items():
        print(f"{what:>20}: {count}")
    print(
        json.dumps(
            {
                "ratio_recall": len(expected & dropped) / len(expected),
                "precision": len(expected & dropped) / max(1, len(dropped)),
                "planted_at_0.8": len(expected),
                "dropped": len(dropped),
                "documents_per_s": len(texts) / min(seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
