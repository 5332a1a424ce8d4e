"""Predict the loss of the next size from small runs (rayrlhf/evaluation/scaling_law.py).

    python jobs/scaling_law.py RUN RUN RUN RUN ... [--next FLOPS|RECIPE|RUN] [--form compute|size]
    python jobs/scaling_law.py RECIPE [key.sub=value ...] --widths 32 48 64 96 128 192

The first reads run directories whose pretraining is done. The second builds the recipe's corpus,
trains a model of each width on it (as deep as the recipe's, same tokens), fits all but the widest,
and says how far from the measured loss of that one the prediction is. The learning rate is the
recipe's at the recipe's width, and falls as 1 / width: a law needs every size trained about equally
well, and one rate for all is too high for the widest (muP, arXiv:2203.03466, table 3).
Writes scaling_law.json and scaling_law.png beside the runs.
"""

import argparse
import sys
from pathlib import Path

from rayrlhf import cli, console
from rayrlhf.config import Recipe, RecipeError, load
from rayrlhf.evaluation import scaling_law
from rayrlhf.evaluation.scaling_law import ScalingLaw, TrainedRun


def main() -> int:
    """Fit, print, draw; exit codes are those of rayrlhf."""
    args = _parser().parse_args()
    try:
        if args.widths:
            recipe = load(args.inputs[0], args.inputs[1:])
            runs = _train(recipe, args.inputs[0], args.inputs[1:], sorted(set(args.widths)))
            following, folder = runs.pop(), recipe.path
        else:
            runs = [scaling_law.read_run(folder) for folder in args.inputs]
            following, folder = _following(args.next, runs), Path(args.inputs[0]).parent
        law = scaling_law.fit(runs, args.form)
        _say(law, runs, following)
        scaling_law.write_results(folder / "scaling_law.json", law, runs, following)
        scaling_law.write_plot(folder / "scaling_law.png", law, runs, following)
        console.say(f"plot: {folder / 'scaling_law.png'}")
    except RecipeError as error:
        print(f"scaling_law: {error}", file=sys.stderr)
        return 2
    return 0


def _train(recipe: Recipe, path: str, overrides: list[str], widths: list[int]) -> list[TrainedRun]:
    """Train one model of each width on one corpus; those that are done are left alone."""
    least = scaling_law.MIN_RUNS["compute"] + 1
    if len(widths) < least:
        raise RecipeError(f"--widths has {len(widths)} sizes: give {least} or more, one to predict")
    if recipe.pretrain is None:
        raise RecipeError(f"{path} has no section pretrain, of which --widths changes the model")
    shape = recipe.model
    head_size = shape.hidden_size // shape.num_heads
    wrong = [width for width in widths if width % head_size]
    if wrong:
        raise RecipeError(
            f"--widths {wrong[0]} is not a multiple of the recipe's heads of {head_size}: change "
            "it, or model.num_heads"
        )
    _command(["corpus", path, *overrides])
    runs = []
    for width in widths:
        heads = width // head_size
        sizes = {
            "name": f"width-{width}",
            "run_dir": recipe.path / f"width-{width}",
            "corpus": "null",
            "tokenizer.path": recipe.path / "tokenizer",
            "pretrain.corpus": recipe.path / "corpus",
            "model.hidden_size": width,
            "pretrain.learning_rate": recipe.pretrain.learning_rate * shape.hidden_size / width,
            "model.num_heads": heads,
            "model.num_kv_heads": heads,
            "model.intermediate_size": shape.intermediate_size * width // shape.hidden_size,
        }
        changes = [f"{key}={value}" for key, value in sizes.items()]
        _command(["pretrain", path, *overrides, *changes])
        runs.append(scaling_law.read_run(recipe.path / f"width-{width}"))
    return runs


def _command(argv: list[str]) -> None:
    code = cli.main(argv)
    if code:
        raise SystemExit(code)


def _following(given: str | None, runs: list[TrainedRun]) -> TrainedRun | None:
    """Return what `--next` names: a compute, a trained run, or a recipe whose corpus is there."""
    if given is None:
        return None
    if Path(given).is_dir():
        return scaling_law.read_run(given)
    if Path(given).is_file():
        return _planned(load(given))
    try:
        flops = float(given)
    except ValueError:
        raise RecipeError(
            f"--next {given}: neither a number of operations nor a recipe or run that is there"
        ) from None
    tokens = max(run.tokens for run in runs)
    return TrainedRun("next", round(flops / (6 * tokens)), tokens, None, runs[0].corpus)


def _planned(recipe: Recipe) -> TrainedRun:
    """Return size and tokens of a pretraining that has not begun; its corpus is needed."""
    from rayrlhf.models.causal_lm import parameter_shapes
    from rayrlhf.training.pretrain import PretrainStage

    stage = PretrainStage(recipe)
    shapes = parameter_shapes(recipe.model, vocab_size=len(stage.tokenizer))
    rows = stage.batch_sizes.before(stage.total_steps)
    return TrainedRun(
        recipe.name,
        scaling_law.multiplied_parameters(shapes),
        rows * stage.rows.row_length,
        None,
    )


def _say(law: ScalingLaw, runs: list[TrainedRun], following: TrainedRun | None) -> None:
    """Print the runs, the law and the prediction."""
    rows = [
        (
            run.name,
            f"{run.parameters:,}",
            f"{run.tokens:,}",
            f"{run.flops:.2e}",
            run.loss,
            law.predict(*scaling_law.sizes_of(run, law.form)),
        )
        for run in runs
    ]
    console.say(console.table(("run", "N", "D", "C", "loss", "fitted"), rows))
    console.say(f"\n{scaling_law.formula(law)}   (nats per token)")
    for index, name in enumerate(("alpha", "beta")[: len(law.exponents)]):
        low, high = law.exponent_interval(index)
        exponent = law.exponents[index]
        console.say(f"{name} {exponent:.3f}, 10th to 90th percentile {low:.3f} to {high:.3f}")
    if following is not None:
        sizes = scaling_law.sizes_of(following, law.form)
        low, high = law.interval(*sizes)
        predicted = law.predict(*sizes)
        console.say(
            f"{following.name} at C = {following.flops:.2e}: predicted {predicted:.4f} "
            f"({low:.4f} to {high:.4f})"
        )
        if following.loss is not None:
            console.say(f"measured {following.loss:.4f}: off by {predicted - following.loss:+.4f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", help="run directories; or a recipe and overrides")
    parser.add_argument("--widths", type=int, nargs="+", help="train these widths of the recipe")
    parser.add_argument("--next", help="what to predict: operations, a recipe or a run directory")
    parser.add_argument("--form", choices=["compute", "size"], default="compute")
    return parser


if __name__ == "__main__":
    sys.exit(main())
