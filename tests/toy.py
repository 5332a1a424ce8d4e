"""A toy recipe that goes the whole road in about a minute: files, recipe, command."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from rayrlhf import lineage

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


def copy_without(run: Path, copy: Path, *stages: str) -> None:
    """Copy a run as if these stages had never begun."""
    shutil.copytree(run, copy)
    for stage in stages:
        shutil.rmtree(copy / Path(lineage.OUTPUTS[stage]).parts[0])
    for name in ("lineage.json", lineage.BEGUN):
        entries = lineage.read_json(copy / name)
        left = {stage: entry for stage, entry in entries.items() if stage not in stages}
        lineage.write_json(copy / name, left)


def check_results(run: Path, policy: str) -> None:
    """Check every key of results.json that the design names, and the range of its values."""
    found = json.loads((run / "evaluation" / "results.json").read_text())
    models = {"base", "sft", "dpo", policy}
    judges = {"vader", "reward"}
    for row in found["reward_model"].values():
        assert 0 <= row["pair_accuracy"] <= 1
        assert -1 <= row["pearson"] <= 1
        assert row["num_pairs"] > 0
    assert set(found["reward_model"]) == {"toy"}
    for key, low, high in (
        ("entropy_nats_per_token", 0.0, 6.0),
        ("distinct_2", 0.0, 1.0),
        ("kl_ref_per_response", -1.0, 100.0),
    ):
        assert set(found[key]) == models, key
        assert all(low <= value <= high for value in found[key].values()), (key, found[key])
    assert set(found["win_rate_vs_sft"]) == set(found["held_out_loss"]) == models
    for model in models:
        assert set(found["win_rate_vs_sft"][model]) == judges
        assert all(0 <= rate <= 1 for rate in found["win_rate_vs_sft"][model].values())
        assert set(found["held_out_loss"][model]) == {"toy"}
        assert 0 < found["held_out_loss"][model]["toy"] < 8
        rating = found["ratings"][model]
        assert rating["low"] <= rating["elo"] <= rating["high"]
    assert set(found["win_rate_vs_sft"]["sft"].values()) == {0.5}
    assert found["kl_ref_per_response"]["sft"] == 0.0


def write_pretrained_run(folder: Path, parameters: int, tokens: int, loss: float) -> Path:
    """Write what a finished pretraining leaves of a run; return its folder."""
    final = folder / "pretrain" / "final"
    final.mkdir(parents=True)
    save_file({"layer.weight": torch.zeros(parameters)}, final / "model.safetensors")
    lines: list[dict[str, Any]] = [
        {"step": 1, "time": 0, "tokens": tokens // 2, "eval/loss": 99.0},
        {"step": 2, "time": 1, "tokens": tokens // 2, "eval/loss": loss},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "pretrain" / "metrics.jsonl").write_text(text)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"pretrain": {"corpus": None}}))
    (folder / "corpus").mkdir()
    splits = {"train": {"shards": []}, "validation-web": {"shards": [{"rows": 3}]}}
    manifest = {"vocab_size": 9, "row_length": 4, "splits": splits}
    (folder / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    return folder
