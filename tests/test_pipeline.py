"""What is checked before any stage runs: models, tokenizer, reward model; and what is printed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rayrlhf import cli, config, lineage, pipeline
from rayrlhf.config import Recipe, RecipeError


def recipe_of(folder: Path, model: str | Path, **changes: Any) -> Recipe:
    (folder / "demos.jsonl").write_text('{"prompt": "A", "response": " film."}\n')
    return config.parse(
        {
            "name": "toy",
            "run_dir": str(folder / "run"),
            "model": {"path": str(model)},
            "sft": {"train": str(folder / "demos.jsonl")},
            **changes,
        }
    )


def larger_tokenizer(tiny_tokenizer: Path, folder: Path) -> Path:
    """Write the tiny tokenizer with one token more than the tiny model has rows."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_hub_name_is_a_model(tmp_path: Path, hub_model: str) -> None:
    pipeline.check_models(recipe_of(tmp_path, hub_model))
    with pytest.raises(RecipeError, match=r"model\.path: acme/none: "):
        pipeline.check_models(recipe_of(tmp_path, "acme/none", tokenizer={"path": hub_model}))


def test_a_model_without_weights_is_named(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"model\.path: .*/model: no \*\.safetensors there"):
        pipeline.check_models(recipe_of(tmp_path, tmp_path / "model"))


def test_the_model_that_a_stage_starts_from_is_checked(tmp_path: Path, tiny_model: Path) -> None:
    sft = {"train": "x", "init": str(tmp_path / "elsewhere")}
    with pytest.raises(RecipeError, match=r"sft\.init: .*/elsewhere: "):
        pipeline.check_models(recipe_of(tmp_path, tiny_model, sft=sft))
    here = {"train": "x", "init": str(tmp_path / "run" / "pretrain" / "final")}
    pipeline.check_models(recipe_of(tmp_path, tiny_model, sft=here))


def test_a_tokenizer_that_does_not_fit_ends_before_any_stage(
    tmp_path: Path,
    tiny_model: Path,
    tiny_tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    larger = larger_tokenizer(tiny_tokenizer, tmp_path / "larger")
    recipe = recipe_of(tmp_path, tiny_model)
    file = tmp_path / "toy.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    assert cli.main(["pipeline", str(file), f"tokenizer.path={larger}"]) == 2
    said = capsys.readouterr().err
    assert "ids up to 300, but the model has only 300 rows" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run" / "sft").exists()


PPO: dict[str, Any] = {"ppo": {"prompts": "prompts.jsonl"}}


def test_ppo_without_a_reward_model_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    recipe = recipe_of(tmp_path, tiny_model, **PPO)
    says = r"reward/final, but the recipe has no reward section.*add reward"
    with pytest.raises(RecipeError, match=says):
        pipeline.prepare(recipe)
    with pytest.raises(RecipeError, match=says), pipeline.tracked(recipe, "ppo"):
        pass
    assert not (recipe.path / "ppo").exists()


def test_a_reward_model_that_is_there_serves_and_is_an_input(
    tmp_path: Path, tiny_model: Path
) -> None:
    recipe = recipe_of(tmp_path, tiny_model, **PPO)
    judge = recipe.path / "reward" / "final"
    shutil.copytree(tiny_model, judge)
    pipeline.require_reward_model(recipe)
    (recipe.path / "sft" / "final").mkdir(parents=True)
    assert run(recipe, "ppo")
    assert not run(recipe, "ppo")
    (judge / "config.json").write_text("{}")
    assert run(recipe, "ppo")


def run(recipe: Recipe, stage: str) -> bool:
    """Run a stage that writes an empty output; return whether it had to run."""
    with pipeline.tracked(recipe, stage) as needed:
        if needed:
            (recipe.path / lineage.OUTPUTS[stage]).mkdir(parents=True)
    return needed


def test_a_gold_reward_model_from_elsewhere_is_an_input_of_the_evaluation(
    tmp_path: Path, tiny_model: Path
) -> None:
    gold = tmp_path / "gold"
    shutil.copytree(tiny_model, gold)
    evaluate = {
        "prompts": PPO["ppo"]["prompts"],
        "comparisons": "builtin:human-ratings/comparisons.validation.jsonl",
        "overoptimisation": {"gold": str(gold)},
    }
    reward = {"train": "builtin:human-ratings/comparisons.validation.jsonl"}
    recipe = recipe_of(tmp_path, tiny_model, reward=reward, evaluate=evaluate)
    before = pipeline._inputs(recipe, "evaluate")
    assert pipeline._inputs(recipe, "evaluate") == before
    (gold / "config.json").write_text("{}")
    changed = pipeline._inputs(recipe, "evaluate")
    key = "evaluate.overoptimisation.gold"
    assert {name for name in before if changed[name] != before[name]} == {key}


def test_the_numbers_that_follow_from_ppos_knobs_are_printed(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo = {"prompts": "x", "steps": 7, "batch_size": 8, "samples_per_prompt": 3, "epochs": 2}
    recipe = recipe_of(
        tmp_path,
        tiny_model,
        ppo={**ppo, "num_minibatches": 4},
        reward={"train": "x"},
        resources={"actor": {"num_workers": 2}},
    )
    for folder in ("sft", "reward"):
        (recipe.path / folder / "final").mkdir(parents=True)
    run(recipe, "ppo")
    assert (
        "      ppo 7 steps of 24 responses (8 prompts x 3), 8 updates a step on 6 responses each, "
        "3 per rank on 2\n"
    ) in capsys.readouterr().out
