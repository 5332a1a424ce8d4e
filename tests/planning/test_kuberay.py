"""What `rayrlhf plan --render kuberay` writes for every recipe: valid, large enough, sensible."""

import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rayrlhf import __version__, cli
from rayrlhf.config import Recipe, load, parse
from rayrlhf.planning import kuberay
from rayrlhf.planning.kuberay import render, serving
from rayrlhf.planning.pods import demands, on_gpu
from rayrlhf.planning.templates import NAME_LENGTH, RECIPE, VOLUME, object_name
from rayrlhf.rl.layout import plan
from rayrlhf.session import shortage
from tests.cluster.rules import check_rules
from tests.cluster.schemas import ROOT, Object, check, cluster_of, documents

RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
ON_GPUS = [
    "resources.num_workers=12",
    "resources.gpus_per_worker=1",
    *[f"resources.{role}.gpus=1" for role in ("actor", "critic", "reference", "reward")],
    "resources.rollout.gpus=2",
    "resources.rollout.num_workers=3",
]


def rendered(recipe: Recipe, *stages: str) -> list[Object]:
    return documents(render(recipe, stages=stages or ("pipeline",)))


def of_kind(found: list[Object], kind: str) -> list[Object]:
    return [each for each in found if each["kind"] == kind]


def nodes(found: Object) -> list[dict[str, float]]:
    """Return the resources of the worker nodes that a cluster starts with, in Ray's words."""
    cluster = cluster_of(found)
    assert cluster is not None
    pods = []
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = float(limits.get("nvidia.com/gpu", 0))
        pods += [{"CPU": float(limits["cpu"]), "GPU": gpus}] * group["replicas"]
    return pods


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
@pytest.mark.parametrize("each", [False, True], ids=["pipeline", "stages"])
def test_every_recipe_renders(file: Path, each: bool) -> None:
    recipe = load(file)
    stages = recipe.stages if each else ("pipeline",)
    found = rendered(recipe, *stages)
    for part in found:
        check(part)
        check_rules(part)
    jobs = of_kind(found, "RayJob")
    assert [job["metadata"]["name"] for job in jobs] == [
        object_name(recipe.name, stage) for stage in stages
    ]
    for job, stage in zip(jobs, stages, strict=True):
        for bundles in demands(recipe, (stage,)).values():
            assert shortage(bundles, nodes(job)) is None
    assert len(of_kind(found, "RayService")) == (serving(recipe) is not None)


@pytest.mark.parametrize("file", ["quickstart", "rounds"])
def test_a_recipe_on_gpus(file: str) -> None:
    recipe = load(ROOT / "configs" / f"{file}.yaml", ON_GPUS)
    found = rendered(recipe)
    for part in found:
        check(part)
        check_rules(part)
    (job,) = of_kind(found, "RayJob")
    assert plan(recipe, nodes(job)).bundles
    # 12 workers of pretraining are more than PPO's 4 + 3 engines of 2.
    gpus = [node["GPU"] for node in nodes(job) if node["GPU"]]
    assert gpus == [8, 8]
    (service,) = of_kind(found, "RayService")
    # An engine of two GPUs, and the reward model.
    assert [node["GPU"] for node in nodes(service)] == [3]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipe_in_it_is_the_one_that_was_given(file: Path) -> None:
    recipe = load(file)
    (part,) = of_kind(rendered(recipe), "ConfigMap")
    inside = parse(yaml.safe_load(part["data"]["recipe.yaml"]))
    assert inside.run_dir == f"{VOLUME}/runs/{recipe.name}"
    assert inside.resources.wait_s > 0
    resources = inside.resources.model_copy(update={"wait_s": recipe.resources.wait_s})
    same = inside.model_copy(update={"run_dir": recipe.run_dir, "resources": resources})
    assert same == recipe
    # Kubernetes refuses a ConfigMap of more than 1 MiB.
    assert len(part["data"]["recipe.yaml"]) < 100_000


@pytest.mark.parametrize(
    ("gpus", "layout", "served"),
    [(7, "disaggregated", [8]), (8, "disaggregated", [8, 8]), (16, "colocated", None)],
)
def test_a_large_engine_is_served_where_it_fits(
    gpus: int, layout: str, served: list[int] | None
) -> None:
    overrides = [*ON_GPUS, "resources.rollout.num_workers=1", f"resources.rollout.gpus={gpus}"]
    file = ROOT / "configs" / "quickstart.yaml"
    recipe = load(file, [*overrides, f"resources.layout={layout}"])
    services = of_kind(rendered(recipe), "RayService")
    assert ("# Not served: an engine takes 16 GPUs" in render(recipe)) == (served is None)
    assert [[node["GPU"] for node in nodes(each)] for each in services] == (
        [] if served is None else [served]
    )


def commands(entrypoint: str) -> list[list[str]]:
    """Return the words of each command, as the job's shell reads them behind the submitter's."""
    words = shlex.split(entrypoint)
    assert not {"&&", ";", "|"} & set(words)
    if words[:2] != ["bash", "-c"]:
        return [words]
    (script,) = words[2:]
    return [shlex.split(each) for each in script.split(" && ")]


@pytest.mark.parametrize("overrides", [[], ON_GPUS], ids=["cpu", "gpu"])
@pytest.mark.parametrize("stage", ["pipeline", "evaluate", "sft"])
def test_entrypoints_parse(overrides: list[str], stage: str) -> None:
    recipe = load(ROOT / "configs" / "quickstart.yaml", overrides)
    (job,) = of_kind(rendered(recipe, stage), "RayJob")
    ran = []
    for words in commands(job["spec"]["entrypoint"]):
        if words[0] == "env":
            assert words[1] == "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"
            assert words[2:8] == ["ray", "job", "submit", "--entrypoint-num-gpus", "1", "--"]
            words = words[8:]
        assert words[0] == "rayrlhf"
        args = cli._parser().parse_intermixed_args(words[1:])
        assert args.recipe == RECIPE
        left = load(ROOT / "configs" / "quickstart.yaml", [*overrides, *args.overrides])
        assert args.command in ("data", "pipeline", *left.stages)
        ran += left.stages if args.command == "pipeline" else [args.command]
    in_order = list(recipe.stages) if stage == "pipeline" else [stage]
    assert [each for each in ran if each != "data"] == in_order
    # The driver of an evaluation by itself is where a GPU is.
    has_gpu = "entrypointNumGpus" in job["spec"]
    assert has_gpu == (stage == "evaluate" and on_gpu(recipe))


def test_a_job_goes_on_where_it_was() -> None:
    (job,) = of_kind(rendered(load(ROOT / "configs" / "quickstart.yaml")), "RayJob")
    spec = job["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert spec["submissionMode"] == "K8sJobMode"
    assert "activeDeadlineSeconds" not in spec  # a long run is no failure
    assert (
        spec["preRunningDeadlineSeconds"]
        > spec["rayClusterSpec"]["autoscalerOptions"]["idleTimeoutSeconds"]
    )


def test_the_service_waits_for_its_model() -> None:
    (service,) = of_kind(rendered(load(ROOT / "configs" / "quickstart.yaml")), "RayService")
    assert service["spec"]["suspend"] is True
    served = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = served.applications
    assert application.import_path == kuberay.SERVE_APP
    assert application.args == {
        "recipe": RECIPE,
        "overrides": [
            "serve.follow=ppo",
            "serve.reward=/mnt/rayrlhf/runs/quickstart/reward/final",
        ],
    }


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        ("corpus/llama-mixture", [], None),
        ("instructgpt-sft", [], ["serve.follow=sft", "resources.rollout.gpus=1"]),
        ("quickstart", ["ppo=null"], ["serve.follow=dpo", "serve.reward=runs/x/reward/final"]),
        ("quickstart", ["serve.follow=sft"], []),
        (
            "rounds",
            [],
            [
                "serve.models={rounds: {path: runs/x/rounds/02/ppo/final}}",
                "serve.reward=runs/x/rounds/02/reward/final",
            ],
        ),
    ],
)
def test_what_is_served(file: str, overrides: list[str], expected: list[str] | None) -> None:
    recipe = load(ROOT / "configs" / f"{file}.yaml", [*overrides, "run_dir=runs/x"])
    found = serving(recipe)
    assert found == expected
    if found is not None:  # they are what `rayrlhf serve` takes
        served = load(ROOT / "configs" / f"{file}.yaml", [*overrides, *found]).serve
        assert served is not None and served.shares


def test_a_serve_section_says_how_many_pods_answer() -> None:
    section = "serve={models: {a: {path: x}, b: {path: y}}, replicas: 3}"
    recipe = load(ROOT / "configs" / "quickstart.yaml", [section])
    (service,) = of_kind(documents(render(recipe)), "RayService")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 6)


@pytest.mark.parametrize("overrides", [[], ON_GPUS], ids=["cpu", "gpu"])
def test_image_and_versions(overrides: list[str]) -> None:
    recipe = load(ROOT / "configs" / "quickstart.yaml", overrides)
    kind = "gpu" if overrides else "cpu"
    assert f"rayrlhf:{__version__}-{kind}" in render(recipe)
    text = render(recipe, image="registry.example/team/rayrlhf:1")
    images = {line.split()[-1] for line in text.splitlines() if " image: " in line}
    assert images == {"registry.example/team/rayrlhf:1"}
    for part in documents(text):
        if (cluster := cluster_of(part)) is not None:
            assert cluster["rayVersion"] == version("ray")


@pytest.mark.parametrize(
    ("name", "stage", "expected"),
    [
        ("quickstart", "ppo", "quickstart-ppo"),
        ("Llama_3.1-8B", "recipe", "llama-3-1-8b-recipe"),
        ("7b", "serve", "r7b-serve"),
        ("x" * 80, "pipeline", f"{'x' * 38}-pipeline"),
        ("a" * 37 + ".b", "pipeline", f"{'a' * 37}-pipeline"),
    ],
)
def test_names(name: str, stage: str, expected: str) -> None:
    assert object_name(name, stage) == expected
    assert len(expected) <= NAME_LENGTH


@pytest.mark.parametrize(
    ("run_dir", "expected"),
    [
        ("", "/mnt/rayrlhf/runs/quickstart"),
        ("runs/other", "/mnt/rayrlhf/runs/other"),
        ("/mnt/rayrlhf/x", "/mnt/rayrlhf/x"),
        ("file:///mnt/rayrlhf/x", "/mnt/rayrlhf/x"),
    ],
)
def test_the_run_directory_is_on_the_volume(run_dir: str, expected: str) -> None:
    recipe = load(ROOT / "configs" / "quickstart.yaml", [f"run_dir={run_dir!r}"])
    (part,) = of_kind(rendered(recipe), "ConfigMap")
    assert yaml.safe_load(part["data"]["recipe.yaml"])["run_dir"] == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run_dir=/data/x", "--render=kuberay"], "run_dir=/data/x: not on the volume"),
        (["run_dir=/mnt/rayrlhf/../x", "--render=kuberay"], "without .."),
        (["--render=kuberay", "--stage=dance"], "--stage=dance: the recipe has no such section"),
        (["--stage=sft"], "--stage=['sft'] goes with --render"),
        (["--render=kuberay", "--gpus-per-node=0"], "--gpus-per-node=0"),
        (
            ["--render=kuberay", "--gpus-per-node=2", "resources.rollout.gpus=4"],
            "4 GPUs are asked for on one node, and a GPU pod has at most 2",
        ),
    ],
)
def test_what_is_wrong_exits_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(ROOT / "configs" / "quickstart.yaml")
    options = [word for word in words if word.startswith("--")]
    overrides = [word for word in words if not word.startswith("--")]
    assert cli.main(["plan", recipe, *overrides, *options]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--render=kuberay", "--image=x", "--stage=sft"])
def test_the_options_go_with_plan_alone(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["sft", "configs/quickstart.yaml", option])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_the_command_prints_what_kubectl_reads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text("name: toy\nmodel: {path: m}\nsft: {train: demos.jsonl}\n")
    # Options may stand before the overrides, too.
    words = ["--render", "kuberay", "--stage", "sft", "seed=3", "--image", "there:1"]
    assert cli.main(["plan", str(file), *words]) == 0
    found = documents(capsys.readouterr().out)
    assert yaml.safe_load(found[0]["data"]["recipe.yaml"])["seed"] == 3
    assert [part["kind"] for part in found] == ["ConfigMap", "RayJob", "RayService"]
    assert sorted(tmp_path.iterdir()) == [file]  # nothing is begun
