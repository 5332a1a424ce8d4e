"""`rayrlhf pipeline` with rounds at toy size: killed in the middle, and what comes out."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.metrics import read_jsonl
from tests import toy

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def write(folder: Path) -> Path:
    """Write a recipe with as little as the rounds need before them."""
    tree: dict[str, Any] = toy.recipe(folder)
    small = {"steps": 3, "ptx_coef": 0.0, "save_every": 1, "batch_size": 8}
    return toy.write_recipe(
        folder,
        dpo=None,
        ppo={**tree["ppo"], **small},
        reward={**tree["reward"], "epochs": 1, "save_every": 2},
        rounds={"num_rounds": 2, "judge": "vader", "num_prompts": 24, "num_responses": 4},
    )


def test_two_rounds_killed_and_resumed(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    run = tmp_path / "run"
    log = (tmp_path / "killed.log").open("w")
    process = subprocess.Popen(
        toy.command("pipeline", recipe),
        env=toy.environment(),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while len(read_jsonl(run / "rounds/01/ppo/metrics.jsonl")) < 2:
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    samples = (run / "rounds/01/samples.jsonl").read_bytes()
    begun = (run / "rounds/01/reward/final/model.safetensors").stat().st_mtime_ns

    done = toy.run("pipeline", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "rounds/01/samples.jsonl").read_bytes() == samples
    assert (run / "rounds/01/reward/final/model.safetensors").stat().st_mtime_ns == begun
    for stage in ("reward", "ppo"):
        steps = [row["step"] for row in read_jsonl(run / f"rounds/01/{stage}/metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1))
    first = read_jsonl(run / "rounds/02/ppo/metrics.jsonl")[0]
    assert first["kl/ref_per_response"] != 0  # it goes on from round 1, the reference does not

    rounds = json.loads((run / "rounds/rounds.json").read_text())
    assert rounds["judge"] == "vader"
    sizes = [row["num_comparisons"] for row in rounds["rounds"]]
    assert sizes == [
        48 + rounds["rounds"][0]["num_new"],
        48 + sum(row["num_new"] for row in rounds["rounds"]),
    ]
    results = json.loads((run / "evaluation/results.json").read_text())
    assert results["rounds"] == rounds
    assert results["battles"]["models"][-2:] == ["round-1", "round-2"]
    for found in results["battles"]["judges"].values():
        gains = found["rating_gains"]
        assert {name: gain["over"] for name, gain in gains.items()} == {
            "round-1": "ppo",
            "round-2": "round-1",
        }
        rated = found["ratings"]
        for name, gain in gains.items():
            assert gain["low"] <= gain["elo"] <= gain["high"]
            assert gain["elo"] == pytest.approx(rated[name]["elo"] - rated[gain["over"]]["elo"])
    page = (run / "report.html").read_text()
    assert "Rounds of feedback" in page and "round 2" in page

    again = toy.run("pipeline", recipe)
    assert again.stdout.count("unchanged, nothing to do") == 7, again.stdout + again.stderr
