"""The command `rayrlhf plan`: a table, a figure, or the recipe as Kubernetes objects.

It neither takes the run directory nor writes a log there: a plan may be made beside a run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rayrlhf.config import RecipeError, load

RENDERS = ("image", "stage", "gpus_per_node", "cpus_per_node", "memory_per_node")
"""Options that go with --render."""


def main(words: Sequence[str]) -> int:
    """Run `rayrlhf plan WORDS`; return 0. Raises RecipeError when the layout does not fit."""
    args = arguments(words)
    recipe = load(args.recipe, args.overrides)
    if args.render is not None:
        from rayrlhf.planning.kuberay import render
        from rayrlhf.planning.pods import Node

        whole = Node()
        gpus = args.gpus_per_node or whole.gpus
        node = Node(
            gpus=gpus,
            cpus=args.cpus_per_node or whole.cpus * gpus // whole.gpus,
            memory_gib=args.memory_per_node or whole.memory_gib * gpus // whole.gpus,
        )
        stages = tuple(dict.fromkeys(args.stage or ["pipeline"]))
        print(render(recipe, image=args.image, stages=stages, node=node), end="")
        return 0
    from rayrlhf.planning.command import cluster_of, measured, plan

    cluster = cluster_of(args.cluster, args.address).priced(args.price)
    if args.simulate is not None and recipe.ppo is None:
        raise RecipeError("--simulate is of a PPO run, and the recipe has no section ppo: add it")
    rates = measured(recipe) if args.probe else None
    plan(recipe, cluster, rates=rates, simulation=args.simulate)
    return 0


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse; raises RecipeError for options that exclude each other, or are out of range."""
    args = _parser().parse_intermixed_args(words)
    for option in RENDERS:
        if getattr(args, option) is not None and args.render is None:
            name = option.replace("_", "-")
            raise RecipeError(
                f"--{name}={getattr(args, option)} goes with --render: add --render kuberay"
            )
    for option in ("gpus_per_node", "cpus_per_node", "memory_per_node"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            name = option.replace("_", "-")
            raise RecipeError(f"--{name}={getattr(args, option)}: a GPU node has at least one")
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
    plot = args.simulate
    if plot is not None and plot != Path() and plot.suffix != ".png":
        raise RecipeError(
            f"--simulate={plot}: the plot is a PNG: name a file that ends with .png, or put "
            "overrides before --simulate"
        )
    if args.render is not None:
        for option in ("cluster", "address", "price", "simulate"):
            if getattr(args, option) is not None:
                raise RecipeError(
                    f"--{option}={getattr(args, option)} goes with a table, and --render writes "
                    "manifests: take one of them out; --gpus-per-node, --cpus-per-node and "
                    "--memory-per-node are the sizes of nodes"
                )
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayrlhf plan",
        usage="rayrlhf plan RECIPE [key.sub=value ...] [--cluster NxMxDEVICE | --address ADDR]",
        description="What memory, time and money a recipe takes, and whether it fits.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, see configs/")
    parser.add_argument(
        "overrides", metavar="key.sub=value", nargs="*", help="change values of the recipe"
    )
    parser.add_argument(
        "--cluster",
        metavar="NxMxDEVICE",
        help="N nodes of M devices, such as 8x8xH100; default: this machine",
    )
    parser.add_argument("--address", metavar="ADDR", help="the nodes of the Ray cluster at ADDR")
    parser.add_argument("--price", metavar="USD", type=float, help="what a device costs an hour")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="measure one layer of the model on this machine first, in half a minute",
    )
    parser.add_argument(
        "--simulate",
        metavar="PNG",
        nargs="?",
        type=Path,
        const=Path(),
        help="also simulate the run on 1 to 4,096 GPUs, and plot throughput and lost work; "
        "default: plan.png in the run directory",
    )
    parser.add_argument(
        "--render",
        choices=["kuberay"],
        help="write ConfigMap, RayJob and RayService for `kubectl apply -f -` instead",
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
    parser.add_argument(
        "--cpus-per-node", metavar="N", type=int, help="--render: its CPUs, default 11 a GPU"
    )
    parser.add_argument(
        "--memory-per-node",
        metavar="GIB",
        type=int,
        help="--render: its memory, default 200 a GPU",
    )
    return parser
