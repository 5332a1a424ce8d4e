"""The judges that `evaluate.judges` adds: reward models and functions that score, and LLMs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import JudgeConfig, Recipe, RecipeError, judge_key
from rayrlhf.data import builtin
from rayrlhf.data.datasets import Record, encode_prompts
from rayrlhf.data.tokenizer import check_vocabulary, encode_text, read_tokenizer
from rayrlhf.evaluation.comparison import device, release
from rayrlhf.evaluation.judges import Answer, RewardJudge
from rayrlhf.evaluation.llm_judge import LLMJudge
from rayrlhf.evaluation.verdicts import VerdictCache
from rayrlhf.external import functions
from rayrlhf.models.folder import load_config
from rayrlhf.models.scalar_head import ScalarHeadModel

Floats = npt.NDArray[np.float64]

VERDICTS = "verdicts.jsonl"
"""In the run directory, and not in that of the evaluation, which a changed recipe begins anew."""


class FunctionJudge:
    """A user's function of prompts and responses, which is given them as PPO gives them."""

    def __init__(self, key: str, judge: JudgeConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        """Check the function in a process of its own, and import it here."""
        assert judge.function is not None, "it is a judge with a function"
        self.key, self.name = key, judge.title
        place = functions.place_of(judge.function)
        functions.check(key, place)
        self._function = functions.load(key, place)
        self._tokenizer = tokenizer

    def scores(self, answers: Mapping[str, Sequence[Answer]]) -> dict[str, Floats]:
        """Return (N,) scores of each model's answers; raises RecipeError as `score` does."""
        return {model: self.score(given) for model, given in answers.items()}

    def score(self, answers: Sequence[Answer]) -> Floats:
        """Return (N,) scores; RecipeError when they are not one finite number per answer."""
        prompts = self._tokenizer.batch_decode(
            [answer.prompt_ids for answer in answers],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        try:
            found = self._function(prompts, [answer.response for answer in answers])
            scores = np.array([float(score) for score in found], dtype=np.float64)
        except Exception as error:
            raise RecipeError(
                f"{self.key}: it raised {type(error).__name__}: {error}: let it return one number "
                "for each response"
            ) from error
        if len(scores) != len(answers) or not np.isfinite(scores).all():
            wrong = f"{len(scores)} scores for {len(answers)} responses"
            raise RecipeError(
                f"{self.key}: it gave {wrong if len(scores) != len(answers) else 'NaN or infinity'}"
                ": let it return one finite number for each response, in their order"
            )
        return scores


class ModelJudge:
    """A reward model that is not of the run, with its own tokenizer."""

    def __init__(
        self, key: str, judge: JudgeConfig, records: Sequence[Record], tokens_per_batch: int
    ) -> None:
        """Check that it is there and fits its tokenizer; it is loaded to score."""
        assert judge.model is not None, "it is a judge with a model"
        self.key, self.name = key, judge.title
        self._folder = builtin.resolve(judge.model)
        self._tokens_per_batch = tokens_per_batch
        try:
            config = load_config(self._folder)
            self._tokenizer = read_tokenizer(
                self._folder, fix="put the tokenizer of the model into its folder"
            )
            check_vocabulary(self._tokenizer, config.vocab_size)
            self._prompts = encode_prompts(records, self._tokenizer, 2**31)
        except RecipeError as error:
            raise RecipeError(f"{key}: {error}") from None

    def scores(self, answers: Mapping[str, Sequence[Answer]]) -> dict[str, Floats]:
        """Return (N,) scores of each model's answers to the prompts, at the end-of-text token.

        The model is in memory only meanwhile.
        """
        eos_id = int(self._tokenizer.eos_token_id)
        judge = RewardJudge(
            ScalarHeadModel.from_pretrained(self._folder),
            eos_id=eos_id,
            device=device(),
            tokens_per_batch=self._tokens_per_batch,
        )
        found = {
            model: judge.score_ids(
                [
                    [*prompt, *encode_text(self._tokenizer, answer.response), eos_id]
                    for prompt, answer in zip(self._prompts, given, strict=True)
                ]
            )
            for model, given in answers.items()
        }
        del judge
        release()
        return found


ScoreJudge = FunctionJudge | ModelJudge


def panel(
    recipe: Recipe,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    tokens_per_batch: int,
) -> list[ScoreJudge | LLMJudge]:
    """Return the judges of `evaluate.judges`, each of which can judge.

    Raises RecipeError that names the one which cannot be loaded, or does not answer.
    """
    return [
        seated(judge_key(place, judge), judge, recipe.path, records, tokenizer, tokens_per_batch)
        for place, judge in recipe.judges.items()
        if place.startswith("evaluate.")
    ]


def seated(
    key: str,
    judge: JudgeConfig,
    folder: Path,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    tokens_per_batch: int,
) -> ScoreJudge | LLMJudge:
    """Return a judge that can judge answers to `records`; verdicts of an LLM are kept in `folder`.

    Raises RecipeError, with its `key`, when it cannot be loaded, or does not answer.
    """
    if judge.kind == "function":
        return FunctionJudge(key, judge, tokenizer)
    if judge.kind == "model":
        return ModelJudge(key, judge, records, tokens_per_batch)
    asked = LLMJudge(key, judge, VerdictCache(folder / VERDICTS))
    asked.try_out()
    return asked
