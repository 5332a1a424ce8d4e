"""Results and metrics of a made-up run, in the shape that evaluation writes."""

import math
from typing import Any

import pytest

from rayrlhf.evaluation.plots import Figure, figures

MODELS = ("base", "sft", "dpo", "ppo")


@pytest.fixture
def results() -> dict[str, Any]:
    """Return results.json of three models and two sources."""
    return _results()


@pytest.fixture
def curves() -> dict[str, list[dict[str, Any]]]:
    """Return metrics.jsonl of each stage; a NaN that was written as null included."""
    return _curves()


@pytest.fixture(scope="session")
def drawn() -> list[Figure]:
    """Return every figure of the made-up run, drawn once."""
    return figures(_results(), _curves())


def _results() -> dict[str, Any]:
    half = {"vader": 0.5, "reward": 0.5}
    answer = {
        "text": ' <b>fine</b> & "good"',
        "ended": False,
        "scores": {"vader": 0.25, "reward": -1.5},
    }
    row = {
        "pair_accuracy": 0.73,
        "pearson": 0.6,
        "num_pairs": 4950,
        "num_texts": 100,
        "human_pair_accuracy": 0.83,
        "vader_pair_accuracy": 0.65,
        "vader_pearson": None,
        "calibration_error": 0.031,
        "length_bias": {
            "pearson": 0.2,
            "rating_pearson": 0.12,
            "partial": -0.17,
            "pair_accuracy_better_longer": 0.77,
            "pair_accuracy_better_shorter": None,
            "num_better_longer": 2000,
            "num_better_shorter": 0,
        },
    }
    fifths = [
        {
            "low": float(n),
            "high": n + 1.0,
            "mean": n + 0.4,
            "pair_accuracy": 0.55 + 0.08 * n,
            "human_pair_accuracy": 0.6 + 0.08 * n if n else None,
            "num_pairs": 990,
        }
        for n in range(5)
    ]
    ensemble = {
        "num_members": 3,
        "pair_accuracy": 0.75,
        "member_pair_accuracy": [0.72, 0.73, 0.74],
        "disagreement": 0.41,
        "error_correlation": 0.19,
        "by_disagreement": [
            {"pair_accuracy": accuracy, "num_pairs": 1650} for accuracy in (0.83, 0.75, 0.668)
        ],
    }
    return {
        "name": "toy",
        "seed": 0,
        "created": "2026-01-01 00:00 UTC",
        "commit": None,
        "machine": "2 CPU cores",
        "versions": {"torch": "2.13.0"},
        "reference": "sft",
        "models": {m: f"runs/toy/{m}/final" for m in MODELS},
        "num_prompts": 20,
        "max_response_tokens": 8,
        "temperature": 1.0,
        "judges": ["vader", "reward"],
        "win_rate_vs_sft": {
            "base": {"vader": 0.4, "reward": 0.3},
            "sft": half,
            "dpo": {"vader": 0.65, "reward": 0.8},
            "ppo": {"vader": 0.7, "reward": 0.9},
        },
        "intervals": {
            "win_rate_vs_sft": {m: {"vader": [0.35, 0.55], "reward": [0.2, 0.95]} for m in MODELS}
        },
        "mean_score": dict.fromkeys(MODELS, half),
        "ratings_judge": "vader",
        "ratings": {m: {"elo": 1000.0, "low": 990.0, "high": 1010.0} for m in MODELS},
        "distinct_2": {"base": 0.9, "sft": 0.8, "dpo": 0.7, "ppo": 0.6},
        "response_length": dict.fromkeys(MODELS, 7.5),
        "ended_fraction": dict.fromkeys(MODELS, 0.5),
        "entropy_nats_per_token": {"base": 4.0, "sft": 3.5, "dpo": 3.0, "ppo": 2.5},
        "kl_ref_per_response": {"base": 2.0, "sft": 0.0, "dpo": 8.0, "ppo": 12.0},
        "entropy_intervals": {m: [2.4, 2.6] for m in MODELS},
        "held_out_loss": {m: {"movies": 4.0, "tweets": 4.5} for m in MODELS},
        "alignment_tax": {m: {"movies": 0.125, "tweets": -0.25} for m in MODELS[1:]},
        **_cost(answer),
        "reward_model": {
            "movies": {**row, "ensemble": ensemble},
            "tweets": {**row, "human_pair_accuracy": None},
        },
        "reward_model_pooled": {
            "calibration_error": 0.034,
            "by_rating_gap": fifths,
            "by_length": fifths,
        },
        "reward_model_calibration": [
            {"predicted": 0.55, "observed": 0.54, "num_pairs": 900},
            {"predicted": 0.75, "observed": 0.7, "num_pairs": 100},
        ],
        "samples": [{"prompt": "Say <i>it</i>", "answers": dict.fromkeys(MODELS, answer)}],
        "seconds": {"pretrain": 100.0, "sft": 20.0, "evaluate": 30.0},
        "corpus": _corpus(),
        "battles": _battles([*MODELS, "gpt-x"]),
    }


def _battles(models: list[str]) -> dict[str, Any]:
    """Battles of models of and outside the run, before a score and a language model."""
    one = {
        "kind": "score",
        "num_battles": 200,
        "tie_share": 0.12,
        "win_rate": {a: {b: 0.57 for b in models if b != a} for a in models},
        "win_rate_interval": {a: {b: [0.46, 0.68] for b in models if b != a} for a in models},
        "ratings": {
            m: {"elo": 1000.0 + 11 * n, "low": 990.0, "high": 1077.0} for n, m in enumerate(models)
        },
        "length_controlled_win_rate": {
            m: {"value": 0.43, "low": 0.31, "high": 0.54, "length_coefficient": 1.2}
            for m in models
            if m != "sft"
        },
    }
    positions = {
        "asked": 190,
        "undecided": 3,
        "inconsistent": 39,
        "first_wins": 120,
        "second_wins": 80,
        "inconsistent_share": 0.21,
        "first_share": 0.6,
    }
    return {
        "models": models,
        "anchor": "sft",
        "num_prompts": 20,
        "mean_length": dict.fromkeys(models, 123.0),
        "judges": {"vader": one, "big-llm": {**one, "kind": "llm", "positions": positions}},
    }


def _cost(answer: dict[str, Any]) -> dict[str, Any]:
    measure = {"value": 0.61, "low": 0.55, "high": 0.66}
    curve = {
        "points": [
            {
                "n": n,
                "kl": kl,
                "proxy": 2 * kl,
                "proxy_interval": [2 * kl - 0.1, 2 * kl + 0.1],
                "gold": gold,
                "gold_interval": [gold - 0.1, gold + 0.1],
            }
            for n, kl, gold in ((1, 0.0, 0.0), (2, 0.19, 0.4), (4, 0.64, 0.3))
        ],
        "peak": {
            "n": 2,
            "kl": 0.19,
            "gold": 0.4,
            "is_last": False,
            "fall": 0.1,
            "fall_interval": [0.02, 0.19],
        },
        "fit": None,
    }
    steps = {
        "points": [
            {**point, "step": 10 * (i + 1), "kl": kl}
            for i, (point, kl) in enumerate(zip(curve["points"][1:], (1.0, 4.0), strict=True))
        ],
        "peak": {**curve["peak"], "step": 20, "kl": 4.0, "is_last": True},
        "fit": None,
    }
    for row in (*steps["points"], steps["peak"]):
        del row["n"]
    marked = {
        "prompt": "Say <i>it</i>",
        "answers": dict.fromkeys(MODELS, answer),
        "position": 0,
        "gain": 2.25,
        "rules": ["repetition"],
    }
    return {
        "variety": {
            m: {"distinct_1": measure, "distinct_answers": {"value": 41.5, "low": 39, "high": 44}}
            for m in MODELS
        },
        "variety_samples": 50,
        "few_shot": {
            "model": "base_few_shot",
            "separator": None,
            "demonstrations": 4,
            "mean_demonstrations": 2.5,
            "win_rate": dict.fromkeys(("vader", "reward"), measure),
        },
        "hacking": {
            "judge": "reward",
            "trained": "ppo",
            "rules": {"repetition": "one <word> often"},
            "shares": {m: {"repetition": 0.125, "any": 0.125} for m in MODELS},
            "gains": [{**marked, "rules": []}],
            "marked": [marked],
        },
        "rounds": None,
        "overoptimisation": {
            "gold_model": "runs/toy/reward/gold/final",
            "num_prompts": 8,
            "num_samples": 4,
            "checkpoint_samples": 2,
            "deviation": {"proxy": 1.0, "gold": 1.5},
            "best_of_n": curve,
            "ppo": steps,
        },
    }


def _corpus() -> dict[str, Any]:
    web = {
        "read": 1200,
        "dropped": {"too_short": 150, "duplicate": 50, "language": 0},
        "examples": {"too_short": ["<b>Hi</b>"], "duplicate": []},
        "kept": 1000,
        "tokens_read": 30_000,
        "bytes": 120_000,
        "words": 20_000,
        "tokens": 45_000,
    }
    train = {
        "rows": 365,
        "document_tokens": 45_000,
        "delimiters": 1500,
        "padding": 220,
        "tail_tokens_dropped": 0,
        "sources": {"web": web},
    }
    return {
        "row_length": 128,
        "epochs": {"web": 1.5},
        "splits": {"train": train},
        "errors": ["web/a.jsonl:3: broken <JSON>"],
        "num_errors": 7,
    }


def _curves() -> dict[str, list[dict[str, Any]]]:
    def loss(step: int) -> float:
        return 4 + 4 * math.exp(-step / 10)

    training = [{"step": s, "time": 0.0, "loss": loss(s)} for s in range(1, 31)]
    reward = [{**row, "pair_accuracy": 0.6} for row in training]
    reward[-1] |= {"eval/loss": 0.6, "eval/pair_accuracy": 0.7}
    ppo: list[dict[str, Any]] = [
        {
            "step": s,
            "time": 0.0,
            "reward/score_mean": s / 10,
            "kl/ref_per_response": s / 2,
            "policy/entropy": 3.0,
            "rollout/response_length": 8.0,
        }
        for s in range(1, 21)
    ]
    ppo[3]["policy/entropy"] = None
    return {"pretrain": training, "sft": training, "reward": reward, "dpo": reward, "ppo": ppo}
