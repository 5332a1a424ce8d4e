"""`rayrlhf rounds`: iterated RLHF, from the policy that PPO left.

for each round:
    1 sample     K answers of the policy to new prompts
    2 judge      people, rules, a reward model, a function, or a language model
    3 reward     a new reward model, on all comparisons so far
    4 ppo        goes on from the policy, against the new reward model

Each writes its part into the round's folder whole or not at all, so that a run that was killed goes
on with the first part that is missing, or, inside 3 and 4, from their newest checkpoint.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rayrlhf import console, lineage, pipeline, run_dir
from rayrlhf.config import Recipe
from rayrlhf.data.records import read_records
from rayrlhf.data.tokenizer import load_tokenizer
from rayrlhf.rl.ppo import train_ppo
from rayrlhf.rounds import collect
from rayrlhf.rounds.accuracy import compare, scores_of, tokens_per_batch
from rayrlhf.rounds.folders import (
    HELD_OUT,
    JUDGED,
    open_folder,
    policy_before,
    reward_model_before,
    round_recipe,
)
from rayrlhf.training.reward import train_reward


def iterate(recipe: Recipe) -> Path:
    """Do the rounds that are left; return the folder of them all.

    Raises PeopleNeeded where people have not judged a round's answers yet.
    """
    assert recipe.rounds is not None, "the command line checks that the section is there"
    tokenizer = load_tokenizer(recipe)
    folders: list[Path] = []
    found: list[dict[str, Any]] = []
    for number in lineage.rounds_of(recipe):
        round_ = round_recipe(recipe, number)
        folders.append(round_.path)
        console.say(f"{'rounds':>9} round {number} of {recipe.rounds.num_rounds}")
        open_folder(recipe, round_)
        with run_dir.held(round_):
            collect.sample(recipe, round_, policy_before(recipe, number))  # 1
            collect.judge(recipe, round_, tokenizer)  # 2
            num_comparisons = collect.gather(recipe, folders)
            with pipeline.tracked(round_, "reward") as needed:  # 3
                if needed:
                    train_reward(round_)
            compared = _accuracy(recipe, round_, number, tokenizer)
            found.append(compared | {"num_comparisons": num_comparisons})
            with pipeline.tracked(round_, "ppo") as needed:  # 4
                if needed:
                    train_ppo(round_)
    path = recipe.path / lineage.OUTPUTS["rounds"]
    judge = recipe.rounds.judge
    name = judge if isinstance(judge, str) else judge.title
    lineage.write_json(path, {"judge": name, "rounds": found})
    return path.parent


def _accuracy(
    recipe: Recipe, round_: Recipe, number: int, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Return what the round's reward model gained on held-out answers of the policy before."""
    records = read_records(round_.path / HELD_OUT, "comparison")
    before, after = (
        scores_of(folder, records, tokenizer, tokens_per_batch(recipe))
        for folder in (
            reward_model_before(recipe, number),
            round_.path / lineage.OUTPUTS["reward"],
        )
    )
    compared = compare(records, before, after, seed=recipe.seed)
    console.say(
        f"{'rounds':>9} pair accuracy on {compared['num_pairs']} held-out pairs of answers: "
        f"{compared['pair_accuracy_before']['value']:.3f} before, "
        f"{compared['pair_accuracy']['value']:.3f} with the round's comparisons"
    )
    return {
        "round": number,
        "num_new": len(read_records(round_.path / JUDGED, "comparison")),
        "num_held_out": len(records),
        **compared,
    }
