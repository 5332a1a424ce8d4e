"""Lengths from files and from a run."""

import json
from pathlib import Path

import pytest

from rayrlhf.config import Recipe, load
from rayrlhf.planning import lengths

ROOT = Path(__file__).parents[2]


def recipe(folder: Path, *overrides: str) -> Recipe:
    words = [f"run_dir={folder}", f"ppo.prompts={folder}/prompts.jsonl", *overrides]
    return load(ROOT / "configs" / "quickstart.yaml", words)


def test_without_files_and_run_half_is_assumed(tmp_path: Path) -> None:
    found = lengths.of_ppo(recipe(tmp_path), 4096)
    assert (found.prompt, found.response, found.longest_response) == (48, 16, 32)
    assert "prompts taken as half of their room" in found.source
    assert "responses taken as half" in found.source


def test_prompts_by_their_characters_and_responses_by_the_run(tmp_path: Path) -> None:
    prompts = [{"prompt": "a" * 37}, {"messages": [{"role": "user", "content": "b" * 74}]}]
    prompts.append({"prompt": "c" * 4000})  # leaves no room for a response: PPO drops it, too
    text = "".join(json.dumps(record) + "\n" for record in prompts)
    (tmp_path / "prompts.jsonl").write_text(text)
    (tmp_path / "ppo").mkdir()
    steps = [{"step": step, "rollout/response_length": 10.0 + step} for step in (1, 2, 3)]
    lines = [json.dumps(each) for each in steps] + ['{"step": 4, "roll']
    (tmp_path / "ppo" / "metrics.jsonl").write_text("\n".join(lines))
    found = lengths.of_ppo(recipe(tmp_path), 4096)
    assert found.prompt == pytest.approx((11 + 21) / 2)
    assert found.response == 12
    assert found.source == "prompts by their characters; responses as in this run's metrics"


def test_records_of_other_stages(tmp_path: Path) -> None:
    file = tmp_path / "comparisons.jsonl"
    record = {"prompt": "p" * 37, "responses": ["r" * 37, "s" * 111, "t" * 74], "ranks": [1, 2, 3]}
    file.write_text(json.dumps(record) + "\n")
    mean, count, _ = lengths.of_records(recipe(tmp_path), str(file), 4096)
    assert (mean, count) == (pytest.approx(31), 1)
    assert lengths.responses_per_comparison(str(file)) == 3
    pair = tmp_path / "pairs.jsonl"
    pair.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    assert lengths.responses_per_comparison(str(pair)) == 2
    mean, count, source = lengths.of_records(recipe(tmp_path), "s3://bucket/x.parquet", 4096)
    assert (mean, count, source) == (64, None, "taken as half of model.max_length")
    assert lengths.responses_per_comparison("s3://bucket/x.parquet") == 4
