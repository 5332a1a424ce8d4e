"""The base model with demonstrations before each prompt: what prompting does without training.

InstructGPT (arXiv:2203.02155, section 3.5) does so with GPT-3. Its prefix was found by a
competition; here the demonstrations are drawn by the seed, anew for each prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import FewShotConfig
from rayrlhf.data.datasets import Record, encode_demonstration
from rayrlhf.data.tokenizer import encode_text
from rayrlhf.evaluation.answering import Prompt
from rayrlhf.evaluation.judges import Answer

MODEL = "base_few_shot"
"""What results and figures call it."""


@dataclass(frozen=True)
class FewShot:
    """Prompts with demonstrations before them."""

    prompts: list[Prompt]
    """As they are given to the model, in the order of the plain ones."""
    counts: list[int]
    """How many demonstrations each one has."""


def with_demonstrations(  # noqa: PLR0913 (a prompt, what comes before it, and the room)
    prompts: Sequence[Prompt],
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    cfg: FewShotConfig,
    *,
    room: int,
    seed: int,
) -> FewShot:
    """Put up to k demonstrations before each prompt, as many as `room` tokens hold.

    A demonstration that does not fit is passed over for the next one drawn, of 4 k in all.
    """
    between = (
        [int(tokenizer.eos_token_id)]
        if cfg.separator is None
        else encode_text(tokenizer, cfg.separator)
    )
    made, counts = [], []
    for number, prompt in enumerate(prompts):
        rng = np.random.default_rng([seed, 3, number])
        num_drawn = min(len(records), 4 * cfg.demonstrations)
        before: list[int] = []
        count = 0
        for index in rng.choice(len(records), size=num_drawn, replace=False).tolist():
            example = encode_demonstration(records[index], tokenizer, room)
            if example is None or count == cfg.demonstrations:
                continue
            shown = example.ids[:-1] + between  # without its end-of-text
            if len(before) + len(shown) + len(prompt.ids) <= room:
                before, count = before + shown, count + 1
        made.append(prompt._replace(ids=before + prompt.ids))
        counts.append(count)
    return FewShot(made, counts)


def as_answers(
    given: Sequence[Answer],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerFast,
    cfg: FewShotConfig,
) -> list[Answer]:
    """Return the answers as ones to the plain prompts, cut where the next example would begin.

    A cut answer counts as ended. Its token ids are those of its words, without log-probs.
    """
    found = []
    for answer, prompt in zip(given, prompts, strict=True):
        plain = replace(answer, prompt_ids=prompt.ids)
        cut = -1 if cfg.separator is None else answer.response.find(cfg.separator)
        if cut >= 0:
            kept = answer.response[:cut]
            plain = replace(
                plain,
                response=kept,
                response_ids=encode_text(tokenizer, kept),
                log_probs=[],
                ended=True,
            )
        found.append(plain)
    return found
