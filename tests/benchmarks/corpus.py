"""Tokens per second of the corpus job, against `encode_batch` alone and against `datasets.map`.

    pip install datasets; python tests/benchmarks/corpus.py [--megabytes 200] [--repeats 3]
    python tests/benchmarks/corpus.py --memory 100 1000

The text is the built-in ratings' corpus, repeated with some of its words changed, so that no two
documents are the same; the tokenizer is trained on it once. Three ways to the same token ids:

limit     `tokenizers.encode_batch` over the texts, which are already in memory, on all cores
job       rayrlhf's corpus stage on a running Ray: read, clean, hash, tokenize, dedup, shuffle, pack
peer      `datasets.load_dataset` and `map(batched, num_proc)`, tokenized and packed as in
          transformers' run_clm.py; left out where `datasets` is not installed

`peak_mib` is the largest resident memory of the job's driver and workers together. With `--memory`
only the job runs, once per size in MB, and `ratio_peak` is the peak of the last over that of the
first: 1 where memory doesn't grow with the corpus.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from rayrlhf.config import Recipe, parse
from rayrlhf.data import builtin
from rayrlhf.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

ROW_LENGTH = 1024
CHANGED = 0.1
"""Part of the words that are changed."""


def texts(megabytes: float, seed: int = 0) -> Iterator[str]:
    """Yield documents of about 1,500 characters: texts of the built-in corpus, perturbed."""
    rng = random.Random(seed)
    folder = Path(builtin.resolve("builtin:human-ratings/corpus.movies.train.jsonl")).parent
    lines = [
        json.loads(line)["text"]
        for file in sorted(folder.glob("corpus.*.train.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    words = sorted({word for line in lines for word in line.split()})
    written = 0
    while written < megabytes * 2**20:
        document = " ".join(rng.choice(lines) for _ in range(14)).split(" ")
        for _ in range(int(len(document) * CHANGED)):
            document[rng.randrange(len(document))] = rng.choice(words)
        text = " ".join(document)
        written += len(text.encode())
        yield text


def recipe_of(folder: Path, run: str) -> Recipe:
    return parse(
        {
            "name": run,
            "run_dir": str(folder / run),
            "tokenizer": {"path": str(folder / "tokenizer")},
            "corpus": {
                "row_length": ROW_LENGTH,
                "sources": {"text": {"path": str(folder / "text.jsonl")}},
            },
        }
    )


def limit(folder: Path) -> tuple[float, int]:
    """Return (seconds, tokens) of encoding alone."""
    documents = [json.loads(line)["text"] for line in (folder / "text.jsonl").open("rb")]
    tokenizer = load_tokenizer(recipe_of(folder, "limit")).backend_tokenizer
    tokens = 0
    started = time.perf_counter()
    for start in range(0, len(documents), 1024):
        batch = tokenizer.encode_batch(documents[start : start + 1024], add_special_tokens=False)
        tokens += sum(len(encoding) for encoding in batch)
    return time.perf_counter() - started, tokens


def job(folder: Path, number: int) -> tuple[float, int, float]:
    """Return (seconds, tokens, peak MiB) of the corpus stage; Ray runs already."""
    from rayrlhf import session
    from rayrlhf.data.corpus import build_corpus

    recipe = recipe_of(folder, f"job{number}")
    load_tokenizer(recipe)
    session.connect(recipe)
    with Memory() as memory:
        started = time.perf_counter()
        corpus = build_corpus(recipe)
        seconds = time.perf_counter() - started
    train = json.loads((corpus / "manifest.json").read_text())["splits"]["train"]
    shutil.rmtree(recipe.path)
    return seconds, int(train["document_tokens"]), memory.peak_mib


def peer(folder: Path, number: int) -> tuple[float, int]:
    """Return (seconds, tokens) of datasets.map: tokenize, then group into rows."""
    from datasets import load_dataset

    tokenizer = load_tokenizer(recipe_of(folder, "peer"))
    eos = tokenizer.eos_token_id
    cores = os.cpu_count() or 1

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    def group(batch: dict[str, Any]) -> dict[str, Any]:
        joined = [token for ids in batch["input_ids"] for token in [*ids, eos]]
        whole = len(joined) // ROW_LENGTH * ROW_LENGTH
        return {"input_ids": [joined[i : i + ROW_LENGTH] for i in range(0, whole, ROW_LENGTH)]}

    started = time.perf_counter()
    data = load_dataset(
        "json", data_files=str(folder / "text.jsonl"), cache_dir=str(folder / f"peer{number}")
    )["train"]
    ids = data.map(tokenize, batched=True, num_proc=cores, remove_columns=data.column_names)
    rows = ids.map(group, batched=True, num_proc=cores)
    seconds = time.perf_counter() - started
    tokens = rows.num_rows * ROW_LENGTH
    shutil.rmtree(folder / f"peer{number}")
    return seconds, tokens


class Memory:
    """Samples the resident memory, less what is shared, of this process and its Ray workers."""

    def __enter__(self) -> "Memory":
        self._stop = threading.Event()
        self.peak_mib = 0.0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.peak_mib = max(self.peak_mib, self._now())

    def _now(self) -> float:
        total = 0
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            # Ray's own processes don't count, only what runs tasks.
            with contextlib.suppress(psutil.NoSuchProcess):
                if process == own or process.name().startswith("ray::"):
                    info = process.memory_info()
                    total += info.rss - info.shared
        return total / 2**20


def write_text(folder: Path, megabytes: float) -> None:
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for text in texts(megabytes):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def speed(folder: Path, megabytes: float, repeats: int) -> dict[str, float]:
    """Measure all three in turn, several times; the ratios are of the medians."""
    write_text(folder, megabytes)
    with_peer = importlib.util.find_spec("datasets") is not None
    rates: dict[str, list[float]] = {}
    peak = 0.0
    for number in range(repeats):
        found = {"limit": limit(folder)}
        seconds, tokens, mib = job(folder, number)
        found["job"], peak = (seconds, tokens), max(peak, mib)
        if with_peer:
            found["peer"] = peer(folder, number)
        for name, (took, count) in found.items():
            print(f"{name:>6}: {count:>11,} tokens in {took:7.2f} s = {count / took:>11,.0f}/s")
            rates.setdefault(name, []).append(count / took)
    figures: dict[str, float] = {}
    for name in rates.keys() - {"job"}:
        ratios = [own / other for own, other in zip(rates["job"], rates[name], strict=True)]
        figures |= {
            f"ratio_to_{name}": statistics.median(ratios),
            f"low_to_{name}": min(ratios),
            f"high_to_{name}": max(ratios),
        }
    figures = dict(sorted(figures.items(), key=lambda item: not item[0].startswith("ratio")))
    medians = {f"{name}_tokens_per_s": statistics.median(found) for name, found in rates.items()}
    return {**figures, **medians, "peak_mib": peak, "megabytes": megabytes}


def memory(folder: Path, sizes: list[float]) -> dict[str, float]:
    """Measure the job's peak memory for each size."""
    peaks = []
    for number, megabytes in enumerate(sizes):
        write_text(folder, megabytes)
        seconds, tokens, mib = job(folder, number)
        print(f"{megabytes:6.0f} MB: {tokens:>12,} tokens in {seconds:7.2f} s, peak {mib:6.0f} MiB")
        peaks.append(mib)
    found = {f"peak_mib_{size:g}": peak for size, peak in zip(sizes, peaks, strict=True)}
    return {"ratio_peak": peaks[-1] / peaks[0], **found}


def main() -> None:
    """Run what is asked for; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--memory", type=float, nargs="+", metavar="MB")
    parser.add_argument("--quick", action="store_true", help="2 MB, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.megabytes = 2.0
    folder = Path(tempfile.mkdtemp(prefix="rayrlhf-corpus-"))
    try:
        trained = train_tokenizer(texts(min(10.0, arguments.megabytes), seed=1), 32_000)
        save_tokenizer(trained, folder / "tokenizer", origin="benchmark")
        if arguments.memory:
            print(json.dumps(memory(folder, arguments.memory)))
        else:
            print(json.dumps(speed(folder, arguments.megabytes, arguments.repeats)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
