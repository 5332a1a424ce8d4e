"""Early stopping: what is the best, when it ends, what is kept, and all of it after a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayrlhf.config import Recipe, RecipeError
from rayrlhf.metrics import read_jsonl
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.training import loop
from rayrlhf.training.best import Best, Selection
from rayrlhf.training.reward import RewardStage
from rayrlhf.training.sft import SFTStage
from tests.training.conftest import write_jsonl
from tests.training.ranks import Run, run_on_ranks

MakeRecipe = Callable[..., Recipe]
ACCURACIES = (0.5, 0.7, 0.6, 0.7, 0.65, 0.9)
SHARDED: dict[str, dict[str, Any]] = {
    "zero2": {"backend": "deepspeed", "zero_stage": 2},
    "zero3": {"backend": "deepspeed", "zero_stage": 3},
    "fsdp": {"backend": "fsdp"},
}
SECTION = {"eval_every": 1, "max_steps": 6, "save_every": 3, "keep_checkpoints": 1}


def scripted(monkeypatch: pytest.MonkeyPatch, name: str, values: tuple[float, ...]) -> None:
    """Let the evaluation after step n say values[n - 1]."""

    def evaluate(stage: Any, backend: Any) -> dict[str, float]:
        del stage
        return {name: values[backend.num_steps - 1]}

    monkeypatch.setattr(RewardStage, "evaluate", evaluate)
    monkeypatch.setattr(SFTStage, "evaluate", evaluate)


def test_patience_by_hand(tmp_path: Path) -> None:
    best = Best(Selection("a", higher_is_better=True), patience=2)
    seen = []
    for step, value in enumerate((0.5, float("nan"), 0.6, 0.6), 1):
        seen.append((best.observe(step, {"a": value}), best.waited, best.is_over))
    assert seen == [(True, 0, False), (False, 1, False), (True, 0, False), (False, 1, False)]
    best.save(tmp_path)
    again = Best(best.selection, patience=2)
    again.load(tmp_path)
    assert not again.observe(5, {"loss": 9.0}) and not again.is_over  # no evaluation
    assert not again.observe(6, {"a": 0.1}) and again.is_over
    assert (again.step, again.value) == (3, 0.6)
    lower = Best(Selection("b", higher_is_better=False), patience=1)
    assert [lower.observe(i, {"b": v}) for i, v in enumerate((2.0, 1.0, 1.5))] == [1, 1, 0]


@pytest.mark.parametrize("killed_after", [None, 1, 2, 3, 4])
def test_it_stops_keeps_the_best_and_resumes_alike(
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    killed_after: int | None,
) -> None:
    """0.7 at step 2; steps 3, 4 and 5 are no better: patience 3 ends before 0.9 is reached."""
    scripted(monkeypatch, "eval/pair_accuracy", ACCURACIES)
    recipe = make_recipe(reward=SECTION)
    run_on_ranks([Run(recipe, RewardStage, killed_after)], 1, tmp_path)
    stage = RewardStage(recipe)
    assert [r["step"] for r in read_jsonl(stage.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    # One newest is kept, and the best.
    kept = sorted(p.name for p in (stage.folder / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000003"]
    plain = make_recipe("plain", reward={**SECTION, "early_stopping": None})
    run_on_ranks([Run(plain, RewardStage)], 1, tmp_path)
    weights = load_file(stage.folder / "final" / "model.safetensors")
    best = load_file(stage.folder / "checkpoints" / "step-00000002" / "model.safetensors")
    last = load_file(plain.path / "reward" / "final" / "model.safetensors")
    assert all(torch.equal(weights[name], best[name]) for name in best)
    assert any(not torch.equal(weights[name], last[name]) for name in last)
    # Calibration is that of the weights that were kept.
    assert ScalarHeadModel.from_pretrained(stage.folder / "final").shift != 0.0
    whole = read_jsonl(plain.path / "reward" / "metrics.jsonl")
    assert [r["loss"] for r in read_jsonl(stage.folder / "metrics.jsonl")] == [
        r["loss"] for r in whole[:5]
    ]


def test_the_last_step_may_be_the_best(
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted(monkeypatch, "eval/loss", (3.0, 2.5, 2.6, 2.0))
    section = {**SECTION, "max_steps": 4, "early_stopping": {"patience": 2}}
    recipe = make_recipe(sft=section)
    run_on_ranks([Run(recipe, SFTStage)], 1, tmp_path)
    assert len(read_jsonl(recipe.path / "sft" / "metrics.jsonl")) == 4
    loop._say_what_was_best(SFTStage(recipe), recipe.path / "sft")
    assert capsys.readouterr().out == ""
    scripted(monkeypatch, "eval/loss", (3.0, 2.5, 2.6, 2.7))
    run_on_ranks([Run(recipe, SFTStage)], 1, tmp_path)
    loop._say_what_was_best(SFTStage(recipe), recipe.path / "sft")
    assert "step 2, with the best eval/loss, 2.5; training ended at step 4" in (
        capsys.readouterr().out
    )


def test_without_evaluations_nothing_stops(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(reward={"eval_every": None})
    run_on_ranks([Run(recipe, RewardStage)], 1, tmp_path)
    kept = (recipe.path / "reward" / "checkpoints").rglob("best.json")
    assert not list(kept)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"sft": {"early_stopping": {}, "eval_every": None}}, "eval_every is empty"),
        ({"sft": {"early_stopping": {}, "validation": None}}, "validation is empty"),
        (
            {"reward": {"early_stopping": {"patience": 5}, "validation": None}},
            "validation is empty",
        ),
    ],
)
def test_what_it_needs_is_said(make_recipe: MakeRecipe, section: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make_recipe(**section)


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, Any]:
    """Return a section of `reward` with validation data that is not the training data."""
    held_out = [
        {"prompt": "A", "responses": [" good", " bad", " long", " today"], "ranks": [1, 3, 4, 2]},
        {"prompt": "A", "responses": [" so happy", " works", " the law"], "ranks": [3, 1, 2]},
    ]
    return {
        "validation": write_jsonl(tmp_path / "held_out.jsonl", held_out),
        "eval_every": 1,
        "max_steps": 12,
        "early_stopping": {"patience": 2},
        "adam_eps": 1e-4,  # gradients of a pair cancel where its responses agree
    }


def same_end(one: Path, other: Path) -> int:
    """Check that two runs of early stopping went alike; return the best step."""
    folders = (one, other)
    curves = [
        [line["eval/pair_accuracy"] for line in read_jsonl(folder / "metrics.jsonl")]
        for folder in folders
    ]
    assert curves[0] == curves[1]
    best = 1 + curves[0].index(max(curves[0]))
    assert best + 2 == len(curves[0]) < 12
    finals = [load_file(folder / "final" / "model.safetensors") for folder in folders]
    for folder, final in zip(folders, finals, strict=True):
        kept = load_file(folder / "checkpoints" / f"step-{best:08d}" / "model.safetensors")
        assert all(torch.equal(final[name], kept[name]) for name in kept)
    for name, weight in finals[0].items():
        torch.testing.assert_close(finals[1][name], weight, rtol=0, atol=1e-4)
    shifts = [ScalarHeadModel.from_pretrained(folder / "final").shift for folder in folders]
    assert shifts[0] == pytest.approx(shifts[1], abs=1e-4) and shifts[0] != 0.0
    return best


def test_two_ranks_go_back_to_the_step_of_one(
    make_recipe: MakeRecipe, tmp_path: Path, measured: dict[str, Any]
) -> None:
    """Real evaluations; the largest accuracy wins."""
    one, two = make_recipe("one", reward=measured), make_recipe("two", reward=measured)
    run_on_ranks([Run(one, RewardStage)], 1, tmp_path)
    run_on_ranks([Run(two, RewardStage)], 2, tmp_path)
    same_end(one.path / "reward", two.path / "reward")


@pytest.mark.slow
def test_an_ensemble_goes_back_to_the_steps_of_one_process_where_it_is_sharded(
    make_recipe: MakeRecipe, tmp_path: Path, measured: dict[str, Any]
) -> None:
    """Two members, each with a best step of its own, which is trained to and loaded again."""
    recipes = {
        name: make_recipe(name, reward={**measured, **backend, "num_members": 2})
        for name, backend in (("one", {}), *SHARDED.items())
    }
    run_on_ranks([Run(recipes.pop("one"), RewardStage)], 1, tmp_path)
    run_on_ranks([Run(recipe, RewardStage) for recipe in recipes.values()], 2, tmp_path)
    for name, recipe in recipes.items():
        finals = RewardStage.finals(recipe)
        assert len(finals) == 2
        for final in finals:
            same_end(tmp_path / "one" / final.parent.relative_to(tmp_path / name), final.parent)
