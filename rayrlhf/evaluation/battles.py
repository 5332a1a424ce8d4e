"""Battles of all models on the same prompts, before every judge: win rates, ratings, lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from rayrlhf import console, lineage
from rayrlhf.config import Recipe
from rayrlhf.data.records import Record, prompt_text
from rayrlhf.evaluation.contestants import AnswerPrompts, Prompts, answers_of, contestants
from rayrlhf.evaluation.judges import Answer, Judge
from rayrlhf.evaluation.length_control import length_controlled
from rayrlhf.evaluation.llm_judge import Battle, LLMJudge, Positions, positions, settle
from rayrlhf.evaluation.panel import panel
from rayrlhf.evaluation.ratings import Interval, elo, outcomes, share_won
from rayrlhf.evaluation.words import ppo_model

Floats = npt.NDArray[np.float64]
Answers = Mapping[str, list[Answer]]


class Battles:
    """The run's models and `evaluate.models`, before the run's judges and `evaluate.judges`."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        records: Sequence[Record],
        *,
        tokens_per_batch: int,
    ) -> None:
        """Check all models and judges from outside the run; RecipeError names the one at fault."""
        self._recipe, self._tokenizer, self._records = recipe, tokenizer, records
        self._field = contestants(recipe, records)
        self._panel = panel(recipe, records, tokenizer, tokens_per_batch)

    def answers(self, prompts: Prompts, answer_prompts: AnswerPrompts) -> dict[str, list[Answer]]:
        """Return the answers of `evaluate.models`, one per prompt."""
        if self._field:
            self._say(f"the prompts, answered by {', '.join(one.name for one in self._field)}")
        return answers_of(self._field, prompts, self._tokenizer, self._recipe, answer_prompts)

    def fight(
        self,
        answers: Answers,
        judges: Sequence[Judge],
        scores: Mapping[str, Mapping[str, Floats]],
        *,
        anchor: str,
    ) -> dict[str, Any]:
        """Return the `battles` of results.json.

        `answers` are those of all models; `scores[judge][model]` what the run's `judges` said of
        some of them already.
        """
        models = list(answers)
        found = {}
        for judge in judges:
            known = scores.get(judge.name, {})
            table = {m: known[m] if m in known else judge.score(answers[m]) for m in models}
            found[judge.name] = self._by_scores(table, answers, anchor)
        for one in self._panel:
            self._say(f"battles of {len(models)} models, judged by {one.name}")
            if isinstance(one, LLMJudge):
                found[one.name] = self._by_llm(one, answers, anchor)
            else:
                found[one.name] = self._by_scores(one.scores(answers), answers, anchor)
        return {
            "models": models,
            "anchor": anchor,
            "num_prompts": len(self._records),
            "mean_length": {m: float(_lengths(given).mean()) for m, given in answers.items()},
            "judges": found,
        }

    def _by_scores(
        self, table: Mapping[str, Floats], answers: Answers, anchor: str
    ) -> dict[str, Any]:
        won = outcomes(np.stack([table[model] for model in answers], axis=1))
        return {"kind": "score", **self._standings(won, answers, anchor)}

    def _by_llm(self, judge: LLMJudge, answers: Answers, anchor: str) -> dict[str, Any]:
        models, num = list(answers), len(self._records)
        pairs = list(combinations(range(len(models)), 2))
        battles = [
            Battle(
                prompt_text(self._records[n]),
                answers[models[i]][n].response,
                answers[models[j]][n].response,
            )
            for i, j in pairs
            for n in range(num)
        ]
        verdicts = judge.judge(battles)
        won = np.full((num, len(models), len(models)), 0.5)
        for (i, j), row in zip(pairs, settle(verdicts).reshape(-1, num), strict=True):
            won[:, i, j], won[:, j, i] = row, 1.0 - row
        return {
            "kind": "llm",
            **self._standings(won, answers, anchor),
            "positions": positions_entry(positions(battles, verdicts)),
        }

    def _standings(self, won: Floats, answers: Answers, anchor: str) -> dict[str, Any]:
        successors = self._successors(list(answers))
        return standings(won, answers, anchor=anchor, successors=successors)

    def _successors(self, models: Sequence[str]) -> dict[str, str]:
        """Return the policy before each of the recipe's rounds, by the name of the one after."""
        rounds = list(lineage.round_policies(self._recipe))
        ppo = ppo_model(models)
        return dict(pairwise([ppo, *rounds][::-1])) if ppo else {}

    def _say(self, text: str) -> None:
        console.say(f"{'evaluate':>9} {text}")


def standings(
    won: Floats,
    answers: Answers,
    *,
    anchor: str,
    successors: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return win rates, ratings and length-controlled win rates of one judge.

    `won` (N, M, M) is as `outcomes` makes it, or NaN where a battle was not decided. The keys of
    `successors` are rated against their values, too.
    """
    models = list(answers)
    lengths = {model: _lengths(given) for model, given in answers.items()}
    shares = {
        (a, b): share_won(won[:, i, j])
        for i, a in enumerate(models)
        for j, b in enumerate(models)
        if i != j
    }
    at = models.index(anchor)
    controlled = {
        model: length_controlled(won[:, i, at], lengths[model] - lengths[anchor])
        for i, model in enumerate(models)
        if i != at
    }
    battles = won[:, *np.triu_indices(len(models), 1)]
    decided = battles[~np.isnan(battles)]
    return {
        "num_battles": battles.size,
        "tie_share": float((decided == 0.5).mean()) if decided.size else 0.0,
        "win_rate": {a: {b: shares[a, b].value for b in models if b != a} for a in models},
        "win_rate_interval": {
            a: {b: [shares[a, b].low, shares[a, b].high] for b in models if b != a} for a in models
        },
        "ratings": {
            model: {"elo": found.value, "low": found.low, "high": found.high}
            for model, found in elo(won, models, anchor=anchor).items()
        },
        "rating_gains": {
            model: _gain(elo(won, models, anchor=before), model, before)
            for model, before in successors.items()
        },
        "length_controlled_win_rate": {
            model: {
                "value": found.win_rate.value,
                "low": found.win_rate.low,
                "high": found.win_rate.high,
                "length_coefficient": found.coefficient,
            }
            for model, found in controlled.items()
        },
    }


def _gain(rated: Mapping[str, Interval], model: str, before: str) -> dict[str, Any]:
    """Return by how many points a model is above the one before, as anchored there."""
    found, at = rated[model], rated[before].value
    return {
        "over": before,
        "elo": found.value - at,
        "low": found.low - at,
        "high": found.high - at,
    }


def positions_entry(found: Positions) -> dict[str, Any]:
    """Return the counts of a judge who saw both orders, and the shares of them; None of nothing."""
    decided, wins = found.asked - found.undecided, found.first_wins + found.second_wins
    return {
        **asdict(found),
        "inconsistent_share": found.inconsistent / decided if decided else None,
        "first_share": found.first_wins / wins if wins else None,
    }


def _lengths(given: Sequence[Answer]) -> Floats:
    """Return (N,) characters, a unit that all tokenizers share."""
    return np.array([len(answer.response) for answer in given], dtype=np.float64)
