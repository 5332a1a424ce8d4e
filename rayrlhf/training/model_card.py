"""The model card of a `final/`: what the model is, where it comes from, and how to load it.

It is no part of the model: neither the manifest of the folder nor its hash covers it, so that
seconds and versions may differ between two runs that give the same weights.
"""

from pathlib import Path
from typing import Any

import yaml

from rayrlhf import lineage
from rayrlhf.config import Recipe
from rayrlhf.data import builtin
from rayrlhf.data.files import data_files
from rayrlhf.metrics import read_jsonl

SMOLLM2 = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
"""Of the built-in model."""
SHOWN = ("loss", "pair_accuracy", "reward/score_mean", "kl/ref_per_response", "policy/entropy")
"""Final metrics that a card shows, beside all of `eval/`."""


def write_card(recipe: Recipe, stage: str, folder: Path, best_step: int | None = None) -> None:
    """Write README.md into `folder`, which becomes the `final/` beside it; one process calls it.

    The model is that of the last step in the metrics.jsonl beside it, or that of `best_step`.
    Hashes of the inputs are those that the pipeline noted at the start of the stage; a stage that
    runs without it has none.
    """
    start = _start(recipe, stage)
    steps = [
        line
        for line in read_jsonl(folder.parent / "metrics.jsonl")
        if best_step is None or line["step"] <= best_step
    ]
    is_scorer = stage == "reward"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if is_scorer else "text-generation",
        **_origin(start),
        "tags": ["rayrlhf", stage],
    }
    place = folder.parent / "final"
    kind = "AutoModelForSequenceClassification" if is_scorer else "AutoModelForCausalLM"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {recipe.name}: {stage}",
        f"Trained by `rayrlhf {stage}` from {f'`{start}`' if start else 'random weights'}.",
        f"```python\nfrom transformers import AutoTokenizer, {kind}\n"
        f'model = {kind}.from_pretrained("{place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n```',
    ]
    if is_scorer:
        parts.append(
            "The score of a text is the logit at its last token minus `score_shift` of config.json."
        )
    parts += ["## Training", _table(_training(recipe, steps)), "## Inputs", _inputs(recipe, stage)]
    parts += ["## Software", _table({"commit": lineage.commit() or "", **lineage.versions()})]
    text = "\n\n".join(parts) + "\n"
    (folder / lineage.CARD).write_text(text, encoding="utf-8")


def _start(recipe: Recipe, stage: str) -> str | None:
    """Return the folder or name of the model that a stage starts from; None: random weights."""
    if stage == "pretrain":
        assert recipe.pretrain is not None
        return recipe.pretrain.init or recipe.model.path
    return lineage.start_model(recipe, stage)


def _origin(start: str | None) -> dict[str, str]:
    """Return the base model and its license, as far as they are known without a network."""
    if start is None:
        return {}
    if start == builtin.PREFIX + builtin.SMOLLM2:
        return SMOLLM2
    if not Path(start).exists():
        return {"base_model": start}  # a hub's name
    card = Path(start) / lineage.CARD
    front = read_front(card.read_text(encoding="utf-8")) if card.is_file() else {}
    return {key: front[key] for key in ("base_model", "license") if key in front}


def read_front(card: str) -> dict[str, Any]:
    """Return the YAML that a model card begins with; {} without."""
    if not card.startswith("---\n"):
        return {}
    front = yaml.safe_load(card[4:].partition("\n---")[0])
    return front if isinstance(front, dict) else {}


def _training(recipe: Recipe, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the lines of metrics.jsonl add up to, and the last of the metrics."""
    last: dict[str, Any] = {}
    for step in steps:
        last |= {
            name: value
            for name, value in step.items()
            if value is not None and (name in SHOWN or name.startswith("eval/"))
        }
    tokens = sum(step.get("tokens", 0) for step in steps)
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "steps": len(steps),
        **({"tokens": f"{tokens:.0f}"} if tokens else {}),
        **{name: f"{value:.4g}" for name, value in last.items()},
        "seconds": f"{sum(step.get('time/step_s', 0.0) for step in steps):.0f}",
    }


def _inputs(recipe: Recipe, stage: str) -> str:
    """Return a table of what the stage has read: name, path where it has one, hash."""
    noted = lineage.read_json(recipe.path / lineage.BEGUN).get(stage, {})
    paths = {f"{f.stage}.{f.key}": f.path for f in data_files(recipe) if f.stage == stage}
    rows = {name: paths.get(name, "") for name in (*paths, *noted)}
    lines = [f"| {name} | {path} | {noted.get(name, '')} |" for name, path in rows.items()]
    return "\n".join(["| input | path | hash |", "|---|---|---|", *lines])


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
