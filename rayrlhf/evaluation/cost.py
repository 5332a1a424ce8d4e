"""What RLHF costs, by what the models answer: asked in every way, then measured.

few_shot   the base model with demonstrations before each prompt   arXiv:2203.02155
variety    many answers of every model to one prompt
hacking    answers that look hacked, and by which rule
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import EvaluateConfig, Recipe
from rayrlhf.data.datasets import Record, read_records
from rayrlhf.evaluation.answering import Answerer, Prompt, answer_prompts
from rayrlhf.evaluation.bootstrap import as_dict
from rayrlhf.evaluation.few_shot import MODEL, FewShot, as_answers, with_demonstrations
from rayrlhf.evaluation.hacking import hacking
from rayrlhf.evaluation.judges import Answer, Judge
from rayrlhf.evaluation.ratings import win_rate
from rayrlhf.evaluation.variety import variety

Floats = npt.NDArray[np.float64]

_VARIETY = 2  # a stream of random numbers


@dataclass
class Asked:
    """What the models answered."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """One to each prompt, by model."""
    repeated: dict[str, list[list[Answer]]] = field(default_factory=dict)
    """Many to each of some prompts, by model; {} without evaluate.variety."""
    few_shot: list[Answer] = field(default_factory=list)
    """Of the prompted base model, one to each prompt; [] without evaluate.few_shot."""
    num_demonstrations: list[int] = field(default_factory=list)
    """How many each of its prompts had."""
    demonstrations: list[str] = field(default_factory=list)
    """Responses of the demonstrations that SFT learned from; [] without evaluate.few_shot."""


def demonstrations_of(recipe: Recipe) -> list[Record]:
    """Return SFT's demonstrations, where something here reads them; else []."""
    cfg = recipe.evaluate
    if recipe.sft is None or cfg is None or cfg.few_shot is None:
        return []
    return read_records(recipe.sft.train, "demonstration")


def ask(  # noqa: PLR0913 (models, prompts, demonstrations, and what they are read with)
    models: Mapping[str, str],
    prompts: Sequence[Prompt],
    demonstrations: Sequence[Record],
    answerer: Answerer,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    cfg: EvaluateConfig,
) -> Asked:
    """Let every model answer every prompt, with the same random seed per prompt for all models."""
    asked = Asked(demonstrations=[_response(record) for record in demonstrations])
    for name, given in answer_prompts(answerer, models, prompts, seed=recipe.seed):
        asked.answers[name] = given
        if cfg.variety is not None:
            asked.repeated[name] = answerer.answer_often(
                prompts[: cfg.variety.prompts], cfg.variety.samples, stream=_VARIETY
            )
        if name == "base" and cfg.few_shot is not None:
            shown: FewShot = with_demonstrations(
                prompts,
                demonstrations,
                tokenizer,
                cfg.few_shot,
                room=recipe.model.max_length - cfg.max_response_tokens,
                seed=recipe.seed,
            )
            with_them = {name: models[name]}
            [(_, prompted)] = answer_prompts(answerer, with_them, shown.prompts, seed=recipe.seed)
            asked.few_shot = as_answers(prompted, prompts, tokenizer, cfg.few_shot)
            asked.num_demonstrations = shown.counts
    answerer.release()
    return asked


def _response(record: Record) -> str:
    said = record["messages"][-1]["content"] if "messages" in record else record["response"]
    return str(said)


def measure(
    asked: Asked,
    judges: Sequence[Judge],
    scores: Mapping[str, Mapping[str, Floats]],
    *,
    reference: str,
    trained: str,
    recipe: Recipe,
) -> dict[str, Any]:
    """Return `variety`, `few_shot` and `hacking` of results.json; no forward pass of a policy."""
    cfg, seed = recipe.evaluate, recipe.seed
    assert cfg is not None, "the caller reads it, too"
    few_shot = None
    if cfg.few_shot is not None and asked.few_shot:
        found = {judge.name: judge.score(asked.few_shot) for judge in judges}
        few_shot = {
            "model": MODEL,
            "separator": cfg.few_shot.separator,
            "demonstrations": cfg.few_shot.demonstrations,
            "mean_demonstrations": float(np.mean(asked.num_demonstrations)),
            "win_rate": {
                judge: as_dict(win_rate(values, scores[judge][reference]))
                for judge, values in found.items()
            },
        }
    return {
        "variety": variety(asked.answers, asked.repeated, seed=seed),
        "variety_samples": cfg.variety.samples if cfg.variety else None,
        "few_shot": few_shot,
        "hacking": hacking(
            asked.answers,
            scores,
            reference=reference,
            trained=trained,
            demonstrations=asked.demonstrations,
            num_shown=cfg.num_samples,
        ),
    }
