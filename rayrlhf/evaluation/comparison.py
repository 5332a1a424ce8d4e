"""The comparison itself: from answers, scores and models to the entries of results.json."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rayrlhf.evaluation.bootstrap import ratio_interval
from rayrlhf.evaluation.diagnostics import ensemble_agreement, rated_pairs
from rayrlhf.evaluation.diversity import (
    TokenStatistics,
    distinct_n,
    kl_per_response,
    token_statistics,
)
from rayrlhf.evaluation.held_out import (
    RatedTexts,
    agreement,
    diagnostics,
    held_out_loss,
    pooled_calibration,
)
from rayrlhf.evaluation.judges import Answer, Judge, RewardJudge, VaderJudge
from rayrlhf.evaluation.ratings import Interval, ratings, win_rate
from rayrlhf.models.causal_lm import CausalLMModel

Floats = npt.NDArray[np.float64]
Answers = dict[str, list[Answer]]

_RATINGS_JUDGE = "vader"


def compare_answers(
    answers: Answers, scores: Mapping[str, Mapping[str, Floats]], *, reference: str
) -> dict[str, Any]:
    """Return what follows from the words and the scores: win rates, ratings, distinct-2, lengths.

    `scores[judge][model]` is (N,), one per prompt.
    """
    rates = {
        model: {
            judge: win_rate(by_model[model], by_model[reference])
            for judge, by_model in scores.items()
        }
        for model in answers
    }
    rated = ratings(scores[_RATINGS_JUDGE], anchor=reference)
    num = {model: len(given) for model, given in answers.items()}
    return {
        "judges": list(scores),
        f"win_rate_vs_{reference}": {
            m: {j: rate.value for j, rate in row.items()} for m, row in rates.items()
        },
        "intervals": {
            f"win_rate_vs_{reference}": {
                m: {j: _bounds(rate) for j, rate in row.items()} for m, row in rates.items()
            }
        },
        "mean_score": {
            model: {judge: float(by_model[model].mean()) for judge, by_model in scores.items()}
            for model in answers
        },
        "ratings_judge": _RATINGS_JUDGE,
        "ratings": {m: {"elo": r.value, "low": r.low, "high": r.high} for m, r in rated.items()},
        "distinct_2": {
            model: distinct_n([a.response for a in given], 2) for model, given in answers.items()
        },
        "response_length": {
            model: sum(len(a.response_ids) for a in given) / num[model]
            for model, given in answers.items()
        },
        "ended_fraction": {
            model: sum(a.ended for a in given) / num[model] for model, given in answers.items()
        },
    }


def _bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def compare_models(  # noqa: PLR0913 (models, texts, and how they are read)
    models: Mapping[str, str],
    answers: Answers,
    rows: Mapping[str, list[list[int]]],
    *,
    reference: str,
    temperature: float,
    tokens_per_batch: int,
    seed: int,
) -> dict[str, Any]:
    """Return what takes a forward pass: entropy, KL from the reference, held-out loss.

    `alignment_tax` is the held-out loss less the base model's, nats per token.

    `engine_mismatch` is how far the engine's log-probs are from those found here, in nats per
    token: near 0 in float32 when both have the same weights.
    """

    def statistics(model: CausalLMModel, given: Sequence[Answer]) -> TokenStatistics:
        return token_statistics(
            model,
            [a.prompt_ids for a in given],
            [a.response_ids for a in given],
            temperature=temperature,
            tokens_per_batch=tokens_per_batch,
        )

    own: dict[str, TokenStatistics] = {}
    by_reference: dict[str, TokenStatistics] = {}
    losses: dict[str, dict[str, float]] = {}
    for name, folder in models.items():
        model = CausalLMModel.from_pretrained(folder).to(device()).eval()
        own[name] = statistics(model, answers[name])
        if name == reference:
            by_reference = {
                other: own[name] if other == name else statistics(model, given)
                for other, given in answers.items()
            }
        losses[name] = {
            source: held_out_loss(model, ids, tokens_per_batch=tokens_per_batch)
            for source, ids in rows.items()
        }
    return {
        "entropy_nats_per_token": {name: found.entropy_per_token for name, found in own.items()},
        "kl_ref_per_response": {
            name: kl_per_response(found, by_reference[name]) for name, found in own.items()
        },
        "entropy_intervals": {
            name: _bounds(ratio_interval(found.entropies, found.lengths, seed=seed))
            for name, found in own.items()
        },
        "held_out_loss": losses,
        "alignment_tax": {
            name: {source: loss - losses["base"][source] for source, loss in row.items()}
            for name, row in losses.items()
            if name != "base"
        },
        "engine_mismatch": {name: _mismatch(answers[name], found) for name, found in own.items()},
    }


def _mismatch(given: Sequence[Answer], found: TokenStatistics) -> float:
    """Return the mean over responses of |engine's - model's log-prob| per token, nats."""
    gaps = [
        abs(sum(answer.log_probs) - log_prob) / max(1, length)
        for answer, log_prob, length in zip(given, found.log_probs, found.lengths, strict=True)
    ]
    return sum(gaps) / max(1, len(gaps))


def compare_with_people(
    texts: Mapping[str, RatedTexts], judges: Sequence[Judge], members: Iterable[RewardJudge] = ()
) -> dict[str, Any]:
    """Return the reward model's and VADER's agreement with people, by source; {} without one.

    `members` are the further models of an ensemble, each scored before the next is taken.
    """
    vader = next(judge for judge in judges if isinstance(judge, VaderJudge))
    reward = next((judge for judge in judges if isinstance(judge, RewardJudge)), None)
    if reward is None:
        return {"reward_model": {}, "reward_model_pooled": {}, "reward_model_calibration": []}
    scores = {source: reward.score_ids(rated.ids) for source, rated in texts.items()}
    rows = {
        source: agreement(rated, scores[source], vader.score_texts(rated.texts))
        for source, rated in texts.items()
    }
    found = {source: row for source, row in rows.items() if row is not None}
    others = [
        {source: member.score_ids(texts[source].ids) for source in found} for member in members
    ]
    if others:
        for source, row in found.items():
            rated = texts[source]
            row["ensemble"] = ensemble_agreement(
                np.stack([scores[source], *(other[source] for other in others)]),
                rated_pairs(rated.ratings, rated.groups),
            )
    pooled = {source: texts[source] for source in found}
    return {
        "reward_model": found,
        "reward_model_pooled": diagnostics(pooled, scores) if pooled else {},
        "reward_model_calibration": pooled_calibration(texts, scores),
    }


def samples(
    answers: Answers, scores: Mapping[str, Mapping[str, Floats]], positions: Iterable[int]
) -> list[dict[str, Any]]:
    """Return the prompts at these positions with every model's answer and the judges' scores."""
    prompts = next(iter(answers.values()))
    return [
        {
            "prompt": prompts[i].prompt,
            "answers": {
                model: {
                    "text": given[i].response,
                    "ended": given[i].ended,
                    "scores": {
                        judge: float(by_model[model][i]) for judge, by_model in scores.items()
                    },
                }
                for model, given in answers.items()
            },
        }
        for i in positions
    ]


def device() -> torch.device:
    """Return what models and judges compute on in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release() -> None:
    """Give back what models that nobody holds any more had of a GPU's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
