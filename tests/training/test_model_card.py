"""Every final folder says what it is, where it comes from and how to load it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rayrlhf import lineage
from rayrlhf.config import Recipe
from rayrlhf.metrics import read_jsonl
from rayrlhf.training.checkpoint import is_complete
from rayrlhf.training.model_card import read_front, write_card
from rayrlhf.training.pretrain import PretrainStage
from rayrlhf.training.reward import RewardStage
from rayrlhf.training.sft import SFTStage
from rayrlhf.training.stage import Stage
from tests.training.ranks import Run, run_on_ranks

MakeRecipe = Callable[..., Recipe]


def cards(tmp_path: Path, runs: list[Run]) -> list[str]:
    run_on_ranks(runs, 1, tmp_path)
    return [(run.recipe.path / run.kind.name / "final" / "README.md").read_text() for run in runs]


@pytest.mark.parametrize(
    ("kind", "pipeline", "class_name"),
    [
        (PretrainStage, "text-generation", "LlamaForCausalLM"),
        (SFTStage, "text-generation", "LlamaForCausalLM"),
        (RewardStage, "text-classification", "LlamaForSequenceClassification"),
    ],
)
def test_the_card_of_a_stage(
    make_recipe: MakeRecipe, tmp_path: Path, kind: type[Stage], pipeline: str, class_name: str
) -> None:
    recipe = make_recipe()
    lineage.write_json(recipe.path / "begun.json", {kind.name: {f"{kind.name}.train": "abc123"}})
    (card,) = cards(tmp_path, [Run(recipe, kind)])
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", pipeline)
    assert data.tags == ["rayrlhf", kind.name]
    lines = read_jsonl(recipe.path / kind.name / "metrics.jsonl")
    if kind is RewardStage:  # the best step is kept
        judged = [line for line in lines if "eval/pair_accuracy" in line]
        kept = max(judged, key=lambda line: line["eval/pair_accuracy"])["step"]
        lines = [line for line in lines if line["step"] <= kept]
    assert f"| steps | {len(lines)} |" in card
    assert f"| tokens | {sum(line['tokens'] for line in lines):.0f} |" in card
    assert f"| eval/loss | {lines[-1]['eval/loss']:.4g} |" in card
    assert f"| loss | {lines[-1]['loss']:.4g} |" in card
    path = "" if kind is PretrainStage else recipe.model_dump()[kind.name]["train"]
    assert f"| {kind.name}.train | {path} | abc123 |" in card
    assert f"| torch | {lineage.versions()['torch']} |" in card
    if kind is PretrainStage:
        assert "from random weights" in card
    else:
        assert f"`{lineage.start_model(recipe, kind.name)}`" in card
    found = re.search(r"```python\n(.*?)```", card, re.S)
    assert found is not None and len(found[1].strip().splitlines()) == 3
    names: dict[str, Any] = {}
    exec(found[1], names)
    assert type(names["model"]).__name__ == class_name


def test_the_card_of_the_best_step(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Training goes on after the step that is kept; its metrics are not the model's."""
    lines = [{"step": step, "loss": step / 8, "tokens": 10, "time": 0.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    folder = tmp_path / ".final.writing"
    folder.mkdir()
    write_card(make_recipe(), "sft", folder, best_step=2)
    card = (folder / "README.md").read_text()
    assert "| steps | 2 |\n| tokens | 20 |\n| loss | 0.25 |" in card
    assert f'from_pretrained("{tmp_path}/final")' in card


def test_base_model_and_license_go_from_stage_to_stage(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe()
    base = recipe.path / "pretrain" / "final"
    front = "---\nlicense: mit\nbase_model: acme/base\ntags: [x]\n---\n# Base\n"
    (base / "README.md").write_text(front)
    sft, reward = cards(tmp_path, [Run(recipe, SFTStage), Run(recipe, RewardStage)])
    for card in (sft, reward):
        assert read_front(card)["base_model"] == "acme/base"
        assert read_front(card)["license"] == "mit"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("acme/tiny", {"base_model": "acme/tiny"}),
        (
            "builtin:smollm2-135m-instruct",
            {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"},
        ),
    ],
)
def test_a_base_model_by_its_name(
    make_recipe: MakeRecipe, tmp_path: Path, start: str, expected: dict[str, str]
) -> None:
    write_card(make_recipe(sft={"init": start}), "sft", tmp_path)
    found = read_front((tmp_path / "README.md").read_text())
    assert {key: found.get(key) for key in expected} == expected
    assert read_front("# no front matter\n---\n") == {}


def test_the_card_is_no_part_of_the_model(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A second run takes other seconds, and later stages need not run again for it."""
    whole, killed = make_recipe("whole"), make_recipe("killed")
    first, second = cards(tmp_path, [Run(whole, SFTStage), Run(killed, SFTStage, 5)])
    clock = re.compile(r"\| seconds \| \d+ \|")
    assert clock.sub("", first) == clock.sub("", second).replace(str(killed.path), str(whole.path))
    finals = [recipe.path / "sft" / "final" for recipe in (whole, killed)]
    (finals[1] / "README.md").write_text("Other words.")
    assert is_complete(finals[1])
    assert lineage.hash_path(finals[0]) == lineage.hash_path(finals[1])
