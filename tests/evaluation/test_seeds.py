"""Runs over several seeds: the interval by hand, pairs, the page, what is refused."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rayrlhf import cli
from rayrlhf.config import RecipeError
from rayrlhf.evaluation.seeds import (
    OverSeeds,
    differences,
    over_seeds,
    report_seeds,
    t_quantile,
)

Results = dict[str, Any]


@pytest.fixture
def runs(results: Results) -> list[Results]:
    """Three seeds with PPO, and the same three with PPO-ptx in its place."""
    found = []
    for seed in range(3):
        ppo = copy.deepcopy(results)
        ppo["seed"] = seed
        ppo["win_rate_vs_sft"]["ppo"]["vader"] = 0.7 + 0.01 * seed
        ppo["alignment_tax"]["ppo"] = {"movies": 0.2 + 0.1 * seed, "tweets": 0.4 + 0.1 * seed}
        found += [ppo, _with_ptx(ppo)]
    return found


def _with_ptx(results: Results) -> Results:
    """Rename PPO, and let it cost 0.1 less of the held-out loss."""
    renamed: Results = json.loads(json.dumps(results).replace('"ppo":', '"ppo_ptx":'))
    renamed["overoptimisation"]["ppo"] = renamed["overoptimisation"].pop("ppo_ptx")
    rises = renamed["alignment_tax"]["ppo_ptx"]
    renamed["alignment_tax"]["ppo_ptx"] = {source: rise - 0.1 for source, rise in rises.items()}
    return renamed


def write(folder: Path, runs: list[Results]) -> list[Path]:
    paths = []
    for number, results in enumerate(runs):
        paths.append(folder / f"run-{number}")
        (paths[-1] / "evaluation").mkdir(parents=True)
        (paths[-1] / "evaluation" / "results.json").write_text(json.dumps(results))
    return paths


@pytest.mark.parametrize("freedom", [1, 2, 5, 10, 11, 20, 60, 1000])
def test_quantiles_of_t_leave_five_percent_outside(freedom: int) -> None:
    """By the density itself, integrated from -q to q."""
    norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = math.exp(norm) / math.sqrt(freedom * math.pi)
    q, num = t_quantile(freedom), 20_000
    width = 2 * q / num
    inside = sum(
        scale * (1 + (-q + (i + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) * width
        for i in range(num)
    )
    assert inside == pytest.approx(0.95, abs=1e-4)


def test_mean_and_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, t with 2 degrees of freedom 4.303: half of it is 2.484.
    found = OverSeeds.of({0: 1.0, 1: 2.0, 5: 3.0})
    assert found.mean == 2.0
    assert found.bounds == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert not found.is_clear
    assert OverSeeds.of({0: 1.0, 1: 1.01, 2: 0.99}).is_clear
    assert OverSeeds.of({3: 1.0}).bounds is None


def test_models_are_counted_once_per_seed_and_compared_within_it(runs: list[Results]) -> None:
    found = over_seeds(runs)
    wins = "win rate against SFT, VADER"
    assert found[wins, "base"].by_seed == {0: 0.4, 1: 0.4, 2: 0.4}
    assert found[wins, "ppo"].mean == pytest.approx(0.71)
    assert (wins, "base_few_shot") in found and ("gold reward at the end, SDs of the reference",
                                                 "best of n") in found  # fmt: skip
    rise = "rise of the held-out loss over the base model's, mean of sources"
    assert found[rise, "ppo"].by_seed == pytest.approx({0: 0.3, 1: 0.4, 2: 0.5})
    paired = differences(runs)
    # The seeds differ by far more than the models; the difference within a seed does not.
    less = paired[rise, "PPO-ptx less PPO"]
    assert less.mean == pytest.approx(-0.1) and less.is_clear
    assert ("entropy, nats", "SFT less Base") in paired


def test_page_is_one_file_with_figures_and_every_seed(
    runs: list[Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs[0]["name"] = "<toy>"
    first, *others = write(tmp_path, runs)
    page = report_seeds(first, others)
    text = page.read_text(encoding="utf-8")
    assert "<h1>&lt;toy&gt; over 3 seeds</h1>" in text and '<th scope="col">seed 2</th>' in text
    assert text.count("<figure") == 2 and "PPO-ptx less PPO" in text
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert "PPO-ptx" in capsys.readouterr().out
    saved = json.loads((first / "evaluation" / "seeds.json").read_text())
    assert len(saved["runs"]) == 6
    assert all(row["low"] is None or row["low"] <= row["mean"] for row in saved["rows"])
    for name in ("win_rate_seeds", "overoptimisation_seeds"):
        assert (first / "evaluation" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda runs: runs[:1] * 2, "2 of the runs have seed 0 and end with ppo"),
        (lambda runs: [runs[0], {**runs[2], "reference": "base"}], "some of the runs have SFT"),
    ],
)
def test_runs_that_say_nothing_over_seeds_are_refused(
    runs: list[Results], tmp_path: Path, change: Any, says: str
) -> None:
    first, *others = write(tmp_path, change(runs))
    with pytest.raises(RecipeError, match=says):
        report_seeds(first, others)


def test_a_run_without_results_is_named(runs: list[Results], tmp_path: Path) -> None:
    (first,) = write(tmp_path, runs[:1])
    with pytest.raises(RecipeError, match="nowhere: no evaluation/results.json there"):
        report_seeds(first, [tmp_path / "nowhere"])


def test_other_commands_have_no_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("name: toy\nmodel: {path: m}\ntokenizer: {path: m}\n")
    assert cli.main(["pipeline", str(recipe), "--seeds", "other"]) == 2
    assert "use it with `rayrlhf evaluate`" in capsys.readouterr().err
