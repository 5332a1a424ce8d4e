"""Near-duplicates: found above the threshold, never below it, and the same ones in any cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrlhf.config import NearDuplicates
from rayrlhf.data.buckets import NEAR_DUPLICATE, NEAR_HELD_OUT, Group, Shuffle, to_drop
from rayrlhf.data.documents import text_hash
from rayrlhf.data.near_duplicates import Bands, Search, Writer, search_partition, signatures
from rayrlhf.data.ngrams import jaccard, ngram_hashes

BANDS = Bands(threshold=0.8, ngram=3, num_bands=32, rows_per_band=8, num_partitions=3)


def text(seed: int, words: int = 120) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"w{number}" for number in rng.integers(0, 5000, words))


def changed(original: str, count: int) -> str:
    """Change `count` words, evenly spread."""
    words = original.split()
    for place in np.linspace(3, len(words) - 4, count).astype(int):
        words[place] = f"changed{place}"
    return " ".join(words)


def find(folder: Path, *pieces: tuple[bool, list[str]], bands: Bands = BANDS) -> dict[bytes, str]:
    """Run the job over pieces of (held out, texts)."""
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    written: list[dict[str, Any]] = []
    for number, (held_out, texts) in enumerate(pieces):
        writer = Writer(folder / "documents", f"{number:06d}", held_out, bands)
        for start in range(0, len(texts), 7):
            some = texts[start : start + 7]
            writer.add(some, [text_hash(t) for t in some])
        written += writer.finish()
    rules = Search(str(folder), bands.threshold, num_buckets=2)
    accounts = [search_partition(p, rules, written) for p in range(bands.num_partitions)]
    shuffle = Shuffle(str(folder), 2, [], [account["file"] for account in accounts])
    return to_drop(shuffle, Group("train")) | to_drop(shuffle, Group("train", bucket=1))


def test_one_of_two_near_duplicates_goes(tmp_path: Path) -> None:
    a, b = text(0), changed(text(0), 3)
    far = changed(text(1), 30)
    assert jaccard(*ngram_hashes([a, b], 3)) > 0.8
    assert jaccard(*ngram_hashes([text(1), far], 3)) < 0.8
    found = find(tmp_path, (False, [a, text(1), text(2)]), (False, [b, far, ""]))
    assert found == {max(text_hash(a), text_hash(b)): NEAR_DUPLICATE}


def test_recall_and_precision_over_many_pairs(tmp_path: Path) -> None:
    texts, pairs = [], []
    for number in range(150):
        copy = changed(text(number), 1 + number % 6)
        texts += [text(number), copy]
        digest = max(text_hash(text(number)), text_hash(copy))
        pairs.append((digest, jaccard(*ngram_hashes([text(number), copy], BANDS.ngram))))
    found = set(find(tmp_path, (False, texts)))
    expected = {digest for digest, index in pairs if index >= BANDS.threshold}
    assert 60 < len(expected) < 120  # pairs on both sides of the threshold
    assert len(found & expected) >= 0.95 * len(expected)
    assert len(found & expected) >= 0.95 * len(found)


def test_what_is_close_to_a_held_out_text_goes_and_the_held_out_text_stays(tmp_path: Path) -> None:
    train, held = [text(n) for n in range(8)], [changed(text(n), 2) for n in range(8)]
    found = find(tmp_path, (False, train), (True, [*held, changed(text(3), 3)]))
    assert found == dict.fromkeys(map(text_hash, train), NEAR_HELD_OUT)


def test_a_piece_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayrlhf.data import near_duplicates

    texts = [changed(text(n % 5), n // 5) for n in range(20)]
    whole = find(tmp_path / "a", (False, texts))
    monkeypatch.setattr(near_duplicates, "_NGRAMS_PER_PART", 300)
    assert find(tmp_path / "b", (False, texts)) == whole
    assert len(list((tmp_path / "b/documents").glob("*.bands.arrow"))) >= 3


def test_exact_duplicates_are_left_to_the_exact_rule(tmp_path: Path) -> None:
    assert find(tmp_path, (False, [text(0), text(0)]), (False, [text(0)])) == {}


def test_the_result_does_not_depend_on_pieces_and_partitions(tmp_path: Path) -> None:
    texts = [changed(text(n % 20), n // 20) for n in range(100)]
    whole = find(tmp_path / "a", (False, texts))
    parts = [(False, texts[start::7]) for start in range(7)]
    again = find(
        tmp_path / "b",
        *parts,
        bands=Bands(threshold=0.8, ngram=3, num_bands=32, rows_per_band=8, num_partitions=11),
    )
    assert whole == again
    assert 60 <= len(whole) <= 80  # of five of a kind, up to four changes apart, one stays


def test_collisions_of_bands_are_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put every document into one band: the exact comparison alone decides."""
    from rayrlhf.data import near_duplicates

    def same(ngrams: Any, bands: Bands) -> Any:
        return np.zeros((len(ngrams), bands.num_bands), dtype=np.uint64)

    monkeypatch.setattr(near_duplicates, "signatures", same)
    texts = [text(n) for n in range(10)]
    assert find(tmp_path, (False, texts)) == {}
    assert len(find(tmp_path / "b", (False, [*texts, changed(texts[0], 2)]))) == 1


def test_bands_meet_with_the_probability_of_the_formula() -> None:
    """J^r per band, over many pairs; the standard error of the mean is below 0.01."""
    rng = np.random.default_rng(0)
    bands = Bands(threshold=0.8, ngram=1, num_bands=40, rows_per_band=4, num_partitions=1)
    shares = []
    for _ in range(200):
        both, one, other = np.split(rng.integers(0, 2**63, 120, dtype=np.uint64), [80, 100])
        a, b = np.unique(np.concatenate([both, one])), np.unique(np.concatenate([both, other]))
        keys = signatures([a, b], bands)
        shares.append(float((keys[0] == keys[1]).mean()))
    assert np.mean(shares) == pytest.approx((80 / 120) ** 4, abs=0.03)


def test_bands_that_would_miss_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"find only .*% of the pairs at threshold=0.8"):
        NearDuplicates(num_bands=4)
