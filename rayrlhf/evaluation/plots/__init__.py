"""Figures of the report: what is drawn, and the sentence that says what one sees.

Each figure is drawn twice from the same numbers, on a light and on a dark ground, as PNG.
"""

from collections.abc import Mapping
from typing import Any

from rayrlhf.evaluation.plots.battles import ratings
from rayrlhf.evaluation.plots.canvas import Figure, Records
from rayrlhf.evaluation.plots.models import entropy
from rayrlhf.evaluation.plots.overoptimisation import overoptimisation
from rayrlhf.evaluation.plots.preference import win_rates
from rayrlhf.evaluation.plots.reward_errors import reward_errors
from rayrlhf.evaluation.plots.reward_model import calibration, reward_model
from rayrlhf.evaluation.plots.training import ppo, reward_against_kl, training

__all__ = ["Figure", "Records", "figures"]


def figures(results: Mapping[str, Any], curves: Mapping[str, Records]) -> list[Figure]:
    """Draw every figure that the results and the metrics of the stages (by name) allow."""
    drawn = [
        win_rates(results),
        overoptimisation(results),
        ratings(results),
        reward_against_kl(curves.get("ppo", ())),
        reward_model(results),
        calibration(results),
        reward_errors(results),
        entropy(results),
    ]
    trained = ("pretrain", "sft", "reward", "dpo")
    drawn += [training(stage, curves.get(stage, ())) for stage in trained]
    drawn.append(ppo(curves.get("ppo", ())))
    return [figure for figure in drawn if figure is not None]
