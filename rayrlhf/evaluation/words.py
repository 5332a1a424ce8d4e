"""What models, judges and stages are called in the report, in the order in which they appear."""

from collections.abc import Collection, Mapping
from typing import Any

MODELS = {
    **{"base": "base", "sft": "SFT", "dpo": "DPO", "ppo": "PPO", "ppo_ptx": "PPO-ptx"},
    **{f"round-{number}": f"round {number}" for number in range(1, 100)},
}
JUDGES = {"vader": "VADER", "reward": "the reward model"}
STAGES = {
    "corpus": "Corpus",
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "DPO",
    "ppo": "PPO",
    "rounds": "Rounds",
    "evaluate": "Evaluation",
}


def model_word(model: str) -> str:
    """Return how a model is called at the start of a sentence or on an axis."""
    word = MODELS[model]
    return word[0].upper() + word[1:]


def ppo_model(models: Collection[str]) -> str | None:
    """Return which of PPO and PPO-ptx is there: a run has one of them at most."""
    return next((model for model in ("ppo", "ppo_ptx") if model in models), None)


def last_model(results: Mapping[str, Any]) -> str:
    """Return the model of a run's results that went through most stages."""
    return [model for model in MODELS if model in results["models"]][-1]
