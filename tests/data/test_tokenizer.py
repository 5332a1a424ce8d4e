"""The trained tokenizer loses nothing; chats become ids and a mask on what the assistant says."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.data.chat import encode_chat
from rayrlhf.data.tokenizer import (
    SPECIAL_TOKENS,
    check_vocabulary,
    encode_text,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = ["the movie is good", "the movie is bad", "what a good, good day"] * 5
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "the end"},
]
# Rewrites history as templates of reasoning models do: earlier answers disappear.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
    "{{ ('>' if m['role'] == 'assistant' else '') + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(TEXTS), vocab_size=290)


def recipe_for(run_dir: Path, path: Path | None) -> Recipe:
    return parse(
        {
            "name": "x",
            "run_dir": str(run_dir),
            "tokenizer": {"path": None if path is None else str(path)},
            "corpus": {"sources": {"a": {"path": "a.jsonl"}}},
        }
    )


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_unicode_round_trips(text: str) -> None:
    ids = encode_text(TOKENIZER, text)
    assert TOKENIZER.decode(ids) == text
    assert not {TOKENIZER.eos_token_id, TOKENIZER.pad_token_id} & set(ids)


TOKENIZER = train_tokenizer(iter(TEXTS), vocab_size=290)


def test_vocabulary_and_special_tokens(trained: PreTrainedTokenizerFast) -> None:
    assert len(trained) <= 290
    assert trained.convert_ids_to_tokens(list(range(6))) == list(SPECIAL_TOKENS)
    assert trained.eos_token == "<|endoftext|>"
    assert trained.pad_token == "<|pad|>"
    assert trained.eos_token_id != trained.pad_token_id


def test_training_is_deterministic(trained: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(iter(TEXTS), 290).get_vocab() == trained.get_vocab()


def test_a_special_name_inside_a_text_is_ordinary_text(trained: PreTrainedTokenizerFast) -> None:
    ids = encode_text(trained, "a<|endoftext|>b<|user|>")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert trained.decode(ids) == "a<|endoftext|>b<|user|>"


def test_chat_mask_is_one_on_the_answers_and_their_end(trained: PreTrainedTokenizerFast) -> None:
    ids, mask = encode_chat(trained, CHAT)
    assert trained.decode(ids) == (
        "<|system|>be kind<|end|><|user|>hi<|end|><|assistant|>good day<|endoftext|>"
        "<|user|>bye<|end|><|assistant|>the end<|endoftext|>"
    )
    spoken = [i for i, m in zip(ids, mask, strict=True) if m]
    assert trained.decode(spoken) == "good day<|endoftext|>the end<|endoftext|>"


def test_an_open_answer_continues_as_it_was_trained(trained: PreTrainedTokenizerFast) -> None:
    prompt, mask = encode_chat(trained, CHAT[:-1], open_answer=True)
    whole, _ = encode_chat(trained, CHAT)
    assert whole[: len(prompt)] == prompt
    assert trained.decode(prompt).endswith("<|user|>bye<|end|><|assistant|>")
    assert sum(mask) == len(encode_text(trained, "good day")) + 1


def test_what_a_template_adds_after_the_answer_has_no_loss(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    other.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\\n' + m['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    )
    ids, mask = encode_chat(other, CHAT[1:3])
    assert other.decode(ids).endswith("good day<|endoftext|>\n")
    assert other.decode([i for i, m in zip(ids, mask, strict=True) if m]) == (
        "good day<|endoftext|>"
    )
    other.chat_template = FORGETFUL
    ids, mask = encode_chat(other, CHAT)
    assert other.decode(ids) == "be kindhibye>the end"
    assert other.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "the end"


def test_chat_without_a_template(tiny_tokenizer: Path) -> None:
    with pytest.raises(RecipeError, match="chat template, and this tokenizer has none"):
        encode_chat(PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer), CHAT)


def test_a_named_tokenizer_is_copied_once_and_again_when_the_name_changes(
    tiny_tokenizer: Path, trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path / "run", tiny_tokenizer)
    assert load_tokenizer(recipe).get_vocab() == load_tokenizer(recipe).get_vocab()
    assert (tmp_path / "run/tokenizer/tokenizer.json").is_file()
    trained.save_pretrained(tmp_path / "other")
    changed = load_tokenizer(recipe_for(tmp_path / "run", tmp_path / "other"))
    assert changed.get_vocab() == trained.get_vocab()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["tokenizer"]


def test_a_saved_tokenizer_is_the_same(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, None)
    with pytest.raises(RecipeError, match="no tokenizer yet: run `rayrlhf corpus`"):
        load_tokenizer(recipe)
    save_tokenizer(trained, tmp_path / "tokenizer", origin="corpus")
    loaded = load_tokenizer(recipe)
    assert encode_chat(loaded, CHAT) == encode_chat(trained, CHAT)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)


def test_a_name_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"correct tokenizer\.path"):
        load_tokenizer(recipe_for(tmp_path, tmp_path / "nothing"))


def test_vocabulary_larger_than_the_model(trained: PreTrainedTokenizerFast) -> None:
    check_vocabulary(trained, len(trained))
    with pytest.raises(RecipeError, match="only 100 rows: set tokenizer.path"):
        check_vocabulary(trained, 100)
