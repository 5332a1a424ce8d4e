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
    "plan": "say what the recipe asks for; --render kuberay writes it for Kubernetes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_intermixed_args(argv)
    log: Path | None = None
    try:
        for option in ("against", "seeds"):
            given = getattr(args, option)
            if given is not None and args.command != "evaluate":
                raise RecipeError(
                    f"--{option}={given} compares results, which {args.command} has none of: "
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


def _check_options(args: argparse.Namespace) -> None:
    """Raise RecipeError for an option that goes with another command, or with another option."""
    options = {
        "--render": args.render,
        "--image": args.image,
        "--stage": args.stage,
        "--gpus-per-node": args.gpus_per_node,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    if given and args.command != "plan":
        raise RecipeError(
            f"{given[0]} says how a recipe is written for a cluster, which {args.command} does "
            "not do: use it with `rayrlhf plan`"
        )
    if given and args.render is None:
        raise RecipeError(f"{given[0]} goes with --render: add --render kuberay")
    if args.command == "plan" and args.render is None:
        raise RecipeError("plan has nothing to say yet without --render: add --render kuberay")
    if args.gpus_per_node is not None and args.gpus_per_node < 1:
        raise RecipeError(f"--gpus-per-node={args.gpus_per_node}: a GPU node has at least one")


def _plan(args: argparse.Namespace) -> int:
    """Write the recipe as Kubernetes objects to the standard output."""
    from rayrlhf.planning.kuberay import render
    from rayrlhf.planning.pods import Node

    whole = Node()
    gpus = args.gpus_per_node or whole.gpus
    node = Node(
        gpus=gpus,
        cpus=whole.cpus * gpus // whole.gpus,
        memory_gib=whole.memory_gib * gpus // whole.gpus,
    )
    recipe = load(args.recipe, args.overrides)
    stages = tuple(dict.fromkeys(args.stage or ["pipeline"]))
    print(render(recipe, image=args.image, stages=stages, node=node), end="")
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
    parser.add_argument(
        "--seeds",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="evaluate: also write means and intervals over this and other runs with other seeds",
    )
    _add_render_options(parser)
    parser.add_argument("--version", action="version", version=f"rayrlhf {__version__}")
    return parser


def _add_render_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--render",
        choices=["kuberay"],
        help="plan: write ConfigMap, RayJob and RayService for `kubectl apply -f -`",
    )
    parser.add_argument(
        "--image", metavar="IMAGE", help="--render: the image with rayrlhf, for all pods"
    )
    parser.add_argument(
        "--stage",
        metavar="STAGE",
        action="append",
        help="--render: a RayJob of this stage, may be repeated; default: one of the pipeline",
    )
    parser.add_argument(
        "--gpus-per-node", metavar="N", type=int, help="--render: GPUs of a node, default 8"
    )


assert set(STAGES) < set(COMMANDS)

if __name__ == "__main__":
    sys.exit(main())
