"""The manifests of cluster/kuberay: valid, of the sizes that they are named for, and all in use."""

from pathlib import Path

import pytest

from rayrlhf import __version__
from rayrlhf.planning import kuberay, templates
from rayrlhf.planning.pods import Node
from tests.cluster.kustomize import build, files
from tests.cluster.rules import GPU, check_rules
from tests.cluster.schemas import ROOT, Object, check, cluster_of

FOLDER = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted((FOLDER / "overlays").iterdir())


def find(found: list[Object], kind: str, name: str) -> Object:
    (each,) = (e for e in found if e["kind"] == kind and e["metadata"]["name"] == name)
    return each


def ray_cluster(overlay: str) -> Object:
    cluster = cluster_of(find(build(FOLDER / "overlays" / overlay), "RayCluster", "rayrlhf"))
    assert cluster is not None
    return cluster


@pytest.mark.parametrize("folder", [FOLDER / "base", *OVERLAYS], ids=lambda folder: folder.name)
def test_it_is_valid(folder: Path) -> None:
    found = build(folder)
    names = [(each["kind"], each["metadata"]["name"]) for each in found]
    assert len(set(names)) == len(names)
    for each in found:
        check(each)
        check_rules(each)
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == "rayrlhf"


def test_nothing_lies_about() -> None:
    used = set().union(*(files(folder) for folder in OVERLAYS))
    there = set(FOLDER.rglob("*.yaml"))
    assert {file.resolve() for file in used} == {file.resolve() for file in there}


@pytest.mark.parametrize(("overlay", "gpus"), [("dev", 0), ("8xh100", 8), ("64xh100", 64)])
def test_an_overlay_has_its_gpus(overlay: str, gpus: int) -> None:
    total = 0
    for group in ray_cluster(overlay)["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        total += group["maxReplicas"] * int(limits.get(GPU, 0))
        if GPU in limits:
            assert group["minReplicas"] == group["replicas"] == 0  # they come when asked for
            selector = group["template"]["spec"]["nodeSelector"]
            assert selector["nvidia.com/gpu.product"].startswith("NVIDIA-H100")
            whole = Node()
            assert limits == {
                "cpu": str(whole.cpus),
                "memory": f"{whole.memory_gib}Gi",
                GPU: str(whole.gpus),
            }
    assert total == gpus


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_images_are_those_of_this_version(folder: Path) -> None:
    kind = "cpu" if folder.name == "dev" else "gpu"
    cluster = ray_cluster(folder.name)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == f"{templates.IMAGE}:{__version__}-{kind}"


def test_what_jobs_refer_to_is_in_the_base() -> None:
    found = build(FOLDER / "base")
    find(found, "PersistentVolumeClaim", templates.CLAIM)
    service = find(found, "Service", kuberay.REDIS)
    assert service["spec"]["ports"][0]["port"] == 6379
    redis = find(found, "StatefulSet", kuberay.REDIS)
    assert redis["spec"]["template"]["metadata"]["labels"].items() >= (
        service["spec"]["selector"].items()
    )
    policy = find(found, "NetworkPolicy", "rayrlhf")
    assert policy["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/part-of": "rayrlhf"}
    cluster = ray_cluster("8xh100")
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == f"{kuberay.REDIS}:6379"


def test_a_lost_head_comes_back_to_its_workers() -> None:
    budget = find(build(FOLDER / "base"), "PodDisruptionBudget", "rayrlhf-head")
    assert budget["spec"]["minAvailable"] == 1
    assert budget["spec"]["selector"]["matchLabels"]["ray.io/cluster"] == "rayrlhf"
    secret = ray_cluster("64xh100")["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert secret == {"secretKeyRef": {"name": kuberay.REDIS, "key": "password"}}
