"""A toy recipe that goes the whole road in about a minute: files, recipe, command."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

GOOD = ("good", "great", "fine", "happy", "lovely")
BAD = ("bad", "poor", "awful", "sad", "boring")
NOUNS = ("film", "movie", "book", "song", "day", "plot", "scene", "story")

PPO_METRICS = {
    "reward/score_mean",
    "reward/score_std",
    "kl/ref_per_response",
    "kl/coef",
    "kl/rollout_mismatch",
    "policy/loss",
    "policy/clip_fraction",
    "policy/approx_kl",
    "policy/entropy",
    "value/loss",
    "value/clip_fraction",
    "value/explained_variance",
    "rollout/response_length",
    "rollout/truncated_fraction",
    "rollout/tokens_per_s",
    "time/rollout_s",
    "time/evaluate_s",
    "time/update_s",
    "time/sync_s",
    "time/step_s",
    "weights/version",
}
"""What PPO logs at least, in every step."""


def sentence(rng: random.Random) -> tuple[str, str, int]:
    """Return (opening, rest, rating)."""
    good = rng.random() < 0.5
    first, second = rng.choices(GOOD if good else BAD, k=2)
    opening = f"The {rng.choice(NOUNS)}"
    return opening, f" is {first} and the {rng.choice(NOUNS)} is {second}.", 1 if good else -1


def write_records(folder: Path, *, seed: int = 0) -> None:
    """Write corpus, demonstrations, comparisons and prompts as JSONL files."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, records: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    for split, count in (("train", 600), ("test", 60)):
        texts = [sentence(rng) for _ in range(count)]
        write(f"corpus.{split}", [{"text": f"{o}{r} {i}"} for i, (o, r, _) in enumerate(texts)])
    write(
        "demonstrations",
        [{"prompt": o, "response": r} for o, r, rating in map(sentence, [rng] * 80) if rating > 0],
    )
    for split, count in (("train", 48), ("test", 12)):
        groups = [[sentence(rng) for _ in range(4)] for _ in range(count)]
        write(
            f"comparisons.{split}",
            [
                {
                    "prompt": "Review:",
                    "responses": [f" {o}{r}" for o, r, _ in group],
                    "ranks": [1 if rating > 0 else 2 for *_, rating in group],
                    "ratings": [float(rating) for *_, rating in group],
                    "source": "toy",
                }
                for group in groups
            ],
        )
    write(
        "prompts", [{"prompt": f"Review: {sentence(rng)[0]}", "source": "toy"} for _ in range(40)]
    )


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe over the records in `folder`, whose run is `folder`/run."""
    tree: dict[str, Any] = {
        "name": "toy",
        "run_dir": str(folder / "run"),
        "tokenizer": {"vocab_size": 320},
        "model": {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 2,
            "intermediate_size": 128,
            "max_length": 48,
        },
        "resources": {"cpus_per_worker": 0.5},
        "corpus": {
            "row_length": 48,
            "sources": {
                "toy": {
                    "path": str(folder / "corpus.train.jsonl"),
                    "validation": str(folder / "corpus.test.jsonl"),
                    "test": str(folder / "corpus.test.jsonl"),
                }
            },
        },
        "pretrain": {
            "batch_size": 8,
            "learning_rate": 3e-3,
            "max_steps": 24,
            "save_every": 5,
            "log_every": 10,
            "num_samples": 2,
            "sample_prompts": ["The film"],
        },
        "sft": {
            "train": str(folder / "demonstrations.jsonl"),
            "batch_size": 8,
            "epochs": 2,
            "learning_rate": 1e-3,
            "save_every": 5,
        },
        "reward": {
            "train": str(folder / "comparisons.train.jsonl"),
            "validation": str(folder / "comparisons.test.jsonl"),
            "batch_size": 4,
            "epochs": 2,
            "learning_rate": 3e-3,
            "save_every": 5,
        },
        "dpo": {
            "train": str(folder / "comparisons.train.jsonl"),
            "validation": str(folder / "comparisons.test.jsonl"),
            "batch_size": 4,
            "max_steps": 12,
            "learning_rate": 1e-3,
            "save_every": 5,
            "num_samples": 1,
        },
        "ppo": {
            "prompts": str(folder / "prompts.jsonl"),
            "steps": 6,
            "batch_size": 8,
            "max_response_tokens": 12,
            "num_minibatches": 2,
            "save_every": 2,
            "sample_every": 3,
            "ptx_coef": 0.1,
            "ptx_batch_size": 4,
            "actor": {"learning_rate": 1e-3},
            "critic": {"learning_rate": 1e-3},
        },
        "evaluate": {
            "prompts": str(folder / "prompts.jsonl"),
            "comparisons": str(folder / "comparisons.test.jsonl"),
            "num_prompts": 8,
            "max_response_tokens": 12,
            "num_samples": 3,
        },
    }
    return {**tree, **changes}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write records and recipe into `folder`; return the recipe's path."""
    write_records(folder)
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **changes)), encoding="utf-8")
    return path


def command(*args: str | Path) -> list[str]:
    """Return the command line of `rayrlhf` with these arguments."""
    return [sys.executable, "-m", "rayrlhf.cli", *map(str, args)]


def environment() -> dict[str, str]:
    """Return the environment of a command that starts a local Ray of its own."""
    return {**os.environ, "RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1"}


def run(*args: str | Path, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `rayrlhf` to its end, without a terminal."""
    return subprocess.run(
        command(*args),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
