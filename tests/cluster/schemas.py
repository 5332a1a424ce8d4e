"""Checks of Kubernetes objects against KubeRay's own schemas and those of Kubernetes."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared" / "kuberay-crds"
KUBERNETES = "1.33"
"""The oldest version that is still looked after when these files were written."""

Object = dict[str, Any]


def check(found: Object) -> None:
    """Fail where an object breaks its schema, or has a field that the schema lacks."""
    if found["apiVersion"].startswith("ray.io/"):
        _check_ray(found)
        for template in templates(found):
            _check_kubernetes({"apiVersion": "v1", "kind": "PodTemplateSpec", **template}, found)
    elif found["kind"] != "Kustomization":
        _check_kubernetes(found, found)


def _check_kubernetes(part: Object, whole: Object) -> None:
    spec = dict(part)
    if part["kind"] == "PodTemplateSpec":  # it has no kind of its own: it stands in a PodTemplate
        template = {key: value for key, value in part.items() if key not in ("apiVersion", "kind")}
        spec = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
    try:
        kubernetes_validate.validate(spec, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        place = ".".join(map(str, error.path))
        pytest.fail(f"{title(whole)}: {place}: {error.message[:300]}")


def _check_ray(found: Object) -> None:
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is missing")
    group, _, api = found["apiVersion"].partition("/")
    file = CRDS / f"{group}_{found['kind'].lower()}s.yaml"
    errors = [
        f"{title(found)}: {'.'.join(map(str, error.path))}: {error.message[:300]}"
        for error in _validator(file, api).iter_errors(found)
    ]
    assert errors == []


@cache
def _validator(file: Path, api: str) -> Any:
    definition = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    (schema,) = (
        each["schema"]["openAPIV3Schema"]
        for each in definition["spec"]["versions"]
        if each["name"] == api and each["served"]
    )
    strict = _strict(copy.deepcopy(schema))
    # The names and labels of an object: a schema of a custom resource leaves them to Kubernetes.
    strict["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
            "namespace": {"type": "string"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    return jsonschema.Draft202012Validator(strict)


def _strict(schema: Any) -> Any:
    """Refuse fields that the schema does not name, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    schema = {
        key: {name: _strict(each) for name, each in value.items()}
        if key == "properties"
        else _strict(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def title(found: Object) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


def cluster_of(found: Object) -> Object | None:
    """Return the specification of the Ray cluster in an object, if there is one."""
    places = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    if found["kind"] not in places:
        return None
    key = places[found["kind"]]
    cluster: Object = found["spec"] if key is None else found["spec"][key]
    return cluster


def templates(found: Object) -> Iterator[Object]:
    """Yield the pod templates in an object."""
    if (cluster := cluster_of(found)) is not None:
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster.get("workerGroupSpecs", []))
    if "submitterPodTemplate" in found.get("spec", {}):
        yield found["spec"]["submitterPodTemplate"]
    if found["kind"] in ("Deployment", "StatefulSet", "Job"):
        yield found["spec"]["template"]


def documents(text: str) -> list[Object]:
    return [each for each in yaml.safe_load_all(text) if each]
