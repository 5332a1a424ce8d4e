"""Compare the stages of a run on held-out prompts and texts; write results.json and report.html.

    1 answer    every model answers the same prompts                      vLLM, one engine
    2 judge     VADER and the reward model score every answer
    3 compare   win rates, ratings, battles, entropy, distinct-2, KL, held-out loss
    4 agree     the reward model, VADER and people on the same held-out texts
    5 report    results.json, figures, report.html

Models of `evaluate.models` answer too, and fight; all else is about the stages of the run.
Everything runs in this one process: at the size of an evaluation no cluster pays off.
"""

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from rayrlhf import console, lineage, metrics
from rayrlhf.config import EvaluateConfig, Recipe, RecipeError
from rayrlhf.data import builtin
from rayrlhf.data.datasets import encode_prompt, fitting_prompts
from rayrlhf.data.records import Record, prompt_text, read_records
from rayrlhf.data.rows import read_manifest
from rayrlhf.data.tokenizer import load_tokenizer
from rayrlhf.evaluation import cost, overoptimisation, plots, report
from rayrlhf.evaluation.answering import Answerer, Prompt, answer_prompts
from rayrlhf.evaluation.battles import Battles
from rayrlhf.evaluation.battles_section import summary_table
from rayrlhf.evaluation.comparison import (
    compare_answers,
    compare_models,
    compare_with_people,
    device,
    samples,
)
from rayrlhf.evaluation.held_out import (
    held_out_rows,
    rated_texts,
)
from rayrlhf.evaluation.judges import Answer, Judge, RewardJudge, VaderJudge
from rayrlhf.evaluation.words import JUDGES, MODELS, last_model
from rayrlhf.generation import Engine
from rayrlhf.models.folder import load_config
from rayrlhf.models.scalar_head import ScalarHeadModel


def evaluate(recipe: Recipe) -> Path:
    """Compare the recipe's models and return the folder of the results.

    Raises RecipeError when a model or the data is missing or wrong, before any model is loaded.
    """
    started = time.monotonic()
    cfg = recipe.evaluate
    assert cfg is not None, "the command line checks that the section is there"
    models = models_of(recipe)
    tokenizer = load_tokenizer(recipe)
    max_length = recipe.model.max_length
    chosen = choose_records(read_records(cfg.prompts, "prompt"), tokenizer, recipe, cfg)
    prompts = as_prompts(chosen, tokenizer)
    texts = rated_texts(read_records(cfg.comparisons, "comparison"), tokenizer, max_length)
    tokens_per_batch = cfg.batch_size * max_length
    battles = Battles(recipe, tokenizer, chosen, tokens_per_batch=tokens_per_batch)

    _say(f"{len(prompts)} prompts, answered by {', '.join(models)}")
    answerer = Answerer(Engine, tokenizer, recipe, cfg)
    demonstrations = cost.demonstrations_of(recipe)
    asked = cost.ask(models, prompts, demonstrations, answerer, tokenizer, recipe, cfg)  # 1
    answers = asked.answers
    guests = battles.answers(prompts, _answer)
    asked.answers = answers | guests
    often = overoptimisation.ask(recipe, models[_reference(models)], prompts, answerer)
    judges = _judges(recipe, tokenizer, tokens_per_batch)  # 2
    _say(
        f"{sum(map(len, answers.values()))} answers, judged by {', '.join(j.name for j in judges)}"
    )
    scores = {
        judge.name: {model: judge.score(given) for model, given in answers.items()}
        for judge in judges
    }
    results = _about(recipe, cfg, models, len(prompts))
    results |= compare_answers(answers, scores, reference=results["reference"])
    results |= cost.measure(
        asked,
        judges,
        scores,
        reference=results["reference"],
        trained=last_model(results),
        recipe=recipe,
    )
    results["battles"] = battles.fight(asked.answers, judges, scores, anchor=results["reference"])
    results["rounds"] = (
        lineage.read_json(recipe.path / lineage.OUTPUTS["rounds"]) if recipe.rounds else None
    )
    rows = held_out_rows(recipe, texts)
    _say(
        f"entropy, KL and the loss on {sum(map(len, rows.values()))} held-out rows, "
        f"batches of up to {tokens_per_batch} tokens"
    )
    results |= compare_models(  # 3
        models,
        answers,
        rows,
        reference=results["reference"],
        temperature=cfg.temperature,
        tokens_per_batch=tokens_per_batch,
        seed=recipe.seed,
    )
    results["overoptimisation"] = overoptimisation.overoptimisation_of(
        recipe,
        often,
        next((judge for judge in judges if isinstance(judge, RewardJudge)), None),
        lambda folder: _reward_judge(folder, tokenizer, tokens_per_batch),
    )
    _say(f"agreement with people on {sum(len(rated.texts) for rated in texts.values())} texts")
    results |= compare_with_people(
        texts, judges, _members(recipe, tokenizer, tokens_per_batch)
    )  # 4
    results["samples"] = samples(answers, scores, range(min(cfg.num_samples, len(prompts))))
    for marked in (results["hacking"]["gains"], results["hacking"]["marked"]):
        for row, sample in zip(
            marked, samples(answers, scores, [row["position"] for row in marked]), strict=True
        ):
            row.update(sample)
    _say("figures and report")
    return _write(recipe, results, time.monotonic() - started)  # 5


def _say(text: str) -> None:
    console.say(f"{'evaluate':>9} {text}")


def models_of(recipe: Recipe) -> dict[str, str]:
    """Return the recipe's models by name, folders or a hub name.

    The names are base, sft, dpo, ppo or ppo_ptx, and round-1, round-2, ... for policies of rounds.

    Raises RecipeError when one is missing.
    """
    written = {}
    if recipe.pretrain is not None:
        written["base"] = recipe.path / "pretrain" / "final"
    if recipe.sft is not None:
        written["sft"] = recipe.path / "sft" / "final"
    if recipe.dpo is not None:
        written["dpo"] = recipe.path / "dpo" / "final"
    if recipe.ppo is not None:
        written["ppo_ptx" if recipe.ppo.ptx_coef > 0 else "ppo"] = recipe.path / "ppo" / "final"
    written |= {name: Path(path) for name, path in lineage.round_policies(recipe).items()}
    scoring = lineage.reward_models(recipe) if recipe.reward else ()
    needed = [*written.values(), *(recipe.path / name for name in scoring)]
    if recipe.evaluate is not None and recipe.evaluate.overoptimisation is not None:
        overoptimisation.gold_folder(recipe, recipe.evaluate.overoptimisation)
    for folder in needed:
        if not (folder / "config.json").is_file():
            raise RecipeError(
                f"evaluate reads {folder}, which is no complete model: run the stage "
                "before it, `rayrlhf pipeline`, or take its section out"
            )
    models = {name: str(folder) for name, folder in written.items()}
    if "base" in models:
        return models
    assert recipe.model.path is not None, "Recipe checks that there is a model to start from"
    base = builtin.resolve(recipe.model.path)
    load_config(base)
    return {"base": base, **models}


def choose_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    cfg: EvaluateConfig,
) -> list[Record]:
    """Return `num_prompts` prompts that leave room for an answer, in an order of the seed."""
    room = recipe.model.max_length - cfg.max_response_tokens
    if room < 1:
        raise RecipeError(
            f"evaluate.max_response_tokens={cfg.max_response_tokens} leaves no room "
            f"for a prompt within model.max_length={recipe.model.max_length}: set it "
            "lower"
        )
    fitting = fitting_prompts(records, tokenizer, room)
    order = np.random.default_rng(recipe.seed).permutation(len(fitting))[: cfg.num_prompts]
    return [fitting[i] for i in order]


def as_prompts(records: Sequence[Record], tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """Return text and token ids of prompts."""
    return [
        Prompt(prompt_text(record), encode_prompt(record, tokenizer), "messages" in record)
        for record in records
    ]


def _answer(
    models: Mapping[str, str],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    cfg: EvaluateConfig,
) -> dict[str, list[Answer]]:
    """Let models from outside the run answer, with the random seeds of the run's own."""
    answerer = Answerer(Engine, tokenizer, recipe, cfg)
    answers = dict(answer_prompts(answerer, models, prompts, seed=recipe.seed))
    answerer.release()
    return answers


def _judges(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, tokens_per_batch: int
) -> list[Judge]:
    judges: list[Judge] = [VaderJudge()]
    if recipe.reward is not None:
        folder = recipe.path / lineage.OUTPUTS["reward"]
        judges.append(_reward_judge(folder, tokenizer, tokens_per_batch))
    return judges


def _members(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, tokens_per_batch: int
) -> Iterator[RewardJudge]:
    """Yield the further reward models of an ensemble, one in memory at a time."""
    for name in lineage.reward_models(recipe)[1:]:
        yield _reward_judge(recipe.path / name, tokenizer, tokens_per_batch)


def _reward_judge(
    folder: Path, tokenizer: PreTrainedTokenizerFast, tokens_per_batch: int
) -> RewardJudge:
    return RewardJudge(
        ScalarHeadModel.from_pretrained(folder),
        eos_id=int(tokenizer.eos_token_id),
        device=device(),
        tokens_per_batch=tokens_per_batch,
    )


def _reference(models: Mapping[str, str]) -> str:
    """Return the model that the others are compared with."""
    return "sft" if "sft" in models else "base"


def _about(
    recipe: Recipe, cfg: EvaluateConfig, models: Mapping[str, str], num_prompts: int
) -> dict[str, Any]:
    """Return what the run and the evaluation were."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": lineage.commit(),
        "machine": f"{os.cpu_count()} CPU cores, {_accelerator()}{platform.system()} "
        f"{platform.machine()}",
        "versions": lineage.versions(),
        "reference": _reference(models),
        "models": dict(models),
        "num_prompts": num_prompts,
        "max_response_tokens": cfg.max_response_tokens,
        "temperature": cfg.temperature,
        "corpus": _corpus(recipe),
    }


def _corpus(recipe: Recipe) -> dict[str, Any] | None:
    """Return what the report says of the corpus; None for a run without one."""
    if recipe.corpus is None:
        return None
    manifest = read_manifest(recipe.path / "corpus")
    train = {key: part for key, part in manifest["splits"]["train"].items() if key != "shards"}
    kept = {key: manifest[key] for key in ("row_length", "epochs", "errors", "num_errors")}
    return {**kept, "splits": {"train": train}}


def _accelerator() -> str:
    return f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""


def _write(recipe: Recipe, results: dict[str, Any], seconds: float) -> Path:
    """Write results.json, the figures and the report; print the table."""
    folder = recipe.path / "evaluation"
    done = lineage.load(recipe)
    results["seconds"] = {
        stage: float(done[stage]["seconds"])
        for stage in recipe.stages
        if stage in done and stage != "evaluate"
    } | {"evaluate": seconds}
    curves: dict[str, plots.Records] = {
        stage: metrics.read_jsonl(recipe.path / stage / "metrics.jsonl")
        for stage in ("pretrain", "sft", "reward", "dpo", "ppo")
        if stage in recipe.stages
    }
    drawn = plots.figures(results, curves)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in drawn:
        (folder / f"{figure.name}.png").write_bytes(figure.light)
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    page = report.write_report(recipe.path / "report.html", results, drawn, recipe_yaml=text)
    lineage.write_json(folder / "results.json", results)
    console.say(summary(results))
    console.say(f"report: {page.resolve()}")
    return folder


def summary(results: Mapping[str, Any]) -> str:
    """Return the tables that the terminal shows."""
    reference = results["reference"]
    rows = [
        (
            MODELS[model],
            *[rates[judge] for judge in results["judges"]],
            results["kl_ref_per_response"][model],
            results["entropy_nats_per_token"][model],
            results["distinct_2"][model],
            round(results["ratings"][model]["elo"]),
        )
        for model, rates in results[f"win_rate_vs_{reference}"].items()
    ]
    wins = [f"wins by {JUDGES[judge].removeprefix('the ')}" for judge in results["judges"]]
    shown = console.table(("model", *wins, "KL (nats)", "entropy", "distinct-2", "rating"), rows)
    if len(results["battles"]["models"]) > 1:
        shown += "\n\n" + summary_table(results["battles"])
    if results["reward_model"]:
        shown += "\n\n" + console.table(
            ("reward model on", "pair accuracy", "one human", "VADER", "Pearson r"),
            [
                (
                    source,
                    row["pair_accuracy"],
                    row["human_pair_accuracy"],
                    row["vader_pair_accuracy"],
                    row["pearson"],
                )
                for source, row in results["reward_model"].items()
            ],
        )
    return shown
