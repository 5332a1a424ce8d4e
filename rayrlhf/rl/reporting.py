"""What a step says: metrics of its rollout, and samples."""

import math

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rayrlhf.metrics import MetricsLogger
from rayrlhf.rl.experience import Rollout

NUM_SAMPLES = 3
"""Responses that each line of samples shows."""
NOT_UPDATED = dict.fromkeys(
    (
        "policy/loss",
        "policy/clip_fraction",
        "policy/approx_kl",
        "policy/first_ratio",
        "policy/first_clip_fraction",
        "policy/entropy",
        "kl/rollout_mismatch",
    ),
    math.nan,
)
"""Of a step that trains the critic alone; the log has them as null. The last two are known where
the actor evaluates the rollout."""


def rollout_metrics(rollout: Rollout, seconds: float) -> dict[str, float]:
    """Return lengths in tokens, the fraction of truncated responses, and tokens per second."""
    lengths = rollout.response_lengths.float()
    return {
        "rollout/response_length": float(lengths.mean()),
        "rollout/truncated_fraction": float(rollout.truncated.float().mean()),
        "rollout/tokens_per_s": float(lengths.sum()) / seconds,
    }


def log_samples(
    log: MetricsLogger,
    step: int,
    rollout: Rollout,
    scores: Tensor,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write the first few responses of the step, as text."""
    prompts = rollout.prompt_ids.split(rollout.prompt_lengths.tolist())
    for index, response in enumerate(rollout.responses()[:NUM_SAMPLES]):
        log.sample(
            step,
            {
                "prompt": tokenizer.decode(prompts[index].tolist(), skip_special_tokens=True),
                "text": tokenizer.decode(response, skip_special_tokens=True),
                "score": round(float(scores[index]), 4),
            },
        )


def is_due(step: int, every: int, last: int) -> bool:
    """Tell whether something that happens every so many steps, and after the last, is due."""
    return step % every == 0 or step == last
