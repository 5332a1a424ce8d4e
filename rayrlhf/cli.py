"""The command line: `rayrlhf COMMAND RECIPE [key.sub=value ...]`.

Exit codes: 0 done; 2 the recipe or the data is wrong, with one or two lines that name the value,
the rule and the fix; 1 anything else. The heavy libraries are imported after parsing.
"""

import argparse
import importlib
import json
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
    "serve": "answer on an OpenAI-compatible endpoint, until Ctrl-C",
    "pipeline": "run every stage the recipe has; skip what is complete and unchanged",
    "plan": "say what memory, time and money a recipe takes, or write it for Kubernetes",
    "doctor": "check every node of a cluster before a run",
}
OWN_OPTIONS = {"plan": "rayrlhf.planning.run", "doctor": "rayrlhf.doctor.run"}
"""Commands that only look; `rayrlhf COMMAND --help` says what they take."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    looks = OWN_OPTIONS.get(words[0]) if words else None
    args = _parser().parse_intermixed_args(words) if looks is None else None
    log: Path | None = None
    try:
        if args is None:
            assert looks is not None
            return int(importlib.import_module(looks).main(words[1:]))
        for option in ("against", "seeds"):
            given = getattr(args, option)
            if given is not None and args.command != "evaluate":
                raise RecipeError(
                    f"--{option}={given} compares results, which {args.command} has none of: "
                    "use it with `rayrlhf evaluate`"
                )
        recipe = run_dir.settle(load(*_recipe_of(args)))
        # People judge and ask for days, and a run goes on meanwhile.
        part = args.command if args.command in ("label", "serve") else ""
        with run_dir.held(recipe, part):
            log = recipe.path / part / "log.txt"
            with console.capture(log):
                code = _run(args.command, recipe)
                if args.against is not None:
                    _compare(recipe, args.against)
                if args.seeds is not None:
                    _summarize(recipe, args.seeds)
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
    if command == "serve":
        if recipe.serve is None:
            raise RecipeError(
                "the recipe has no section serve: add one with models, for example "
                "serve: {models: {ppo: {path: runs/x/ppo/final}}}, or follow a stage with --follow"
            )
        from rayrlhf.serving.serve import serve_models

        serve_models(recipe)
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


def _recipe_of(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Return the recipe's path and its overrides; `--follow` names both by a stage's folder."""
    if args.follow is None:
        if args.recipe is None:
            raise RecipeError(f"which recipe? rayrlhf {args.command} RECIPE, see configs/")
        return args.recipe, args.overrides
    if args.command != "serve":
        raise RecipeError(
            f"--follow={args.follow} names what to serve, and {args.command} serves nothing: use "
            "it with `rayrlhf serve`"
        )
    stage = args.follow.absolute()
    # The first word after --follow's own may be an override: there is no recipe to name.
    overrides = [word for word in (args.recipe, *args.overrides) if word is not None]
    own = [f"run_dir={json.dumps(str(stage.parent))}", f"serve.follow={stage.name}"]
    return str(stage.parent / "recipe.yaml"), [*own, *overrides]


def _compare(recipe: "Recipe", other: Path) -> None:
    from rayrlhf.evaluation.against import compare_runs

    compare_runs(recipe.path, other)


def _summarize(recipe: "Recipe", others: Sequence[Path]) -> None:
    from rayrlhf.evaluation.seeds import report_seeds

    report_seeds(recipe.path, others)


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
        "DPO, PPO, iterated RLHF, evaluation, labelling, serving.",
        epilog=f"commands:\n{commands}\n\nexample:\n"
        "  rayrlhf pipeline configs/quickstart.yaml ppo.steps=20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help="see below")
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file, see configs/")
    parser.add_argument(
        "overrides", metavar="key.sub=value", nargs="*", help="change values of the recipe"
    )
    parser.add_argument(
        "--against",
        metavar="RUN",
        type=Path,
        help="evaluate: also write the differences to the results of another run's folder",
    )
    parser.add_argument(
        "--seeds",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="evaluate: also write means and intervals over this and other runs with other seeds",
    )
    parser.add_argument(
        "--follow",
        metavar="STAGE",
        type=Path,
        help="serve: the folder of a stage, runs/x/ppo, whose new checkpoints go live; the recipe "
        "is that of the run",
    )
    parser.add_argument("--version", action="version", version=f"rayrlhf {__version__}")
    return parser


assert set(STAGES) < set(COMMANDS)

if __name__ == "__main__":
    sys.exit(main())
