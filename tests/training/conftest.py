"""A tiny run directory: tokenizer, packed corpus, demonstrations and comparisons."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from rayrlhf.config import Recipe, parse
from rayrlhf.data.rows import write_shard

ROW_LENGTH = 16


def write_corpus(corpus: Path, tokenizer: Path, **splits: np.ndarray) -> None:
    """Write a corpus with one shard per split; `_` in a name stands for `-`."""
    corpus.mkdir(parents=True, exist_ok=True)
    core = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    shards = {
        (split := name.replace("_", "-")): {
            "shards": [write_shard(corpus / f"{split}-00000.arrow", rows)]
        }
        for name, rows in splits.items()
    }
    manifest = {
        "row_length": ROW_LENGTH,
        "vocab_size": core.get_vocab_size(),
        "eos_id": core.token_to_id("<|endoftext|>"),
        "splits": shards,
    }
    (corpus / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    """Write records and return the path as text."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_tokenizer: Path, tiny_model: Path) -> Callable[..., Recipe]:
    """Return a function: overrides of sections, name of the run -> Recipe with all its data."""
    words = ["good", "bad", "a film", "so happy", "the law", "long", "works", "today"]
    demonstrations = [
        {"prompt": "A", "response": f" {words[i % 8]} {words[i % 5]}"} for i in range(13)
    ]
    comparisons: list[dict[str, Any]] = [
        {
            "prompt": "A",
            "responses": [f" {words[(i + k) % 8]}" for k in range(2 + i % 4)],
            "ranks": [1 + k // 2 if i % 3 else k + 1 for k in range(2 + i % 4)],
        }
        for i in range(11)
        if i % 4 or not i % 3
    ]

    for i, record in enumerate(comparisons):
        # Seven people, of whom most agree with the ranks; every third record has their means.
        record["single_ratings"] = [
            [4 - rank + (i + 2 * k + person) % 3 for person in range(7)]
            for k, rank in enumerate(record["ranks"])
        ]
        if i % 3 == 0:
            record["ratings"] = [sum(one) / 7 for one in record["single_ratings"]]

    def make(
        run: str = "run", resources: Mapping[str, Any] | None = None, **sections: Mapping[str, Any]
    ) -> Recipe:
        folder = tmp_path / run
        if not folder.exists():
            folder.mkdir()
            shutil.copytree(tiny_tokenizer, folder / "tokenizer")
            rng = np.random.default_rng(0)
            rows = rng.integers(2, 40, (19, ROW_LENGTH))
            write_corpus(folder / "corpus", tiny_tokenizer, train=rows, validation_books=rows[:5])
            for stage in ("pretrain", "sft"):
                shutil.copytree(tiny_model, folder / stage / "final")
        data = {
            "sft": write_jsonl(tmp_path / "demonstrations.jsonl", demonstrations),
            "reward": write_jsonl(tmp_path / "comparisons.jsonl", comparisons),
        }
        defaults: dict[str, dict[str, Any]] = {
            "pretrain": {"sample_prompts": ["A"], "num_samples": 2},
            "sft": {"train": data["sft"], "validation": data["sft"]},
            "reward": {"train": data["reward"], "validation": data["reward"]},
            "dpo": {"train": data["reward"], "validation": data["reward"]},
        }
        common = {
            "batch_size": 4,
            "epochs": 10,
            "max_steps": 6,
            "save_every": 2,
            "eval_every": 3,
            "learning_rate": 1e-2,
            "tokens_per_microbatch": 40,
        }
        return parse(
            {
                "name": "tiny",
                "run_dir": str(folder),
                "resources": dict(resources or {}),
                "model": {
                    "hidden_size": 16,
                    "num_layers": 1,
                    "num_heads": 2,
                    "num_kv_heads": 2,
                    "intermediate_size": 32,
                    "max_length": 32,
                    **sections.get("model", {}),
                },
                "corpus": {
                    "row_length": ROW_LENGTH,
                    "sources": {"books": {"path": "x.jsonl", "validation": "y.jsonl"}},
                },
                **{
                    name: {**common, **section, **sections.get(name, {})}
                    for name, section in defaults.items()
                },
            }
        )

    return make
