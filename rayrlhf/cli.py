"""The command line: `rayrlhf COMMAND RECIPE [key.sub=value ...]`.

Exit codes: 0 done; 2 the recipe or the data is wrong, with one or two lines that name the value,
the rule and the fix; 1 anything else. The heavy libraries are imported after parsing.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayrlhf import __version__, console, run_dir
from rayrlhf.config import STAGES, RecipeError, load

if TYPE_CHECKING:
    from rayrlhf.config import Recipe

COMMANDS = {
    "data": "fetch the built-in data the recipe names, and check every record",
    "corpus": "read, clean, deduplicate, mix, tokenize and pack the documents",
    "pretrain": "train the base model on the packed corpus",
    "sft": "fine-tune on demonstrations",
    "reward": "train the reward model on ranked completions",
    "dpo": "train the policy on ranked completions, without a reward model",
    "ppo": "train the policy against the reward model",
    "rounds": "iterate: judge the policy's answers, refit the reward model, go on with PPO",
    "evaluate": "compare the stages and write report.html",
    "label": "open a page on which people rank completions and vote between models",
    "pipeline": "run every stage the recipe has; skip what is complete and unchanged",
    "plan": "say what memory, time and money the recipe takes, and whether it fits a cluster",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Overrides may follow options, too.
    args = _parser().parse_intermixed_args(argv)
    log: Path | None = None
    try:
        if args.against is not None and args.command != "evaluate":
            raise RecipeError(
                f"--against={args.against} compares results, which {args.command} has none of: "
                "use it with `rayrlhf evaluate`"
            )
        _check_options(args)
        if args.command == "plan":
            return _plan(args)
        recipe = run_dir.settle(load(args.recipe, args.overrides))
        # People judge for days, and a run goes on meanwhile.
        part = "label" if args.command == "label" else ""
        with run_dir.held(recipe, part):
            log = recipe.path / part / "log.txt"
            with console.capture(log):
                code = _run(args.command, recipe)
                if args.against is not None:
                    _compare(recipe, args.against)
                return code
    except RecipeError as error:
        print(f"rayrlhf: {error}", file=sys.stderr)
        return 2
    except run_dir.PeopleNeeded as wait:
        print(f"rayrlhf: {wait}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rayrlhf: interrupted; the same command resumes", file=sys.stderr)
        return 1
    except Exception as error:
        text = " ".join(str(error).split())
        print(f"rayrlhf: {type(error).__name__}: {text[:600]}", file=sys.stderr)
        if log is not None:
            _keep_traceback(log)
        return 1


def _check_options(args: argparse.Namespace) -> None:
    """Raise RecipeError for an option of `plan` with another command, or with one it excludes."""
    options = {
        "--cluster": args.cluster,
        "--address": args.address,
        "--price": args.price,
        "--probe": args.probe or None,
        "--simulate": args.simulate,
    }
    given = [name if value is True else f"{name}={value}" for name, value in options.items()]
    given = [text for text, value in zip(given, options.values(), strict=True) if value is not None]
    if given and args.command != "plan":
        raise RecipeError(
            f"{given[0]} says what a plan is made for, and {args.command} runs on the cluster that "
            "RAY_ADDRESS names: use it with `rayrlhf plan`"
        )
    if args.cluster is not None and args.address is not None:
        raise RecipeError(
            f"--cluster={args.cluster} and --address={args.address} both name a cluster: keep one"
        )
    if args.probe and (args.cluster is not None or args.address is not None):
        raise RecipeError(
            "--probe measures the device at hand, which is not the cluster that is planned for: "
            "take out --probe, or --cluster and --address"
        )
    if args.price is not None and args.price < 0:
        raise RecipeError(f"--price={args.price:g}: US dollars per device and hour are 0 or more")


def _plan(args: argparse.Namespace) -> int:
    """Print the plan; it neither takes the run directory nor writes a log there."""
    from rayrlhf.planning.command import cluster_of, measured, plan

    recipe = load(args.recipe, args.overrides)
    cluster = cluster_of(args.cluster, args.address).priced(args.price)
    rates = measured(recipe) if args.probe else None
    plan(recipe, cluster, rates=rates, simulation=args.simulate)
    return 0


def _keep_traceback(log: Path) -> None:
    """Write the traceback of the exception being handled to the log, or else to the terminal."""
    try:
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError:
        traceback.print_exc()
    else:
        print(f"rayrlhf: the whole traceback is at the end of {log}", file=sys.stderr)


def _run(command: str, recipe: "Recipe") -> int:
    from rayrlhf import pipeline

    pipeline.require_trackers(recipe)
    if command == "data":
        from rayrlhf.data.builtin import prepare

        prepare(recipe)
        return 0
    if command == "label":
        if recipe.label is None:
            raise RecipeError(
                "the recipe has no section label: add one with labellers and items, for example "
                "label: {labellers: [ann, bob], items: items.jsonl}"
            )
        from rayrlhf.serving.label import label

        label(recipe)
        return 0
    stages = recipe.stages if command == "pipeline" else (command,)
    for stage in stages:
        if stage not in recipe.stages:
            raise RecipeError(
                f"the recipe has no section {stage}: add it, or run one of "
                f"{', '.join(recipe.stages)}"
            )
    if command == "pipeline":
        console.say(f"{recipe.name}: {' -> '.join(recipe.stages)} in {recipe.path}")
        if not all(pipeline.is_current(recipe, stage) for stage in stages):
            pipeline.prepare(recipe)
    for stage in stages:
        with pipeline.tracked(recipe, stage) as needed:
            if needed:
                _function(stage)(recipe)
    return 0


def _compare(recipe: "Recipe", other: Path) -> None:
    from rayrlhf.evaluation.against import compare_runs

    compare_runs(recipe.path, other)


def _function(stage: str) -> "Callable[[Recipe], Path]":
    """Import and return the function of a stage."""
    if stage == "corpus":
        from rayrlhf.data.corpus import build_corpus

        return build_corpus
    if stage == "pretrain":
        from rayrlhf.training.pretrain import pretrain

        return pretrain
    if stage == "sft":
        from rayrlhf.training.sft import finetune

        return finetune
    if stage == "reward":
        from rayrlhf.training.reward import train_reward

        return train_reward
    if stage == "dpo":
        from rayrlhf.training.dpo import train_dpo

        return train_dpo
    if stage == "ppo":
        from rayrlhf.rl.ppo import train_ppo

        return train_ppo
    if stage == "rounds":
        from rayrlhf.rounds.run import iterate

        return iterate
    from rayrlhf.evaluation.evaluate import evaluate

    return evaluate


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="rayrlhf",
        usage="rayrlhf COMMAND RECIPE [key.sub=value ...]",
        description="Train a GPT assistant the whole way on Ray: pretraining, SFT, reward model, "
        "DPO, PPO, iterated RLHF, evaluation, labelling.",
        epilog=f"commands:\n{commands}\n\nexample:\n"
        "  rayrlhf pipeline configs/quickstart.yaml ppo.steps=20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help="see below")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, see configs/")
    parser.add_argument(
        "overrides", metavar="key.sub=value", nargs="*", help="change values of the recipe"
    )
    parser.add_argument(
        "--against",
        metavar="RUN",
        type=Path,
        help="evaluate: also write the differences to the results of another run's folder",
    )
    _add_plan_options(parser)
    parser.add_argument("--version", action="version", version=f"rayrlhf {__version__}")
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        metavar="NxMxDEVICE",
        help="plan: for N nodes of M devices, such as 8x8xH100; default: this machine",
    )
    parser.add_argument(
        "--address", metavar="ADDR", help="plan: for the nodes of the Ray cluster at ADDR"
    )
    parser.add_argument(
        "--price", metavar="USD", type=float, help="plan: what a device costs an hour"
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="plan: measure one layer of the model on this machine first, in half a minute",
    )
    parser.add_argument(
        "--simulate",
        metavar="PNG",
        nargs="?",
        type=Path,
        const=Path(),
        help="plan: also simulate the run on 1 to 4,096 GPUs, and plot throughput and lost work; "
        "default: plan.png in the run directory",
    )


assert set(STAGES) < set(COMMANDS)

if __name__ == "__main__":
    sys.exit(main())
