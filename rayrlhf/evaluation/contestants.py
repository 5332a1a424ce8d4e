"""Models from outside the run that answer its prompts: checked before any is loaded.

Each has its own tokenizer and, for `messages`, its own chat template. Its answers come back in the
run's vocabulary, which is what the run's judges read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rayrlhf.config import EvaluateConfig, Recipe, RecipeError
from rayrlhf.data import builtin
from rayrlhf.data.datasets import Record, encode_prompts
from rayrlhf.data.tokenizer import check_vocabulary, encode_text, read_tokenizer
from rayrlhf.evaluation.answering import Prompt
from rayrlhf.evaluation.judges import Answer
from rayrlhf.models.folder import load_config

Prompts = Sequence[Prompt]
AnswerPrompts = Callable[
    [Mapping[str, str], Prompts, PreTrainedTokenizerFast, Recipe, EvaluateConfig],
    dict[str, list[Answer]],
]


@dataclass(frozen=True)
class Contestant:
    """A model that can answer the prompts."""

    name: str
    folder: str
    """Or its name on the hub."""
    tokenizer: PreTrainedTokenizerFast
    prompts: list[list[int]]
    """Token ids of its own tokenizer."""
    max_length: int
    """Tokens of a prompt with its answer."""


def contestants(recipe: Recipe, records: Sequence[Record]) -> list[Contestant]:
    """Return `evaluate.models`, ready to answer the prompts.

    Raises RecipeError that names the model which is not there, has no tokenizer or chat template,
    a vocabulary that is too small for its tokenizer, or no room for a prompt with its answer.
    """
    cfg = recipe.evaluate
    assert cfg is not None, "there is an evaluation"
    found = []
    for name, path in cfg.models.items():
        try:
            found.append(_contestant(name, builtin.resolve(path), records, cfg))
        except RecipeError as error:
            raise RecipeError(f"evaluate.models.{name}: {error}") from None
    return found


def _contestant(
    name: str, folder: str, records: Sequence[Record], cfg: EvaluateConfig
) -> Contestant:
    config = load_config(folder)
    if Path(folder).is_dir() and not any(Path(folder).glob("*.safetensors")):
        raise RecipeError(f"{folder}: no *.safetensors there: give a complete model")
    tokenizer = read_tokenizer(folder, fix="put the tokenizer of the model into its folder")
    check_vocabulary(tokenizer, config.vocab_size)
    if not tokenizer.chat_template and any("messages" in record for record in records):
        raise RecipeError(
            f"{folder}: its tokenizer has no chat template, and evaluate.prompts={cfg.prompts} has "
            "`messages`: name a model that was trained on chats, or take it out"
        )
    settings = config.to_dict()
    room = settings.get("max_position_embeddings", settings.get("n_positions"))
    limit = 2**31 if room is None else room - cfg.max_response_tokens
    prompts = encode_prompts(records, tokenizer, 2**31)
    longest = max(map(len, prompts))
    if longest > limit:
        raise RecipeError(
            f"{folder}: a prompt has {longest} of its tokens, which with "
            f"evaluate.max_response_tokens={cfg.max_response_tokens} is more than the {room} that "
            "it can see: lower that, shorten the prompts, or take it out"
        )
    return Contestant(name, folder, tokenizer, prompts, longest + cfg.max_response_tokens)


def answers_of(
    field: Sequence[Contestant],
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    answer_prompts: AnswerPrompts,
) -> dict[str, list[Answer]]:
    """Let the contestants answer `prompts` (text, ids of the run's `tokenizer`).

    Those who take the same ids as the run share one engine.
    """
    cfg = recipe.evaluate
    assert cfg is not None, "there is an evaluation"
    ids = [prompt.ids for prompt in prompts]
    kin = [one for one in field if _is_kin(one, ids, tokenizer)]
    answers: dict[str, list[Answer]] = {}
    if kin:
        longest = _with_length(recipe, max(one.max_length for one in kin))
        folders = {one.name: one.folder for one in kin}
        answers |= answer_prompts(folders, prompts, tokenizer, longest, cfg)
    for one in field:
        if one.name in answers:
            continue
        own = [prompt._replace(ids=ids) for prompt, ids in zip(prompts, one.prompts, strict=True)]
        longest = _with_length(recipe, one.max_length)
        given = answer_prompts({one.name: one.folder}, own, one.tokenizer, longest, cfg)[one.name]
        answers[one.name] = [
            _in_vocabulary(answer, theirs, tokenizer, cfg.max_response_tokens)
            for answer, theirs in zip(given, ids, strict=True)
        ]
    return {one.name: answers[one.name] for one in field}


def _is_kin(
    one: Contestant, prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerFast
) -> bool:
    """Tell whether a model reads and writes just the ids of the run."""
    return (
        one.prompts == list(prompts)
        and one.tokenizer.eos_token_id == tokenizer.eos_token_id
        and one.tokenizer.get_vocab() == tokenizer.get_vocab()
    )


def _with_length(recipe: Recipe, max_length: int) -> Recipe:
    model = recipe.model.model_copy(update={"max_length": max_length})
    return recipe.model_copy(update={"model": model})


def _in_vocabulary(
    answer: Answer, prompt_ids: list[int], tokenizer: PreTrainedTokenizerFast, longest: int
) -> Answer:
    """Return the answer as the run's tokenizer has it, as far as the run's models can go.

    Judges of texts see all of it. There are no log-probs of tokens that nobody sampled.
    """
    ids = encode_text(tokenizer, answer.response)[:longest]
    if answer.ended and len(ids) < longest:
        ids.append(int(tokenizer.eos_token_id))
    return replace(answer, prompt_ids=prompt_ids, response_ids=ids, log_probs=[])
