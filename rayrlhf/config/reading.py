"""YAML and overrides into a recipe, and what is wrong into lines that name the fix."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rayrlhf.config.corpus import SourceConfig
from rayrlhf.config.recipe import Recipe
from rayrlhf.config.section import RecipeError


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, apply `key.sub=value` overrides, and check all of it.

    Values of overrides are YAML: `ppo.steps=20`, `sft=null`, `tracking=[tensorboard]`.
    Raises RecipeError with the value, the rule and the fix.
    """
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(
            str(file), [str(found) for found in sorted(file.parent.glob("*.y*ml"))], n=1, cutoff=0
        )
        raise RecipeError(
            f"{file}: no such recipe" + (f"; did you mean {near[0]}?" if near else "")
        )
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{file}: a recipe is a mapping with at least `name:`, not {type(tree).__name__}"
        )
    for override in overrides:
        _apply(tree, override)
    return parse(tree, origin=str(file))


def parse(tree: Mapping[str, Any], *, origin: str = "recipe") -> Recipe:
    """Build a Recipe from plain data; `origin` opens the message of a RecipeError."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [
            _explain(found["loc"], found["type"], found["msg"], found.get("input"))
            for found in error.errors()
        ]
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        raise RecipeError(f"{origin}: " + "\n".join(lines[:2]) + more) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in `tree`, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override}: an override is key.sub=value, for example ppo.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"{override}: the value is not valid YAML; quote it") from None
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"{override}: {parent} is the value {child!r}, not a section")
        node = child
    node[leaf] = value


def _fields(loc: Sequence[int | str]) -> list[str]:
    """Names of the fields of the section that holds the last key of `loc`."""
    section: type[BaseModel] = Recipe
    for key in loc[:-1]:
        if isinstance(key, int):  # a section in a list
            continue
        field = section.model_fields.get(key)
        if field is None:
            return list(SourceConfig.model_fields) if "sources" in loc else []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            continue
        section = found[0]
    return list(SourceConfig.model_fields if "sources" in loc[:-1] else section.model_fields)


def _explain(loc: Sequence[int | str], kind: str, message: str, value: Any) -> str:
    """Turn one pydantic error into the value, the rule and the fix."""
    key = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), _fields(loc), n=1, cutoff=0)
        return f"unknown key {key}: did you mean {'.'.join([*map(str, loc[:-1]), *near])}?"
    if kind == "missing":
        return f"{key} is missing: add it to the recipe, or pass {key}=VALUE"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    rule = message[0].lower() + message[1:]
    return f"{key}={value!r}: {rule}; set {key} to a value that fits"
