"""The loop on two CPU ranks: resume equals uninterrupted, and the losses are those of DDP."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config import Recipe
from rayrlhf.metrics import read_jsonl
from rayrlhf.training.checkpoint import newest_checkpoint
from rayrlhf.training.pretrain import PretrainStage
from rayrlhf.training.sft import SFTStage
from tests.training.ranks import Run, run_on_ranks
from tests.training.test_loop import comparable

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.slow

BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero3-checkpointing": {
        "backend": "deepspeed",
        "zero_stage": 3,
        "gradient_checkpointing": True,
    },
    "fsdp": {"backend": "fsdp"},
    **{f"zero{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in range(4)},
    **{
        f"zero{stage}-bfloat16": {
            "backend": "deepspeed",
            "zero_stage": stage,
            "precision": "bfloat16",
        }
        for stage in (1, 3)
    },
}


def curve(recipe: Recipe, key: str = "loss", stage: str = "sft") -> list[float]:
    return [line[key] for line in read_jsonl(recipe.path / stage / "metrics.jsonl") if key in line]


def test_resume_equals_uninterrupted_and_losses_equal_ddps(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """All backends in the same two processes: those take longer to start than to train."""
    dropout = {"dropout": 0.2, "weight_decay": 0.1}
    recipes: Mapping[tuple[str, str], Recipe] = {
        (name, run): make_recipe(f"{name}-{run}", sft={**dropout, **section})
        for name, section in BACKENDS.items()
        for run in ("whole", "killed")
    }
    runs = [
        Run(recipe, SFTStage, 5 if run == "killed" else None)
        for (_, run), recipe in recipes.items()
    ]
    # So small a window and threshold that an ordinary norm is a spike.
    guard = {"loss_spike": {"window": 4, "threshold": 4.0}, "max_steps": 9, "save_every": 4}
    guarded = {
        name: make_recipe(f"{name}-guarded", pretrain={**guard, **section})
        for name, section in BACKENDS.items()
    }
    runs += [Run(recipe, PretrainStage, 5) for recipe in guarded.values()]
    run_on_ranks(runs, 2, tmp_path)
    check_skips(guarded)

    reference = recipes["ddp", "whole"]
    for name in BACKENDS:
        whole, killed = (recipes[name, run].path / "sft" for run in ("whole", "killed"))
        expected = comparable(whole)
        assert [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
        assert newest_checkpoint(killed) == killed / "checkpoints" / "step-00000004"
        assert comparable(killed) == expected, name
        for file in ("model.safetensors", "config.json"):
            left, right = (folder / "final" / file for folder in (whole, killed))
            assert left.read_bytes() == right.read_bytes(), (name, file)
        if "bfloat16" not in name:
            for key in ("loss", "eval/loss", "learning_rate"):
                close = pytest.approx(curve(reference, key), rel=1e-4)
                assert curve(recipes[name, "whole"], key) == close, (name, key)
    assert curve(reference)[-1] < curve(reference)[0]


def check_skips(recipes: Mapping[str, Recipe]) -> None:
    """Check that every backend skips the same steps, resumed on the way, and moves alike."""
    notes = read_jsonl(recipes["ddp"].path / "pretrain" / "notes.jsonl")
    assert 0 < len(notes) < 5
    for name, recipe in recipes.items():
        found = read_jsonl(recipe.path / "pretrain" / "notes.jsonl")
        skipped = curve(recipe, "skipped_steps", "pretrain")
        assert skipped[-1] == len(found) > 0, name
        if "bfloat16" not in name:
            assert [note["step"] for note in found] == [note["step"] for note in notes], name
            for key in ("loss", "grad_norm", "eval/loss"):
                expected = pytest.approx(curve(recipes["ddp"], key, "pretrain"), rel=1e-4)
                assert curve(recipe, key, "pretrain") == expected, (name, key)
