"""Proxy and gold reward over sqrt(KL), of PPO's checkpoints and of best-of-n (arXiv:2210.10760).

    proxy   the reward model that PPO maximises
    gold    one trained on comparisons that have no text in common with the proxy's

Rewards are in standard deviations of the reference's own answers, whose mean is 0. There is one
departure from the paper: its gold model gives the labels that its proxies learn from and is far
larger; here people gave both sets of labels, and the gold model has the proxy's size and its errors
on top of theirs. What PPO gains by the proxy's own errors the gold model does not see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrlhf import console, lineage
from rayrlhf.config import OveroptimisationConfig, Recipe, RecipeError
from rayrlhf.evaluation.answering import Answerer, Prompt
from rayrlhf.evaluation.best_of_n import best_of_n, fit, kl_of_best_of_n, powers_of_two
from rayrlhf.evaluation.bootstrap import mean_interval
from rayrlhf.evaluation.comparison import device
from rayrlhf.evaluation.diversity import kl_per_response, token_statistics
from rayrlhf.evaluation.judges import Answer, RewardJudge
from rayrlhf.models.causal_lm import CausalLMModel

Floats = npt.NDArray[np.float64]

_BEST_OF_N, _CHECKPOINTS = 5, 6  # streams of random numbers


@dataclass(frozen=True)
class Scale:
    """What puts a reward model's scores into standard deviations of the reference's answers."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, scores: Floats) -> "Scale":
        """Return the scale on which these scores have mean 0 and standard deviation 1."""
        return cls(float(scores.mean()), float(scores.std()) or 1.0)

    def __call__(self, scores: Floats) -> Floats:
        return (scores - self.mean) / self.deviation


@dataclass(frozen=True)
class Point:
    """A policy: its distance from the reference, and its rewards per prompt."""

    name: dict[str, int]
    """`step` of a checkpoint, or `n` of best-of-n."""
    kl: float
    """Nats per response."""
    proxy: Floats
    """(P,)"""
    gold: Floats
    """(P,)"""


def gold_folder(recipe: Recipe, cfg: OveroptimisationConfig) -> Path:
    """Return the folder of the gold reward model; raises RecipeError when nothing is there."""
    folder = Path(cfg.gold) if cfg.gold is not None else recipe.path / lineage.GOLD
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"evaluate.overoptimisation reads {folder}, which is no complete reward model: run the "
            "reward stage with reward.gold, or set evaluate.overoptimisation.gold to a folder"
        )
    return folder


def checkpoints(recipe: Recipe) -> dict[int, Path]:
    """Return PPO's complete checkpoints by step; none for a recipe without PPO."""
    if recipe.ppo is None:
        return {}
    folders = sorted((recipe.path / "ppo" / "checkpoints").glob("step-????????"))
    return {
        int(folder.name.removeprefix("step-")): folder
        for folder in folders
        if (folder / "manifest.json").is_file()
    }


@dataclass(frozen=True)
class Asked:
    """Answers to the same prompts, several to each."""

    reference: str
    """Folder or hub name of the reference."""
    samples: list[list[Answer]]
    """Of the reference: N to each of P prompts."""
    policies: dict[int, Path]
    """PPO's checkpoints by step."""
    given: dict[int, list[list[Answer]]]
    """Of each checkpoint."""


def ask(
    recipe: Recipe, reference: str, prompts: Sequence[Prompt], answerer: Answerer
) -> Asked | None:
    """Let the reference and PPO's checkpoints answer; None where the recipe does not ask for it.

    On a GPU the engine takes most of its memory: this comes before any judge is loaded.
    """
    cfg = recipe.evaluate.overoptimisation if recipe.evaluate is not None else None
    if cfg is None:
        return None
    policies = checkpoints(recipe)
    console.say(f"{'evaluate':>9} {len(policies)} checkpoints and best-of-{cfg.samples}")
    asked = prompts[: cfg.prompts]
    answerer.load(reference)
    samples = answerer.answer_often(asked, cfg.samples, stream=_BEST_OF_N)
    given = {}
    for step, folder in policies.items():
        answerer.load(str(folder))
        given[step] = answerer.answer_often(asked, cfg.checkpoint_samples, stream=_CHECKPOINTS)
    answerer.release()
    return Asked(reference, samples, policies, given)


def overoptimisation_of(
    recipe: Recipe,
    asked: Asked | None,
    proxy: RewardJudge | None,
    judge_in: Callable[[Path], RewardJudge],
) -> dict[str, Any] | None:
    """Return the `overoptimisation` of results.json; None where the recipe does not ask for it."""
    cfg = recipe.evaluate
    if asked is None or cfg is None or cfg.overoptimisation is None:
        return None
    assert proxy is not None, "Recipe checks that there is a reward model"
    folder = gold_folder(recipe, cfg.overoptimisation)
    console.say(f"{'evaluate':>9} proxy and gold reward of what they answered")
    found = overoptimisation(
        asked,
        (proxy, judge_in(folder)),
        temperature=cfg.temperature,
        tokens_per_batch=cfg.batch_size * recipe.model.max_length,
        seed=recipe.seed,
    )
    settings = cfg.overoptimisation
    return {
        "gold_model": str(folder),
        "num_prompts": len(asked.samples),
        "num_samples": settings.samples,
        "checkpoint_samples": settings.checkpoint_samples,
        **found,
    }


def overoptimisation(
    asked: Asked,
    judges: tuple[RewardJudge, RewardJudge],
    *,
    temperature: float,
    tokens_per_batch: int,
    seed: int,
) -> dict[str, Any]:
    """Score what was answered and measure its KL; `judges` are proxy and gold."""
    num_samples = len(asked.samples[0])
    proxy, gold = _scores(asked.samples, judges)
    scales = Scale.of(proxy), Scale.of(gold)
    best = [
        Point(
            {"n": n},
            kl_of_best_of_n(n),
            best_of_n(proxy, scales[0](proxy), n),
            best_of_n(proxy, scales[1](gold), n),
        )
        for n in powers_of_two(num_samples)
    ]
    ppo = []
    base = CausalLMModel.from_pretrained(asked.reference).to(device()).eval()
    for step, groups in asked.given.items():
        policy = CausalLMModel.from_pretrained(asked.policies[step]).to(device()).eval()
        flat = [answer for group in groups for answer in group]
        kl = _kl(policy, base, flat, temperature=temperature, tokens_per_batch=tokens_per_batch)
        scores = _scores(groups, judges)
        means = [scale(found).mean(axis=1) for scale, found in zip(scales, scores, strict=True)]
        ppo.append(Point({"step": step}, kl, *means))
    return {
        "deviation": {"proxy": scales[0].deviation, "gold": scales[1].deviation},
        "best_of_n": curve(best, seed=seed, log=False),
        "ppo": curve(ppo, seed=seed, log=True) if ppo else None,
    }


def curve(points: Sequence[Point], *, seed: int, log: bool) -> dict[str, Any]:
    """Return the points with their intervals, where the gold reward peaks, and Gao's shape.

    `peak.fall` is how far the last point's gold reward is below the peak's, paired by prompt; as
    the peak is the largest of several, it is above 0 by chance, too. `log` is the shape of RL.
    """
    gold = [float(point.gold.mean()) for point in points]
    top = int(np.argmax(gold))
    fall = mean_interval(points[top].gold - points[-1].gold, seed=seed)
    return {
        "points": [
            {
                **point.name,
                "kl": point.kl,
                **_reward("proxy", point.proxy, seed),
                **_reward("gold", point.gold, seed),
            }
            for point in points
        ],
        "peak": {
            **points[top].name,
            "kl": points[top].kl,
            "gold": gold[top],
            "is_last": top == len(points) - 1,
            "fall": fall.value,
            "fall_interval": [fall.low, fall.high],
        },
        "fit": fit([max(0.0, point.kl) ** 0.5 for point in points], gold, log=log),
    }


def _reward(name: str, values: Floats, seed: int) -> dict[str, Any]:
    interval = mean_interval(values, seed=seed)
    return {name: interval.value, f"{name}_interval": [interval.low, interval.high]}


def _scores(
    groups: Sequence[Sequence[Answer]], judges: tuple[RewardJudge, RewardJudge]
) -> tuple[Floats, Floats]:
    """Return the scores (P, N) of each judge; every prompt has as many answers."""
    flat = [answer for group in groups for answer in group]
    proxy, gold = (judge.score(flat).reshape(len(groups), -1) for judge in judges)
    return proxy, gold


def _kl(
    policy: CausalLMModel,
    reference: CausalLMModel,
    answers: Sequence[Answer],
    *,
    temperature: float,
    tokens_per_batch: int,
) -> float:
    """Return KL(policy || reference) in nats per response, from the policy's own answers."""
    own, other = (
        token_statistics(
            model,
            [answer.prompt_ids for answer in answers],
            [answer.response_ids for answer in answers],
            temperature=temperature,
            tokens_per_batch=tokens_per_batch,
        )
        for model in (policy, reference)
    )
    return kl_per_response(own, other)
