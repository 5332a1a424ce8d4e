"""A round is the recipe itself, in a folder of its own whose early stages are links to the run's.

So the very stages of the pipeline train it, with their checkpoints, progress and lineage, and the
command line can run each of them by `rounds/NN/recipe.yaml`.
"""

import os
from pathlib import Path

import yaml

from rayrlhf import lineage
from rayrlhf.config import Recipe

SAMPLES, JUDGED, HELD_OUT = "samples.jsonl", "judged.jsonl", "held_out.jsonl"
"""Answers to judge; what was said of those that a reward model trains on, and of the others."""
COMPARISONS = "comparisons.jsonl"
"""All that the round's reward model trains on."""
SHARED = ("tokenizer", "corpus", "pretrain", "sft")
SEEDS_APART = 1000


def policy_before(recipe: Recipe, number: int) -> str:
    """Return the folder of the policy that round `number` begins with."""
    if number == 1:
        return str(recipe.path / lineage.OUTPUTS["ppo"])
    return lineage.round_policies(recipe)[f"round-{number - 1}"]


def reward_model_before(recipe: Recipe, number: int) -> Path:
    """Return the folder of the newest reward model when round `number` begins."""
    earlier = recipe.path if number == 1 else recipe.path / lineage.round_folder(number - 1)
    return earlier / lineage.OUTPUTS["reward"]


def round_recipe(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe of round `number`, from 1: a reward model of all comparisons, and PPO.

    The reference of the KL penalty stays the SFT model; actor and prompts go on from the round
    before, with other random numbers.
    """
    assert recipe.reward is not None and recipe.ppo is not None and recipe.rounds is not None
    folder = recipe.path / lineage.round_folder(number)
    label = recipe.label
    if label is not None and recipe.rounds.judge == "people":
        label = label.model_copy(update={"items": str(folder / SAMPLES), "sample": None})
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-round-{number}",
            "run_dir": str(folder),
            "seed": recipe.seed + SEEDS_APART * number,
            "reward": recipe.reward.model_copy(
                update={"train": str(folder / COMPARISONS), "gold": None, "num_members": 1}
            ),
            "ppo": recipe.ppo.model_copy(update={"init": policy_before(recipe, number)}),
            "dpo": None,
            "rounds": None,
            "evaluate": None,
            "label": label,
        }
    )


def open_folder(recipe: Recipe, round_: Recipe) -> None:
    """Make the folder of a round: links to the run's early stages, their lineage, and a recipe."""
    round_.path.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        target, link = recipe.path / name, round_.path / name
        if target.exists() and not link.exists():
            link.symlink_to(os.path.relpath(target, round_.path), target_is_directory=True)
    done = lineage.load(recipe)
    early = {stage: done[stage] for stage in SHARED if stage in done}
    lineage.write_json(round_.path / "lineage.json", lineage.load(round_) | early)
    text = yaml.safe_dump(round_.model_dump(mode="json"), sort_keys=False)
    (round_.path / "recipe.yaml").write_text(text, encoding="utf-8")
