"""Packed micro-batches compute what each sequence computes alone, and waste little."""

from collections.abc import Callable

import pytest
import torch

from rayrlhf.algorithms.ranking import ranking_loss
from rayrlhf.config import Recipe
from rayrlhf.training.backend import make_backend
from rayrlhf.training.reward import RewardStage
from rayrlhf.training.sft import SFTStage

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


@pytest.mark.parametrize("budget", [1, 24, 4096])
def test_sft_loss_of_packed_rows_is_that_of_each_demonstration_alone(
    make_recipe: MakeRecipe, budget: int
) -> None:
    stage = SFTStage(make_recipe(sft={"tokens_per_microbatch": budget}))
    backend = make_backend(stage.build(None), stage.cfg, total_steps=1, device=CPU)
    micros = stage.microbatches(range(13))
    found = sum(stage.loss(backend, micro)[0].item() for micro in micros)

    wanted = 0.0
    for example in stage.train:
        ids = torch.tensor([example.ids])
        log_probs = backend(ids, torch.ones_like(ids))[0]
        wanted -= log_probs[1:][torch.tensor(example.mask[1:]).bool()].sum().item()
    assert found == pytest.approx(wanted, rel=1e-5)
    assert sum(micro.count for micro in micros) == sum(sum(e.mask[1:]) for e in stage.train)
    assert sum(micro.num_tokens for micro in micros) == sum(len(e.ids) for e in stage.train)
    for micro in micros:  # none over the budget but one that holds a single row
        assert micro.input_ids.numel() <= budget or micro.input_ids.shape[0] == 1


@pytest.mark.parametrize("budget", [1, 24, 4096])
def test_reward_loss_of_packed_rows_is_that_of_each_response_alone(
    make_recipe: MakeRecipe, budget: int
) -> None:
    stage = RewardStage(make_recipe(reward={"tokens_per_microbatch": budget}))
    backend = make_backend(stage.build(None), stage.cfg, total_steps=1, device=CPU)
    micros = stage.microbatches(range(stage.num_records))
    found: dict[str, float] = {}
    for micro in micros:
        for name, value in stage.loss(backend, micro)[1].items():
            found[name] = found.get(name, 0.0) + float(value)

    scores, ranks, groups = [], [], []
    for group, comparison in enumerate(stage.train):
        for ids, rank in zip(comparison.ids, comparison.ranks, strict=True):
            one = torch.tensor([ids])
            scores.append(backend(one, torch.ones_like(one))[0, -1])
            ranks.append(rank)
            groups.append(group)
    _, wanted = ranking_loss(torch.stack(scores), torch.tensor(ranks), torch.tensor(groups))
    assert found == pytest.approx({name: float(wanted[name]) for name in found}, rel=1e-5)
    assert found["reward/num_pairs"] > 0
    assert sum(micro.count for micro in micros) == stage.num_records
    for micro in micros:  # none over the budget but what one comparison needs
        assert micro.num_tokens <= budget or micro.count == 1


def test_rows_are_packed(make_recipe: MakeRecipe) -> None:
    stage = RewardStage(make_recipe(reward={"tokens_per_microbatch": 4096}))
    (micro,) = stage.microbatches(range(stage.num_records))
    padded = sum(len(c.ids) * max(map(len, c.ids)) for c in stage.train)
    assert micro.num_tokens <= micro.input_ids.numel() < padded
    assert micro.attention_mask.max() > 1
