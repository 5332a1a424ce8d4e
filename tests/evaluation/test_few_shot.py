"""Prompts with demonstrations: what fits, what the seed draws, where the answer is cut."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayrlhf.config import FewShotConfig
from rayrlhf.data.tokenizer import encode_text
from rayrlhf.evaluation.answering import Prompt
from rayrlhf.evaluation.few_shot import as_answers, with_demonstrations
from rayrlhf.evaluation.judges import Answer

RECORDS = [{"prompt": f"Say {word}:", "response": f" {word}"} for word in ("good", "bad", "long")]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


def asked(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[Prompt]:
    return [Prompt(text, encode_text(tokenizer, text)) for text in texts]


def test_demonstrations_stand_before_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = FewShotConfig(demonstrations=2)
    prompts = asked(tokenizer, "Say it:", "Say more:")
    shown = with_demonstrations(prompts, RECORDS, tokenizer, cfg, room=500, seed=0)
    assert shown.counts == [2, 2]
    for given, prompt in zip(shown.prompts, prompts, strict=True):
        *examples, last = tokenizer.decode(given.ids).split("\n\n")
        assert given.text == last == prompt.text
        assert len(set(examples)) == 2
        assert set(examples) <= {r["prompt"] + r["response"] for r in RECORDS}
    again = with_demonstrations(prompts, RECORDS, tokenizer, cfg, room=500, seed=0)
    assert again == shown
    drawn = {
        str(with_demonstrations(prompts, RECORDS, tokenizer, cfg, room=500, seed=seed).prompts)
        for seed in range(8)
    }
    assert len(drawn) > 1


def test_only_what_fits_is_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    cfg = FewShotConfig(demonstrations=3, separator=None)
    [prompt] = asked(tokenizer, "Say it:")
    short = [{"prompt": "A", "response": " good"}]
    size = len(encode_text(tokenizer, "A good")) + 1  # and end-of-text
    for room, count in ((len(prompt.ids) + size, 1), (len(prompt.ids) + size - 1, 0)):
        shown = with_demonstrations([prompt], short, tokenizer, cfg, room=room, seed=0)
        assert shown.counts == [count]
        assert len(shown.prompts[0].ids) == len(prompt.ids) + count * size
    many = with_demonstrations([prompt], RECORDS, tokenizer, cfg, room=500, seed=0)
    ids = many.prompts[0].ids
    assert ids.count(tokenizer.eos_token_id) == 3 and ids[-len(prompt.ids) :] == prompt.ids


def test_an_answer_ends_where_the_next_example_would_begin(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    [prompt] = asked(tokenizer, "Say it:")
    text = " good film\n\nSay bad: bad"
    given = Answer(
        "Say it:", text, [9, 9, *prompt.ids], encode_text(tokenizer, text), [-1.0], ended=False
    )
    [cut] = as_answers([given], [prompt], tokenizer, FewShotConfig())
    assert (cut.response, cut.ended, cut.prompt_ids) == (" good film", True, prompt.ids)
    assert cut.response_ids == encode_text(tokenizer, " good film")
    [whole] = as_answers([given], [prompt], tokenizer, FewShotConfig(separator="###"))
    assert (whole.response, whole.ended, whole.prompt_ids) == (text, False, prompt.ids)
    [plain] = as_answers([given], [prompt], tokenizer, FewShotConfig(separator=None))
    assert plain.response == text
