"""What holds for every object that is written for Kubernetes, beyond its schema."""

import re
from importlib.metadata import version
from typing import Any

from tests.cluster.schemas import Object, cluster_of, templates, title

KEY = re.compile(r"(password|passwd|token|secret|api_?key)", re.IGNORECASE)
GPU = "nvidia.com/gpu"


def check_rules(found: Object) -> None:
    """Fail where an object would not do what it is for."""
    _no_plain_secret(found, title(found))
    assert found["metadata"]["labels"]["app.kubernetes.io/part-of"] == "rayrlhf", title(found)
    claims = found.get("spec", {}).get("volumeClaimTemplates", [])
    for template in templates(found):
        _check_pod(template, {claim["metadata"]["name"] for claim in claims}, title(found))
    if (cluster := cluster_of(found)) is not None:
        _check_cluster(cluster, title(found))


def _check_pod(template: Object, claims: set[str], where: str) -> None:
    spec = template["spec"]
    # The network policy finds pods by it.
    assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "rayrlhf", where
    assert spec["securityContext"]["runAsNonRoot"] is True, where
    assert spec["securityContext"]["runAsUser"] > 0, where
    assert spec["nodeSelector"]["kubernetes.io/arch"] == "amd64", where
    names = claims | {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, where
        assert security["capabilities"] == {"drop": ["ALL"]}, where
        tag = container["image"].rpartition(":")[2]
        assert tag and tag != "latest" and "/" not in tag, where
        sizes = container["resources"]
        assert {"cpu", "memory"} <= set(sizes["requests"]), where
        assert sizes["requests"].get(GPU) == sizes["limits"].get(GPU), where
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= names, where
        if sizes["limits"].get(GPU):
            assert any(
                each["key"] == GPU and each["operator"] == "Exists" for each in spec["tolerations"]
            ), where


def _check_cluster(cluster: Object, where: str) -> None:
    assert cluster["rayVersion"] == version("ray"), where
    assert cluster["authOptions"] == {"mode": "token"}, where
    assert cluster["enableInTreeAutoscaling"] is True, where
    assert cluster["autoscalerOptions"]["version"] == "v2", where
    # Nothing of a job computes on the head, nor of Serve.
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", where
    groups = cluster["workerGroupSpecs"]
    for each in [cluster["headGroupSpec"], *groups]:
        spec = each["template"]["spec"]
        # The second version of the autoscaler refuses everything else.
        assert spec["restartPolicy"] == "Never", where
        (container,) = spec["containers"]
        _check_shared_memory(spec, container, where)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["runs"] == container["workingDir"] == "/mnt/rayrlhf", where
        assert mounts["shm"] == "/dev/shm", where
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], where
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert (GPU in limits) == (group["groupName"] == "gpu"), where
    assert len({group["groupName"] for group in groups}) == len(groups), where


def _check_shared_memory(spec: Object, container: Object, where: str) -> None:
    """Ray's object store takes 30% of the memory that it sees, if /dev/shm has as much."""
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    shm = volumes["shm"]["emptyDir"]
    assert shm["medium"] == "Memory", where
    memory = container["resources"]["limits"]["memory"]
    assert 0.3 <= gib(shm["sizeLimit"]) / gib(memory) <= 0.5, where
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "rayrlhf"}, where


def gib(size: str) -> float:
    return float(size.removesuffix("Gi"))


def _no_plain_secret(part: Any, where: str) -> None:
    """Fail for a literal value under a name that sounds like a secret's."""
    if isinstance(part, list):
        for each in part:
            _no_plain_secret(each, where)
    elif isinstance(part, dict):
        assert part.get("kind") != "Secret", where
        for name, value in part.items():
            # `mode: token` and the names of secrets are no secrets.
            is_text = isinstance(value, str) and name not in ("secretName", "tokenizer")
            assert not (is_text and KEY.search(str(name))), f"{where}: {name}"
            _no_plain_secret(value, where)
        if isinstance(part.get("name"), str) and KEY.search(part["name"]):
            assert "value" not in part, f"{where}: {part['name']}"
