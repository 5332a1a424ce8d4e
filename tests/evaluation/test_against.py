"""Differences of two runs: the interval by hand, the page, what is missing."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rayrlhf import cli
from rayrlhf.config import RecipeError
from rayrlhf.evaluation.against import Measured, compare_runs, difference, differences

Results = dict[str, Any]


def write(folder: Path, results: Results) -> Path:
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
    return folder


def test_interval_of_a_difference_by_hand() -> None:
    # Down: 0.3 of this run's low side, 0.4 of the other's high side; up: 0.6 and 0.8.
    found = difference(Measured(2.0, (1.7, 2.6)), Measured(1.0, (0.2, 1.4)))
    assert found.value == 1.0
    assert found.bounds == pytest.approx((0.5, 2.0))
    assert found.is_clear
    # Equal and symmetric intervals are sqrt(2) as wide.
    same = difference(Measured(0.5, (0.4, 0.6)), Measured(0.5, (0.4, 0.6)))
    assert same.bounds == pytest.approx((-0.1 * 2**0.5, 0.1 * 2**0.5)) and not same.is_clear
    assert difference(Measured(2.0), Measured(1.0, (0.0, 2.0))).bounds is None


def test_only_what_both_runs_have_is_compared(results: Results) -> None:
    other = copy.deepcopy(results)
    other["win_rate_vs_sft"]["ppo"]["vader"] = 0.5
    del other["variety"], other["win_rate_vs_sft"]["dpo"]
    found = differences(results, other)
    change = found["win rate against SFT, VADER", "ppo"]
    assert change.value == pytest.approx(0.2) and change.bounds is not None
    assert found["held-out loss, movies", "ppo"].value == 0.0
    assert found["reward model's pair accuracy", "movies"].bounds is None
    assert not any(of == "dpo" and name.startswith("win rate") for name, of in found)
    assert not any("distinct" in name for name, _ in found)
    assert ("different answers", "ppo") in differences(results, results)


def test_page_is_one_file_with_a_table(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = write(tmp_path / "here", {**results, "name": "<new>"})
    there = write(tmp_path / "there", results)
    page = compare_runs(here, there)
    assert page == here / "evaluation" / "against-there.html"
    text = page.read_text(encoding="utf-8")
    assert "<h1>&lt;new&gt; against toy</h1>" in text and "<caption>" in text
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert "different answers" in capsys.readouterr().out


def test_a_run_without_results_is_named(results: Results, tmp_path: Path) -> None:
    here = write(tmp_path / "here", results)
    with pytest.raises(RecipeError, match="nowhere: no evaluation/results.json there"):
        compare_runs(here, tmp_path / "nowhere")


def test_other_commands_compare_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        f"name: toy\nrun_dir: {tmp_path / 'run'}\nmodel: {{path: m}}\ntokenizer: {{path: m}}\n"
    )
    assert cli.main(["pipeline", str(recipe), "--against", "other"]) == 2
    assert "use it with `rayrlhf evaluate`" in capsys.readouterr().err
