"""Judges give one number to a prompt with a response; the higher number is preferred.

`vader` follows the rules of VADER (Hutto and Gilbert, ICWSM-14), which no training stage sees.
`reward` is the reward model, the very thing that PPO maximises: a win by it alone proves little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rayrlhf.data.datasets import pad
from rayrlhf.data.packing import microbatches
from rayrlhf.data.records import joined
from rayrlhf.models.scalar_head import ScalarHeadModel, last_scores

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """A prompt with a response, as words and as token ids."""

    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    """With the end-of-text id where the model ended the response itself."""
    log_probs: list[float]
    """Nats, one per response token, as the engine sampled it."""
    ended: bool
    """Whether it ended by itself, rather than at the limit of tokens."""
    is_chat: bool = False
    """Whether the prompt is a chat, and not a text that the response goes on with."""

    @property
    def text(self) -> str:
        """Prompt and response as one text."""
        return joined(self.prompt, self.response, is_chat=self.is_chat)


class Judge(Protocol):
    """One number per answer."""

    name: str

    def score(self, answers: Sequence[Answer]) -> Floats:
        """Return (N,) scores; their order counts, not their size."""
        ...


class VaderJudge:
    """VADER's compound score, -1 (most negative) to 1, of prompt and response together."""

    name = "vader"

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, answers: Sequence[Answer]) -> Floats:
        """Return (N,) compound scores."""
        return self.score_texts([answer.text for answer in answers])

    def score_texts(self, texts: Sequence[str]) -> Floats:
        """Return (N,) compound scores of plain texts."""
        return np.array(
            [self._analyzer.polarity_scores(text)["compound"] for text in texts], dtype=np.float64
        )


class RewardJudge:
    """A reward model's score at the end-of-text token, shift included."""

    name = "reward"

    def __init__(
        self, model: ScalarHeadModel, *, eos_id: int, tokens_per_batch: int, device: torch.device
    ) -> None:
        self._model = model.to(device).eval()
        self._eos_id = eos_id
        self._tokens_per_batch = tokens_per_batch
        self._device = device

    def score(self, answers: Sequence[Answer]) -> Floats:
        """Return (N,) scores.

        A response that was cut off is given the end-of-text token, where the model was trained to
        be read; being cut off costs nothing here.
        """
        return self.score_ids(
            [answer.prompt_ids + self._ended(answer.response_ids) for answer in answers]
        )

    @torch.inference_mode()
    def score_ids(self, sequences: Sequence[list[int]]) -> Floats:
        """Return (N,) scores of token ids that end with end-of-text."""
        scores = np.zeros(len(sequences))
        lengths = [len(ids) for ids in sequences]
        for indices in microbatches(lengths, self._tokens_per_batch):
            input_ids, attention_mask = pad([sequences[i] for i in indices], self._eos_id)
            outputs = self._model(input_ids.to(self._device), attention_mask.to(self._device))
            ends = torch.tensor([lengths[i] for i in indices], device=self._device)
            scores[indices] = last_scores(outputs, ends).double().cpu().numpy()
        return scores

    def _ended(self, response_ids: list[int]) -> list[int]:
        ended = bool(response_ids) and response_ids[-1] == self._eos_id
        return response_ids if ended else [*response_ids, self._eos_id]
