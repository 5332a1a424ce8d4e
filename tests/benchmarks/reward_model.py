"""Held-out pair accuracy of a recipe's reward model, over seeds, against one human rater.

    python tests/benchmarks/reward_model.py configs/smollm2.yaml [key.sub=value ...] [--seeds 3]
                                            [--folder runs/reward-model]

The SFT model is trained once, the reward model once per seed on top of it (new head, order of the
comparisons, dropout). A killed run goes on where it was. Accuracy is over all pairs of the texts
of `evaluate.comparisons` that people rated differently, per source; the interval is Student's t
over the seeds, 95%; `ratio_...` divides by the accuracy of one human rater against the others.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[2]
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t, two-sided 95%, by the number of seeds."""
QUICK = (
    "sft=null",
    "reward.init=builtin:smollm2-135m-instruct",
    "reward.max_steps=1",
    "reward.batch_size=4",
    "reward.validation=null",
)
SECTIONS = ("dpo=null", "ppo=null", "evaluate=null")
"""Not run here."""


def train(args: argparse.Namespace) -> list[tuple[Any, Path]]:
    """Train what is missing; return (recipe, folder of its reward model) per seed."""
    from rayrlhf.config import load
    from rayrlhf.pipeline import prepare
    from rayrlhf.training.reward import train_reward
    from rayrlhf.training.sft import finetune

    overrides = [*SECTIONS, *args.overrides, *(QUICK if args.quick else ())]
    found = []
    for seed in range(args.seeds):
        place = [f"seed={seed}", f"run_dir={args.folder / f'seed-{seed}'}"]
        if seed == 0:
            recipe = load(args.recipe, [*overrides, *place])
            prepare(recipe)
            start = finetune(recipe) if recipe.sft is not None else None
        else:
            first = [f"reward.init={start}"] if start is not None else []
            recipe = load(args.recipe, [*overrides, *first, *place])
            prepare(recipe)
        found.append((recipe, train_reward(recipe)))
    return found


def accuracies(
    recipe: Any, folder: Path, comparisons: str, limit: int | None
) -> dict[str, tuple[float, float | None]]:
    """Return {source: (pair accuracy, that of one human rater)} on held-out comparisons."""
    import torch

    from rayrlhf.data.records import read_records
    from rayrlhf.data.tokenizer import load_tokenizer
    from rayrlhf.evaluation.agreement import human_ceiling, pair_accuracy
    from rayrlhf.evaluation.held_out import rated_texts
    from rayrlhf.evaluation.judges import RewardJudge
    from rayrlhf.models.scalar_head import ScalarHeadModel

    torch.set_num_threads(recipe.resources.num_threads)
    tokenizer = load_tokenizer(recipe)
    judge = RewardJudge(
        ScalarHeadModel.from_pretrained(folder),
        eos_id=int(tokenizer.eos_token_id),
        tokens_per_batch=4096,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    records = read_records(comparisons, "comparison")
    records = records[:: max(1, len(records) // limit)] if limit else records
    found = {}
    for source, texts in rated_texts(records, tokenizer, recipe.model.max_length).items():
        pairs = pair_accuracy(judge.score_ids(texts.ids), texts.ratings)
        if pairs is not None:
            found[source] = (pairs.accuracy, human_ceiling(texts.single_ratings))
    return found


def main() -> None:
    """Train, print a table, and as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "configs" / "smollm2.yaml"))
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/reward-model"))
    parser.add_argument("--quick", action="store_true", help="one step, a few texts")
    args = parser.parse_args()
    if args.quick:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            args.seeds, args.folder = 1, Path(folder)
            report(args, limit=16)
    else:
        report(args, limit=None)


def report(args: argparse.Namespace, limit: int | None) -> None:
    """Print accuracies as a table and as JSON."""
    from rayrlhf.config import load

    evaluate = load(args.recipe, []).evaluate
    assert evaluate is not None, "the recipe has no evaluate section to take comparisons from"
    rows = [
        accuracies(recipe, folder, evaluate.comparisons, limit) for recipe, folder in train(args)
    ]
    figures: dict[str, float] = {}
    print(f"{'source':<12} {'accuracy':>8} {'95% interval':>16} {'one human':>10}  each seed")
    for source, (_, human) in rows[0].items():
        values = [row[source][0] for row in rows]
        mean = statistics.mean(values)
        half = (
            T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
            if len(values) > 1
            else 0.0
        )
        each = " ".join(f"{value:.3f}" for value in values)
        interval = f"{mean - half:.3f} to {mean + half:.3f}"
        print(f"{source:<12} {mean:>8.3f} {interval:>16} {human or math.nan:>10.3f}  {each}")
        if human is not None:
            figures[f"ratio_{source}"] = mean / human
        figures |= {f"accuracy_{source}": mean, f"low_{source}": mean - half}
    ordered = sorted(figures.items(), key=lambda item: not item[0].startswith("ratio"))
    print(json.dumps({name: round(value, 4) for name, value in ordered}))


if __name__ == "__main__":
    main()
