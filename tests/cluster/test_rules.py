"""The checks of manifests find what is wrong: each of these is a mistake that one makes."""

import copy
from typing import Any

import pytest

from rayrlhf.config import load
from rayrlhf.planning.kuberay import render
from tests.cluster.kustomize import build
from tests.cluster.rules import check_rules
from tests.cluster.schemas import ROOT, Object, check, documents

POD = "spec.rayClusterSpec.workerGroupSpecs.0.template.spec"
CONTAINER = f"{POD}.containers.0"
REMOVED = object()


@pytest.fixture(scope="module")
def job() -> Object:
    """Return a sound RayJob on GPUs."""
    recipe = load(ROOT / "configs" / "instructgpt-sft.yaml")
    (found,) = (part for part in documents(render(recipe)) if part["kind"] == "RayJob")
    return found


def broken(job: Object, path: str, value: Any) -> Object:
    """Return a copy with another value at a dotted path, or without what is there."""
    found = copy.deepcopy(job)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node: Any = found
    for part in parents:
        node = node[part]
    if value is REMOVED:
        del node[last]
    else:
        node[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backoffLimits", 3),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", REMOVED),
        (f"{CONTAINER}.env.0.values", "x"),
        (f"{CONTAINER}.resources.limits.memory", ["1Gi"]),
        (f"{POD}.volumes.0.persistentVolumeClaim.claim", "rayrlhf"),
        ("metadata.labels.app", 1),
        ("metadata.name", "Upper"),
    ],
)
def test_a_schema_refuses(job: Object, path: str, value: Any) -> None:
    check(job)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(broken(job, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{CONTAINER}.resources.limits.nvidia~com/gpu", "8"),
        (f"{POD}.tolerations", []),
        (f"{POD}.securityContext.runAsNonRoot", False),
        (f"{CONTAINER}.image", "rayrlhf:latest"),
        (f"{CONTAINER}.image", "registry.example:5000/rayrlhf"),
        (f"{POD}.volumes.2.emptyDir.sizeLimit", "1Gi"),
        (f"{CONTAINER}.env.0", {"name": "HF_TOKEN", "value": "hf_abc"}),
        ("spec.rayClusterSpec.authOptions", {"mode": "disabled"}),
        ("spec.rayClusterSpec.rayVersion", "2.9.0"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams", {}),
        ("spec.rayClusterSpec.workerGroupSpecs.0.replicas", 99),
        (f"{POD}.restartPolicy", "Always"),
        (f"{CONTAINER}.workingDir", "/app"),
        ("spec.submitterPodTemplate.metadata.labels", {"app.kubernetes.io/part-of": "x"}),
    ],
)
def test_a_rule_refuses(job: Object, path: str, value: Any) -> None:
    check_rules(job)
    place = path.replace("nvidia~com", "nvidia\0com")
    found = broken(job, place, value)
    if "\0" in place:
        limits = found["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"][
            "containers"
        ][0]["resources"]["limits"]
        limits["nvidia.com/gpu"] = limits.pop("nvidia\0com/gpu")
    with pytest.raises((AssertionError, KeyError)):
        check_rules(found)


def test_plain_objects_have_schemas_too() -> None:
    found = {part["kind"]: part for part in build(ROOT / "cluster" / "kuberay" / "base")}
    policy = broken(found["NetworkPolicy"], "spec.podSelectors", {})
    with pytest.raises(pytest.fail.Exception, match="podSelectors"):
        check(policy)
