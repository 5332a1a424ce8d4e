"""The reward model's calibration: demonstrations score 0 on average, by the folder it leaves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rayrlhf.config import Recipe
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.training.reward import RewardStage
from tests.training.ranks import Run, run_on_ranks

MakeRecipe = Callable[..., Recipe]


def scores_of(folder: Path, stage: RewardStage) -> torch.Tensor:
    """Return the score of each demonstration, alone and unpadded, by a model's folder."""
    model = ScalarHeadModel.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack(
            [
                model(torch.tensor([example.ids]), torch.ones(1, len(example.ids)).long())[0, -1]
                for example in stage.demonstrations
            ]
        )


@pytest.mark.parametrize("world_size", [1, 2])
def test_demonstrations_score_0_on_average(
    make_recipe: MakeRecipe, tmp_path: Path, world_size: int
) -> None:
    recipe = make_recipe(reward={"tokens_per_microbatch": 24})
    run_on_ranks([Run(recipe, RewardStage)], world_size, tmp_path)
    stage = RewardStage(recipe)
    assert len(stage.demonstrations) == 13
    final = stage.folder / "final"
    scores = scores_of(final, stage)
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(scores.std()) > 1e-3
    # What is stored is what was subtracted; before the last step nothing was.
    shift = json.loads((final / "config.json").read_text())["score_shift"]
    assert abs(shift) > 1e-3
    assert ScalarHeadModel.from_pretrained(final).shift == shift
    before = stage.folder / "checkpoints" / "step-00000004"
    assert json.loads((before / "config.json").read_text())["score_shift"] == 0.0
    assert abs(float(scores_of(before, stage).mean())) > 1e-3


def test_without_demonstrations_nothing_is_subtracted(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe().model_copy(update={"sft": None})
    run_on_ranks([Run(recipe, RewardStage)], 1, tmp_path)
    assert ScalarHeadModel.from_pretrained(recipe.path / "reward" / "final").shift == 0.0


def test_a_reward_model_that_is_trained_on_is_calibrated_anew(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Killed after the last step but before `final`, it is calibrated once, not twice."""
    whole = make_recipe("whole")
    broken = make_recipe("broken")
    run_on_ranks([Run(whole, RewardStage), Run(broken, RewardStage, 5)], 1, tmp_path)
    shifts = [
        ScalarHeadModel.from_pretrained(recipe.path / "reward" / "final").shift
        for recipe in (whole, broken)
    ]
    assert shifts[0] == shifts[1] != 0.0
