"""A recipe as KubeRay objects: `rayrlhf plan RECIPE --render kuberay | kubectl apply -f -`.

1 ConfigMap    the recipe, every default filled in, its run directory on the shared volume
2 RayJob       one per stage asked for, or one for the whole pipeline; a Ray cluster of its own
3 RayService   what the recipe ends with, served

Numbers and sizes of pods come from the recipe's own layout (pods.py). Volume, keys and network
policy are those of cluster/kuberay/base, which is applied once per namespace.
"""

import math
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import yaml

from rayrlhf import __version__, lineage
from rayrlhf.config import Recipe, RecipeError
from rayrlhf.planning.pods import Group, Node, groups, on_gpu
from rayrlhf.planning.templates import (
    CLAIM,
    IMAGE,
    PORTS,
    RECIPE,
    VOLUME,
    Object,
    container_security,
    labels,
    object_name,
    pod,
    submitter,
)

SERVE_APP = "rayrlhf.serving.openai:app"
"""The builder of the application that is served: it takes the path of a recipe, and overrides."""
REDIS = "rayrlhf-redis"
"""Service of the Redis that keeps what a cluster knows while its head is away, and the Secret with
its password."""

WAIT_S = 1800.0
"""resources.wait_s where the recipe has none: nodes come one by one, and images have gigabytes."""
IDLE_S = 600
"""Seconds after which the autoscaler takes an idle pod away."""
START_S = 3600
"""Seconds within which a job's cluster has to stand."""
KEEP_S = 3600
"""Seconds for which a finished job's cluster stays, for its logs."""
RETRIES = 3
"""New clusters after a failure: each goes on from the newest checkpoint in the run directory."""
HEAD_CPUS = 4
HEAD_GIB = 16
"""The driver is on the head: it evaluates there where the recipe has no GPU. Without a GPU, what
serves has as much."""


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and everything that repeats in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def render(
    recipe: Recipe,
    *,
    image: str | None = None,
    stages: Sequence[str] = ("pipeline",),
    node: Node | None = None,
) -> str:
    """Return YAML of several documents: the recipe, a RayJob per stage, a RayService of the result.

    `stages` are stages of the recipe, or `pipeline` for all of them in one job; `image` holds
    rayrlhf and defaults to that of cluster/docker; `node` is what a GPU pod may have at most.
    Raises RecipeError when a stage is not there, a worker fits on no node, or the run directory is
    not on the volume.
    """
    for stage in stages:
        if stage != "pipeline" and stage not in recipe.stages:
            raise RecipeError(
                f"--stage={stage}: the recipe has no such section: name one of "
                f"{', '.join(['pipeline', *recipe.stages])}"
            )
    placed = _on_the_volume(recipe)
    image = image or f"{IMAGE}:{__version__}-{'gpu' if on_gpu(recipe) else 'cpu'}"
    node = node or Node()
    objects = [_recipe_map(placed)]
    objects += [_job(placed, stage, groups(placed, (stage,), node), image) for stage in stages]
    overrides = serving(placed)
    heading = _heading(placed, stages, image)
    if placed.resources.rollout.gpus > node.gpus:
        heading += (
            f"# Not served: an engine takes {placed.resources.rollout.gpus:g} GPUs, and a node has "
            f"{node.gpus}.\n"
        )
    elif overrides is not None:
        objects.append(_service(placed, overrides, image, node))
    documents = [
        yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
        for each in objects
    ]
    return "---\n".join([heading, *documents])


def serving(recipe: Recipe) -> list[str] | None:
    """Return the overrides that have a recipe's result served; None where nothing answers prompts.

    What the recipe's own section `serve` says, or else: the newest policy answers, beside the
    reward model that trained it.
    """
    last = [stage for stage in ("pretrain", "sft", "dpo", "ppo") if stage in recipe.stages]
    folder = recipe.path
    chosen: list[str] = []
    if recipe.serve is None:
        if not last:
            return None
        chosen = [f"serve.follow={last[-1]}"]
        if recipe.rounds is not None:
            folder = recipe.path / lineage.round_folder(recipe.rounds.num_rounds)
            chosen = [f"serve.models={{rounds: {{path: {folder / lineage.OUTPUTS['ppo']}}}}}"]
        if "reward" in recipe.stages:
            chosen.append(f"serve.reward={folder / lineage.OUTPUTS['reward']}")
    if on_gpu(recipe) and not recipe.resources.rollout.gpus:
        chosen.append("resources.rollout.gpus=1")
    return chosen


def entrypoint(recipe: Recipe, stage: str) -> str:
    """Return the shell command of a job.

    The driver runs on the head, which has no GPU, and the evaluation computes in its driver: where
    the recipe has GPUs, the pipeline submits it as a job of its own, to a pod that has one. All
    data is checked before the first stage, that of the evaluation, too.
    """
    if stage != "pipeline" or "evaluate" not in recipe.stages or not on_gpu(recipe):
        return shlex.join(["rayrlhf", stage, RECIPE])
    # This variable and no option: RAY_ADDRESS, which every job has, wins over --address.
    here = f"RAY_API_SERVER_ADDRESS=http://127.0.0.1:{PORTS['dashboard']}"
    submit = ["env", here, "ray", "job", "submit", "--entrypoint-num-gpus", "1", "--"]
    script = " && ".join(
        shlex.join(words)
        for words in (
            ["rayrlhf", "data", RECIPE],
            ["rayrlhf", "pipeline", RECIPE, "evaluate=null"],
            [*submit, "rayrlhf", "evaluate", RECIPE],
        )
    )
    # KubeRay puts this into a command of the submitter's shell, which must not read the &&.
    return shlex.join(["bash", "-c", script])


def _on_the_volume(recipe: Recipe) -> Recipe:
    """Return the recipe as it runs in the cluster: on the volume, and waiting for its nodes."""
    place = PurePosixPath(recipe.path)
    if not place.is_absolute():
        place = VOLUME / (place if recipe.run_dir else f"runs/{recipe.name}")
    elif not place.is_relative_to(VOLUME):
        raise RecipeError(
            f"run_dir={recipe.run_dir}: not on the volume that all pods see at {VOLUME}: set "
            f"run_dir={VOLUME}/runs/{recipe.name}, or leave it empty"
        )
    if ".." in place.parts:
        raise RecipeError(f"run_dir={recipe.run_dir}: name the folder without ..")
    resources = recipe.resources
    if not resources.wait_s:
        resources = resources.model_copy(update={"wait_s": WAIT_S})
    return recipe.model_copy(update={"run_dir": str(place), "resources": resources})


def _heading(recipe: Recipe, stages: Sequence[str], image: str) -> str:
    return (
        f"# {recipe.name}: {', '.join(stages)}, written by `rayrlhf plan --render kuberay`.\n"
        f"# Image {image}; run directory {recipe.run_dir} on the volume of claim {CLAIM}.\n"
        "# cluster/kuberay/README.md says what has to be there before, and what to do next.\n"
    )


def _object(kind: str, name: str) -> Object:
    api = "v1" if kind == "ConfigMap" else "ray.io/v1"
    return {
        "apiVersion": api,
        "kind": kind,
        "metadata": {"name": name, "labels": labels(name)},
    }


def _recipe_map(recipe: Recipe) -> Object:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    file = PurePosixPath(RECIPE).name
    return _object("ConfigMap", object_name(recipe.name, "recipe")) | {"data": {file: text}}


def _job(recipe: Recipe, stage: str, workers: list[Group], image: str) -> Object:
    name = object_name(recipe.name, stage)
    spec: Object = {
        "entrypoint": entrypoint(recipe, stage),
        "submissionMode": "K8sJobMode",
        # A retry is a new cluster, and the command goes on from the newest checkpoint.
        "backoffLimit": RETRIES,
        "preRunningDeadlineSeconds": START_S,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEEP_S,
        # Jobs that queue up for a quota are suspended by what admits them, such as Kueue.
        "suspend": False,
    }
    if stage == "evaluate" and on_gpu(recipe):
        spec["entrypointNumGpus"] = 1
    spec["submitterPodTemplate"] = submitter(name, image)
    spec["submitterConfig"] = {"backoffLimit": RETRIES}
    spec["rayClusterSpec"] = _cluster(recipe, name, workers, image)
    return _object("RayJob", name) | {"spec": spec}


def _service(recipe: Recipe, overrides: Sequence[str], image: str, node: Node) -> Object:
    name = object_name(recipe.name, "serve")
    application = {
        "name": IMAGE,
        "import_path": SERVE_APP,
        "route_prefix": "/",
        "args": {"recipe": RECIPE, "overrides": list(overrides)},
    }
    cluster = _cluster(recipe, name, _serving_groups(recipe, node), image)
    cluster["gcsFaultToleranceOptions"] = {
        "redisAddress": "rayrlhf-redis:6379",
        "redisPassword": {
            "valueFrom": {"secretKeyRef": {"name": "rayrlhf-redis", "key": "password"}}
        },
    }
    spec = {
        # There is nothing to serve before the job is done: then `kubectl patch` sets this to false.
        "suspend": True,
        "serviceUnhealthySecondThreshold": 900,
        "deploymentUnhealthySecondThreshold": 300,
        # The head only manages; requests go to the pods that compute.
        "excludeHeadPodFromServeSvc": True,
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterDeletionDelaySeconds": 60,
        "serveConfigV2": yaml.safe_dump(
            {"proxy_location": "EveryNode", "applications": [application]}, sort_keys=False
        ),
        "rayClusterConfig": cluster,
    }
    return _object("RayService", name) | {"spec": spec}


def _serving_groups(recipe: Recipe, node: Node) -> list[Group]:
    """Return pods for the engines, and for the reward model.

    As many as the section `serve` has engines, or else at most as many as PPO has, from one on.
    The reward model is beside an engine where a node holds both, and else on a pod of its own.
    """
    engine, scorer = recipe.resources.rollout, recipe.resources.reward
    most, scored = max(1, engine.num_workers), "reward" in recipe.stages
    if recipe.serve is not None:
        most, scored = len(recipe.serve.shares) * recipe.serve.replicas, bool(recipe.serve.reward)
    if not on_gpu(recipe):
        return [Group("cpu", HEAD_CPUS, 0, HEAD_GIB, 1, most, 1)]
    scores = scorer.gpus if scored else 0
    gpus = math.ceil((engine.gpus or 1) + scores - 1e-6)
    least = 1
    if gpus > node.gpus:
        gpus, least, most = node.gpus, 2, most + 1
    cpus = max(node.cpus * gpus // node.gpus, math.ceil(engine.cpus + scorer.cpus) + 1)
    return [Group("gpu", cpus, gpus, node.memory_gib * gpus // node.gpus, least, most, least)]


def _cluster(recipe: Recipe, name: str, workers: list[Group], image: str) -> Object:
    head = Group("head", HEAD_CPUS, 0, HEAD_GIB, 1, 1)
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": IDLE_S,
            "resources": {
                "requests": {"cpu": "500m", "memory": "1Gi"},
                "limits": {"cpu": "500m", "memory": "1Gi"},
            },
            "securityContext": container_security(),
        },
        "headGroupSpec": {
            # Work goes to the workers: the head has the driver, and keeps the cluster's state.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": pod(recipe, name, head, image),
        },
        "workerGroupSpecs": [
            {
                "groupName": group.name,
                "replicas": group.replicas,
                "minReplicas": group.min_replicas,
                "maxReplicas": group.max_replicas,
                "rayStartParams": {},
                "template": pod(recipe, name, group, image),
            }
            for group in workers
        ],
    }
