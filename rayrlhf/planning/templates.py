"""Templates of the pods of a Ray cluster: what every one of them has, whatever its size.

No root, no rights beyond an ordinary process, the shared volume as working directory, the recipe as
a file, /dev/shm for Ray's object store. Probes and the commands that start Ray are KubeRay's.
"""

import re
from pathlib import PurePosixPath
from typing import Any

from rayrlhf import __version__
from rayrlhf.config import Recipe
from rayrlhf.planning.pods import Group

Object = dict[str, Any]

IMAGE = "rayrlhf"
"""Name of the images of cluster/docker, without a registry: a cluster that loads them by hand."""
CLAIM = "rayrlhf"
"""PersistentVolumeClaim of the shared volume."""
KEYS = "rayrlhf-keys"
"""Secret whose entries are environment variables of every pod, such as HF_TOKEN; may be missing."""
VOLUME = PurePosixPath("/mnt/rayrlhf")
"""Where the volume is; also the working directory, from which relative data paths are taken."""
RECIPE = "/etc/rayrlhf/recipe.yaml"
USER = 1000
"""User and group of the images of cluster/docker."""
NAME_LENGTH = 47
"""KubeRay's limit for a RayJob or RayService, which adds to it for the names of its pods."""
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
SERVE_PORT = 8000
SHM_PART = 0.4
"""Part of a pod's memory for /dev/shm: Ray's object store takes 0.3, NCCL and loaders the rest."""


def object_name(name: str, stage: str) -> str:
    """Return a Kubernetes name for a stage of a recipe: a DNS label that KubeRay accepts."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"r{label}"
    return f"{label[: NAME_LENGTH - len(stage) - 1].rstrip('-')}-{stage}"


def labels(name: str) -> dict[str, str]:
    """Return the labels of an object; `part-of` is what the network policy goes by."""
    return {
        "app.kubernetes.io/name": IMAGE,
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/part-of": IMAGE,
        "app.kubernetes.io/managed-by": "rayrlhf-plan",
    }


def submitter(name: str, image: str) -> Object:
    """Return the pod that submits the job and follows its log; KubeRay fills in its command."""
    sizes = {"cpu": "500m", "memory": "1Gi"}
    container = {
        "name": "ray-job-submitter",
        "image": image,
        "resources": {"requests": sizes, "limits": sizes},
        "securityContext": container_security(),
    }
    return {
        "metadata": {"labels": labels(name)},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": _pod_security(),
            "nodeSelector": _nodes(),
            "containers": [container],
        },
    }


def pod(recipe: Recipe, name: str, group: Group, image: str) -> Object:
    """Return the template of a group's pods; probes and the start command are KubeRay's."""
    is_head = group.name == "head"
    sizes = {"cpu": str(group.cpus), "memory": f"{group.memory_gib}Gi"}
    if group.gpus:
        sizes["nvidia.com/gpu"] = str(group.gpus)
    ports = (PORTS | {"serve": SERVE_PORT}) if is_head else {"metrics": 8080, "serve": SERVE_PORT}
    container: Object = {
        "name": "ray-head" if is_head else "ray-worker",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": str(VOLUME),
        "env": [
            {"name": "RAYRLHF_CACHE", "value": f"{VOLUME}/cache"},
            {"name": "HF_HOME", "value": f"{VOLUME}/cache/huggingface"},
        ],
        "envFrom": [{"secretRef": {"name": KEYS, "optional": True}}],
        "ports": [{"name": each, "containerPort": port} for each, port in ports.items()],
        "resources": {"requests": sizes, "limits": sizes},
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "runs", "mountPath": str(VOLUME)},
            {"name": "recipe", "mountPath": str(PurePosixPath(RECIPE).parent), "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    shm = f"{int(group.memory_gib * SHM_PART)}Gi"
    spec: Object = {
        "restartPolicy": "Never",  # the second autoscaler replaces pods, and none restarts
        "securityContext": _pod_security(),
        "nodeSelector": _nodes(),
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": CLAIM}},
            {"name": "recipe", "configMap": {"name": object_name(recipe.name, "recipe")}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}},
        ],
    }
    if not is_head:  # the autoscaler, which is on the head, talks to Kubernetes
        spec["automountServiceAccountToken"] = False
    if group.gpus:
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    # To clear a node in the middle of a run costs all steps since the last checkpoint.
    keep = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    return {"metadata": {"labels": labels(name), "annotations": keep}, "spec": spec}


def _nodes() -> dict[str, str]:
    """Return the label of nodes for which the images are built."""
    return {"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}


def _pod_security() -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",  # a volume of checkpoints takes long to walk
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Object:
    """Return the security context of every container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
