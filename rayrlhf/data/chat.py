"""Chats to token ids and a mask on what the assistant says, by the tokenizer's own chat template.

A chat is rendered and tokenized as one text. Where the assistant speaks is marked by the template's
`{% generation %}`, or found by rendering: an answer begins where the prompt before it ends, opening
included, and ends with its end token. A cut always falls between two tokens, so that the tokens
before an answer are those that the model has before it when it generates.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerFast

from rayrlhf.config import RecipeError

TODAY = datetime(2024, 7, 26)
"""What templates that tell the date (Llama 3) are told: a run gives the same tokens every day. It
is the date that Llama's own template falls back on."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = dict[str, Any]
Span = tuple[int, int]


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    *,
    open_answer: bool = False,
) -> tuple[list[int], list[int]]:
    """Return (ids, mask) of a chat; the mask is 1 on what the assistant says, its end included.

    An earlier answer that the template shows in another way than it was said, as Qwen3 leaves out
    its reasoning, has a mask of 0. `open_answer` adds the opening of an answer after the last
    message. Raises RecipeError when the tokenizer has no chat template, when the template refuses
    or leaves out a message, when a text holds a special token, and when the last answer cannot be
    told apart to the token.
    """
    if not tokenizer.chat_template:
        raise RecipeError(
            "`messages` need a chat template, and this tokenizer has none: use "
            "`prompt` and `response` fields, or another tokenizer.path"
        )
    _check_texts(tokenizer, messages)
    text, spans = _answers(tokenizer, messages, open_answer=open_answer)
    ids, place = _tokenize(tokenizer, text, [cut for span in spans for cut in span])
    mask = [0] * len(ids)
    for start, end in spans:
        mask[place[start] : place[end]] = [1] * (place[end] - place[start])
    return ids, mask


def _answers(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, open_answer: bool
) -> tuple[str, list[Span]]:
    """Return the rendered chat, and where in it (characters) the assistant speaks."""
    whole, marked = _render(tokenizer, messages, open_answer=open_answer)
    for position, message in enumerate(messages):
        if message["role"] not in ("user", "assistant"):
            _check_shown(tokenizer, messages, position, whole, open_answer)
    ends_spoken = bool(messages) and messages[-1]["role"] == "assistant"
    if marked is not None:
        spans = [(start, end) for start, end in marked if start < end]
        if ends_spoken and not spans:
            raise _not_told_apart("marks nothing as generated")
        return whole, spans
    spans = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, _ = _render(tokenizer, messages[:position], open_answer=True)
        after, _ = _render(tokenizer, messages[: position + 1], open_answer=False)
        if not after.startswith(before):
            raise _not_told_apart(
                f"opens an answer with {before[-30:]!r}, but shows no answer that begins there"
            )
        end = _end(tokenizer, whole, before, after)
        if end is not None:
            spans.append((len(before), end))
    if ends_spoken and not (spans and _is_last(tokenizer, whole[spans[-1][1] :])):
        raise _not_told_apart("shows the last answer in another way within the whole chat")
    return whole, spans


def _end(tokenizer: PreTrainedTokenizerFast, whole: str, before: str, after: str) -> int | None:
    """Return where in `whole` the answer that `after` ends with ends, None if it isn't there.

    What a template adds after the end token (often a newline) is never generated.
    """
    answer = after[len(before) :]
    shown = 0
    if whole.startswith(before):
        for ours, theirs in zip(answer, whole[len(before) :], strict=False):
            if ours != theirs:
                break
            shown += 1
    tokens = list(_special(tokenizer).finditer(answer))
    ends = [token.end() for token in tokens if token.end() <= shown]
    stops = [t.end() for t in tokens if t.end() <= shown and t.group() == tokenizer.eos_token]
    if not tokens:
        return len(after) if shown == len(answer) > 0 else None
    end = max(stops or ends, default=0)
    # Some templates (Phi-3) close the whole chat with one token more.
    return len(before) + end if end and _is_last(tokenizer, answer[end:]) else None


def _is_last(tokenizer: PreTrainedTokenizerFast, rest: str) -> bool:
    """Tell whether a template's `rest` after an answer says nothing."""
    return not _special(tokenizer).sub("", rest).strip()


def _tokenize(
    tokenizer: PreTrainedTokenizerFast, text: str, cuts: Sequence[int]
) -> tuple[list[int], dict[int, int]]:
    """Return the ids of `text`, and for each of the ascending `cuts` the number of ids before it.

    Where a token would reach over a cut, the parts are tokenized apart, as they are when the one
    is the prompt and the other generated.
    """
    ids: list[int] = []
    place = {}
    start, rest = 0, _ids(tokenizer, text)
    for cut in cuts:
        head = _ids(tokenizer, text[start:cut])
        if rest[: len(head)] != head:
            tail = _ids(tokenizer, text[cut:])
            if _text(tokenizer, head + tail) != _text(tokenizer, rest):
                raise _not_told_apart(
                    f"lets a token reach over the border of an answer, at "
                    f"{text[max(0, cut - 20) : cut]!r} + {text[cut : cut + 20]!r}"
                )
            ids, start, rest, head = ids + head, cut, tail, []
        place[cut] = len(ids) + len(head)
    return ids + rest, place


def _check_texts(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> None:
    """Raise RecipeError for a special token in a text: the template's own could not be told."""
    for number, message in enumerate(messages, 1):
        found = _special(tokenizer).search(message["content"] or "")
        if found is not None:
            raise RecipeError(
                f"message {number} ({message['role']}) holds the special token {found.group()!r} "
                "in its text: take it out; the chat template adds what is needed"
            )


def _check_shown(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    position: int,
    whole: str,
    open_answer: bool,
) -> None:
    """Raise RecipeError when a template says nothing of a message, for example of a tool."""
    others = [message for other, message in enumerate(messages) if other != position]
    try:
        without, _ = _render(tokenizer, others, open_answer=open_answer)
    except RecipeError:
        return  # it is needed, then
    if without == whole:
        raise RecipeError(
            f"the tokenizer's chat template leaves out message {position + 1}, whose role is "
            f"{messages[position]['role']}: remove it, or choose a tokenizer.path that knows it"
        )


def _render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], *, open_answer: bool
) -> tuple[str, list[Span] | None]:
    """Return the text, and the spans that the template marks; None when it marks none."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    marks = _GENERATION.search(template) is not None
    settings = {**tokenizer.special_tokens_map, "strftime_now": TODAY.strftime}
    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=open_answer,
            **settings,
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages) or "no message"
        raise RecipeError(
            f"the tokenizer's chat template refuses a chat of {roles} ({error}): correct the "
            "record, or choose another tokenizer.path"
        ) from None
    return texts[0], spans[0] if marks else None


def _special(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Return a pattern of the special tokens of a tokenizer."""
    tokens = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    tokens |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)))


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _not_told_apart(why: str) -> RecipeError:
    return RecipeError(
        f"the tokenizer's chat template {why}, so the tokens of the answer cannot be told apart: "
        "use `prompt` and `response`, or mark the answers in the template with "
        "{% generation %} ... {% endgeneration %}"
    )
