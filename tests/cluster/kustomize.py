"""The plain rules of kustomize that cluster/kuberay keeps to; anything else is an error.

`resources` (files and folders), `namespace`, `labels` of metadata, `images` (a new tag), and
`patches` that are lists of JSON-patch operations (RFC 6902) for one object.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.schemas import Object, documents

KNOWN = {"apiVersion", "kind", "resources", "namespace", "labels", "images", "patches"}


def build(folder: Path) -> list[Object]:
    """Return what `kustomize build` writes for a folder, in the order of its resources."""
    plan: Object = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(plan) <= KNOWN, f"{folder}: {set(plan) - KNOWN}"
    found: list[Object] = []
    for name in plan["resources"]:
        path = (folder / name).resolve()
        found += build(path) if path.is_dir() else documents(path.read_text(encoding="utf-8"))
    # YAML's anchors make parts of an object the same one in memory.
    found = [_apart(each) for each in found]
    for patch in plan.get("patches", []):
        assert set(patch) == {"path", "target"} and set(patch["target"]) == {"kind", "name"}
        (target,) = (
            each
            for each in found
            if patch["target"] == {"kind": each["kind"], "name": each["metadata"]["name"]}
        )
        for operation in yaml.safe_load((folder / patch["path"]).read_text(encoding="utf-8")):
            _apply(target, operation)
    for each in found:
        if "namespace" in plan and each["kind"] != "Namespace":
            each["metadata"]["namespace"] = plan["namespace"]
        for label in plan.get("labels", []):
            assert set(label) == {"pairs"}
            each["metadata"].setdefault("labels", {}).update(label["pairs"])
        for image in plan.get("images", []):
            assert set(image) == {"name", "newTag"}
            _retag(each, image["name"], image["newTag"])
    return found


def files(folder: Path) -> set[Path]:
    """Return every file that building a folder reads."""
    place = folder / "kustomization.yaml"
    plan = yaml.safe_load(place.read_text(encoding="utf-8"))
    found = {place, *(folder / patch["path"] for patch in plan.get("patches", []))}
    for name in plan["resources"]:
        path = (folder / name).resolve()
        found |= files(path) if path.is_dir() else {path}
    return found


def _apart(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _apart(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_apart(each) for each in part]
    return copy.copy(part)


def _apply(target: Any, operation: Object) -> None:
    """Apply one operation in place; what it names has to be there, as RFC 6902 has it."""
    *parents, last = [
        part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
    ]
    node = target
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    key: Any = int(last) if isinstance(node, list) else last
    match operation["op"]:
        case "test":
            assert node[key] == operation["value"], operation
        case "remove":
            del node[key]
        case "replace":
            assert node[key] != operation["value"], f"{operation} changes nothing"
            node[key] = _apart(operation["value"])
        case "add":
            assert isinstance(node, dict) and key not in node, operation
            node[key] = _apart(operation["value"])
        case other:
            raise AssertionError(f"{other} is not one of the rules in use")


def _retag(part: Any, name: str, tag: str) -> None:
    if isinstance(part, list):
        for each in part:
            _retag(each, name, tag)
    elif isinstance(part, dict):
        for container in part.get("containers", []):
            if container["image"].rpartition(":")[0] == name:
                container["image"] = f"{name}:{tag}"
        for value in part.values():
            _retag(value, name, tag)
