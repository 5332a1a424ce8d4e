"""Scores of responses: one reward model as a worker, or all that `ppo.rewards` names.

Models are read on the policy's token ids. Functions and endpoints get text, as samples.jsonl shows
it, without special tokens; they work beside the models, and their answers are waited for last.
Each worker of the role scores its share of the rows, in the order of the rollout.
Source of ensembles: arXiv:2310.02743, with the standard deviation in place of the variance.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rayrlhf import console
from rayrlhf.config import RecipeError, RewardSource, key_of
from rayrlhf.data.datasets import shard
from rayrlhf.data.packing import microbatches
from rayrlhf.external.function_process import no_numbers
from rayrlhf.models.scalar_head import ScalarHeadModel, last_scores
from rayrlhf.rl.clock import timed
from rayrlhf.rl.experience import MIN_FILL, Rollout, RowReader, Rows
from rayrlhf.rl.ranks import InferenceWorker
from rayrlhf.rl.reward_endpoint import EndpointScorer
from rayrlhf.rl.reward_function import FunctionScorer
from rayrlhf.rl.waiting import LINE_EVERY_S

TextScorer = FunctionScorer | EndpointScorer


class RewardWorker(InferenceWorker):
    """Gives each response one score, or, under `ppo.rewards`, the parts of it."""

    def start(self) -> None:
        """Load models, each with its shift, and functions; ask each endpoint once.

        Raises RecipeError when one of them cannot score.
        """
        self.training = self.cfg.critic
        if not self.cfg.rewards:
            self.model = self._load(self.settings.model_path)
            return
        self.models: dict[int, list[ScalarHeadModel]] = {}
        self.scorers: dict[int, TextScorer] = {}
        for index, reward in enumerate(self.cfg.rewards):
            places = self.settings.rewards[index]
            if reward.is_of_models:
                self.models[index] = [self._load(place) for place in places]
            else:
                self.scorers[index] = text_scorer(index, reward, places[0])
        if self.scorers:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.settings.tokenizer_path)

    def _load(self, path: str) -> ScalarHeadModel:
        model = ScalarHeadModel.from_pretrained(path, dtype=self.dtype)
        model.to(self.device).eval()
        return model

    @timed
    @torch.no_grad()
    def score(self, rollout: Rollout) -> Rows:
        """Return (1,) the score of each response; 0 is the mean score of the demonstrations.

        Under `ppo.rewards` it is (C,): the numbers that the `columns` of the rewards name.
        """
        settings, lengths = self.settings, rollout.lengths
        mine = shard(range(len(rollout)), settings.rank, settings.world_size, lengths)
        if not self.cfg.rewards:
            return self._read(self.model, rollout, mine)
        if not mine:
            return Rows.of([], [])
        rows = sorted(mine)
        begun = self._submit(rollout, rows)
        columns: dict[int, list[Tensor]] = {}
        for index, models in self.models.items():
            each = torch.stack([self._of_model(model, rollout, rows) for model in models])  # (M, b)
            columns[index] = ensemble_scores(each, self.cfg.rewards[index])
        for index, answer in begun.items():
            columns[index] = self._answer(index, answer, len(rows))
        parts = [column for index in sorted(columns) for column in columns[index]]
        return Rows.of(rows, list(torch.stack(parts, dim=1)))  # (b, C)

    def _read(self, model: ScalarHeadModel, rollout: Rollout, mine: Sequence[int]) -> Rows:
        """Return the score (1,) of a model for each of the rows `mine`, read at its last token."""
        self.know_flops(model)
        lengths = rollout.lengths
        reader = RowReader(rollout, pad_id=self.settings.pad_id)
        groups = microbatches(
            [lengths[i] for i in mine], self.training.tokens_per_microbatch, min_fill=MIN_FILL
        )
        indices: list[int] = []
        rows: list[Tensor] = []
        for group in groups:
            micro = reader.tokens([mine[position] for position in group]).to(self.device)
            with self.autocast():
                scores = model(micro.input_ids, micro.attention_mask)  # (b, S)
            self.count(micro)
            last = last_scores(scores, micro.attention_mask.sum(dim=1))  # (b,)
            indices += micro.indices
            rows += list(last.cpu().unsqueeze(1))
        return Rows.of(indices, rows)

    def _of_model(self, model: ScalarHeadModel, rollout: Rollout, rows: list[int]) -> Tensor:
        """Return the scores of a model in the order of `rows`: (b,)."""
        found = dict(zip(*self._read(model, rollout, rows), strict=True))
        return torch.cat([found[row] for row in rows]).float()

    def _submit(self, rollout: Rollout, rows: list[int]) -> dict[int, tuple[float, Future[Any]]]:
        """Start functions and endpoints; returns when each was started, and its answer."""
        if not self.scorers:
            return {}
        every = rollout.prompt_ids.split(rollout.prompt_lengths.tolist()), rollout.responses()
        prompts, responses = (
            self.tokenizer.batch_decode(
                [list(ids[row]) for row in rows],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            for ids in every
        )
        return {
            index: (time.monotonic(), scorer.submit(prompts, responses))
            for index, scorer in self.scorers.items()
        }

    def _answer(self, index: int, begun: tuple[float, Future[Any]], wanted: int) -> list[Tensor]:
        """Return the columns, (b,) each, of a function or an endpoint.

        Raises TimeoutError when a function is late, RuntimeError when it or the endpoint failed,
        and RecipeError when what came are not `wanted` finite numbers. Each call and each request
        has a deadline of its own.
        """
        scorer, (started, answer) = self.scorers[index], begun
        while not wait([answer], timeout=LINE_EVERY_S).done:
            waited = time.monotonic() - started
            console.say(f"ppo: waiting for {scorer.key}, for {waited:.0f} s so far")
        found, default = answer.result(), self.cfg.rewards[index].default_score
        if default is None:
            return [as_scores(scorer.key, found, wanted)]
        scores = as_scores(
            scorer.key, [default if each is None else each for each in found], wanted
        )
        return [scores, torch.tensor([float(each is None) for each in found])]


def text_scorer(index: int, reward: RewardSource, where: str) -> TextScorer:
    """Import a function, or ask an endpoint once; raises RecipeError when that fails."""
    key = key_of(index, reward)
    if reward.function is not None:
        return FunctionScorer(key, where, reward)
    scorer = EndpointScorer(key, where, reward)
    scorer.try_out()
    return scorer


def ensemble_scores(scores: Tensor, reward: RewardSource) -> list[Tensor]:
    """Return the columns of models whose scores are (M, b): mean - k * std, and std; (b,) each.

    Of a single model its score alone.
    """
    if reward.std_penalty is None:
        return [scores[0]]
    std = scores.std(dim=0, correction=0)
    return [scores.mean(dim=0) - reward.std_penalty * std, std]


def as_scores(key: str, values: Any, wanted: int) -> Tensor:
    """Return what a function or an endpoint gave as (wanted,) float32.

    Raises RecipeError unless these are as many finite numbers as there are responses.
    """
    rule = "return one finite number for each response, in their order"
    try:
        scores = torch.as_tensor([float(value) for value in values], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise no_numbers(key, type(values).__name__, str(error)) from None
    if len(scores) != wanted:
        raise RecipeError(f"{key}: it gave {len(scores)} scores for {wanted} responses: {rule}")
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise RecipeError(
            f"{key}: it gave {float(scores[wrong[0]])} for response {wrong[0] + 1} of {wanted}"
            f"{f', and {len(wrong) - 1} more that are not finite' if len(wrong) > 1 else ''}: "
            f"{rule}"
        )
    return scores
