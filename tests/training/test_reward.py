"""The reward model: its losses over a packed batch, its ensemble, and its calibration."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.config import Recipe, RecipeError, RewardConfig
from rayrlhf.data.datasets import Comparison
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.training import loop
from rayrlhf.training.reward import RewardStage, member_seed, train_reward
from tests.training.conftest import write_jsonl
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


def test_losses_of_a_batch_are_those_of_its_comparisons(make_recipe: MakeRecipe) -> None:
    """The packed batch of the stage against each comparison alone, response by response."""
    for section in (
        {"loss": "kwise"},
        {"loss": "pairwise", "ties": "half"},
        {"loss": "margin", "center_coef": 0.1},
        {"raters": "individual"},
        {"raters": "individual", "loss": "pairwise"},
    ):
        stage = RewardStage(make_recipe(reward=section))
        module = stage.build(None).eval()
        found, wanted, count = 0.0, 0.0, 0.0
        with torch.no_grad():
            for micro in stage.microbatches(range(len(stage.train))):
                found += float(stage.loss(module, micro)[0])  # type: ignore[arg-type]
                count += micro.count
            pairs_in_all = 0
            for comparison in stage.train:
                scores = [
                    float(module(torch.tensor([ids]), torch.ones(1, len(ids)).long())[0, -1])
                    for ids in comparison.ids
                ]
                losses = pair_losses(comparison, scores, stage.cfg)
                pairs_in_all += len(losses)
                wanted += sum(losses) / (len(losses) if stage.cfg.loss == "kwise" else 1)
        assert found == pytest.approx(wanted, rel=1e-4), section
        assert count == (len(stage.train) if stage.cfg.loss == "kwise" else pairs_in_all)


def pair_losses(comparison: Comparison, scores: list[float], cfg: RewardConfig) -> list[float]:
    """Return the loss of each pair, from the words of the recipe's options."""
    losses = []
    for i, j in itertools.combinations(range(len(scores)), 2):
        first, second = comparison.ranks[i], comparison.ranks[j]
        if cfg.raters == "individual":
            judged = list(
                itertools.product(comparison.single_ratings[i], comparison.single_ratings[j])
            )
            target = sum((a > b) + 0.5 * (a == b) for a, b in judged) / len(judged)
        elif first == second and cfg.ties == "ignore":
            continue
        else:
            target = (first < second) + 0.5 * (first == second)
        margin = 0.0
        if cfg.loss == "margin":
            values = comparison.ratings or [-rank for rank in comparison.ranks]
            margin = cfg.margin_scale * max(0.0, (values[i] - values[j]) * (2 * target - 1))
        gap = scores[i] - scores[j]
        loss = target * math.log1p(math.exp(margin - gap)) + (1 - target) * math.log1p(
            math.exp(margin + gap)
        )
        losses.append(loss + cfg.center_coef * (scores[i] + scores[j]) ** 2)
    return losses


def test_a_comparison_of_nothing_but_ties_counts_when_ties_do(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    tied = {"prompt": "A", "responses": [" good", " bad"], "ranks": [1, 1]}
    ranked = {"prompt": "A", "responses": [" good", " bad"], "ranks": [1, 2]}
    path = write_jsonl(tmp_path / "tied.jsonl", [tied, ranked])
    assert len(RewardStage(make_recipe(reward={"train": path})).train) == 1
    assert len(RewardStage(make_recipe(reward={"train": path, "ties": "half"})).train) == 2


def test_individual_raters_need_single_ratings(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    good = {"prompt": "A", "responses": [" good", " bad"], "ranks": [1, 2]}
    path = write_jsonl(tmp_path / "c.jsonl", [{**good, "single_ratings": [[1, 2], [0]]}, good])
    with pytest.raises(RecipeError, match=r"c\.jsonl:2: the record has no single_ratings, but"):
        RewardStage(make_recipe(reward={"train": path, "raters": "individual"}))
    with pytest.raises(RecipeError, match="loss=margin needs to know which"):
        make_recipe(reward={"raters": "individual", "loss": "margin"})


def test_members_of_an_ensemble_differ_and_resume(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is the plain model; a run that was killed in the second goes on with it."""
    plain = make_recipe("plain")
    loop.run(RewardStage(plain), torch.device("cpu"))
    recipe = make_recipe(reward={"num_members": 3})
    finals = RewardStage.finals(recipe)
    assert [str(f.relative_to(recipe.path)) for f in finals] == [
        "reward/final",
        "reward/members/01/final",
        "reward/members/02/final",
    ]
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    monkeypatch.setattr(loop, "get_device", lambda: torch.device("cpu"))
    given = {"recipe": recipe, "kind": RewardStage, "directory": str(Path.cwd())}
    whole_step, calls = loop.train_step, []

    def dies(stage: Any, backend: Any, step: int, micros: Any) -> dict[str, float]:
        calls.append(stage.folder.name)
        if len(calls) == 6 + 5:
            raise KeyboardInterrupt
        return whole_step(stage, backend, step, micros)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        loop._worker(given)
    loop._worker(given)
    # Six steps of the first; of the second four and one that died, then from step 4 on; the third.
    assert calls == ["reward"] * 6 + ["01"] * 5 + ["01"] * 2 + ["02"] * 6
    scores = [scores_of(final, RewardStage(recipe)) for final in finals]
    assert torch.equal(scores[0], scores_of(plain.path / "reward" / "final", RewardStage(plain)))
    for one, other in itertools.combinations(scores, 2):
        assert float((one - other).abs().max()) > 1e-3


def test_the_gold_model_learns_from_its_own_comparisons(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands behind the members of the ensemble, and a text of the proxy's data is refused."""
    other = {"prompt": "A", "responses": [" film", " law"], "ranks": [1, 2]}
    path = write_jsonl(tmp_path / "gold.jsonl", [other, {**other, "responses": [" x", " law x"]}])
    recipe = make_recipe(reward={"num_members": 2, "gold": {"train": path}})
    assert [str(f.relative_to(recipe.path)) for f in RewardStage.finals(recipe)][1:] == [
        "reward/members/01/final",
        "reward/gold/final",
    ]
    proxy, member, gold = RewardStage.runs(recipe)
    assert (len(gold.train), len(gold.validation)) == (2, 0)
    assert len(member.train) == len(proxy.train) > 2
    assert len({stage.recipe.seed for stage in (proxy, member, gold)}) == 3
    assert gold.folder == recipe.path / "reward" / "gold"
    monkeypatch.setattr("rayrlhf.training.reward.train_stage", lambda *_: recipe.path)
    assert train_reward(recipe) == recipe.path
    shared = write_jsonl(tmp_path / "shared.jsonl", [{**other, "responses": [" good", " x"]}])
    with pytest.raises(RecipeError, match=r"shared\.jsonl: 1 of its texts are in .*'A good'"):
        train_reward(make_recipe("b", reward={"gold": {"train": shared}}))
    with pytest.raises(RecipeError, match="shared.jsonl: 1 of its texts"):
        train_reward(make_recipe("c", reward={"gold": {"train": path, "validation": shared}}))


def test_seeds_of_members_are_no_other_runs() -> None:
    seeds = {member_seed(seed, member) for seed in range(50) for member in range(1, 9)}
    assert len(seeds) == 400 and min(seeds) > 50
