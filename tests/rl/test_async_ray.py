"""Rollouts ahead of the learner, as the user runs them: Ray and vLLM."""

from pathlib import Path
from typing import Any

import pytest

from rayrlhf.metrics import read_jsonl
from tests.rl.inline import engine_model
from tests.rl.test_ppo_ray import finish, make_run, start


@pytest.mark.ray
@pytest.mark.slow
def test_ahead_and_interrupted(tmp_path: Path, tiny_model: Path) -> None:
    model = engine_model(tmp_path / "model", tiny_model)
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "ahead": ({"max_staleness": 1}, {"rollout": {"num_workers": 2}}),
        "interrupted": (
            {"max_staleness": 1, "stale": "drop", "interrupt": True, "max_response_tokens": 48}
            | {"steps": 6, "num_minibatches": 1},
            {},
        ),
    }
    recipes = []
    for name, (ppo, resources) in ways.items():
        recipe = make_run(tmp_path / name, model)
        recipe["ppo"] |= {"steps": 3, "save_every": 100, **ppo}
        recipe["resources"] = resources
        recipes.append(recipe)
    log = tmp_path / "log"
    finish(start(log, *recipes), log)
    rows = {name: read_jsonl(tmp_path / name / "ppo" / "metrics.jsonl") for name in ways}

    assert [row["rollout/staleness_max"] for row in rows["ahead"]] == [0, 1, 1]
    assert [row["kl/rollout_mismatch"] is None for row in rows["ahead"]] == [False, True, True]
    for row in rows["ahead"] + rows["interrupted"]:
        assert row["policy/first_ratio"] == 1
        assert row["rollout/staleness_max"] <= 1
        assert 0.5 < row["importance/weight_mean"] < 2
    assert [row["weights/version"] for row in rows["interrupted"]] == list(range(1, 7))
    assert any(row["rollout/interrupted_fraction"] > 0 for row in rows["interrupted"])
