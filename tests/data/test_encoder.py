"""Ids word by word are those of `tokenizers`, for any text and every kind of tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rayrlhf.data import encoder
from rayrlhf.data.encoder import GPT2, Encoder, word_pattern
from rayrlhf.data.tokenizer import save_tokenizer, train_tokenizer

TEXTS = [
    "The cat's mat, isn't it?  We'll see   what they've got: 12,345 of 678!\n\n\tEnd. ",
    "touch\u00e9 \u201cquoted\u201d na\u00efve \u4e2d\u6587\u5b57 \U0001f600\U0001f600 \u00e0 vu",
    "  leading, trailing  \n \n <|endoftext|> a<|pad|>b",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEVEL = {"add_prefix_space": False}
KINDS: dict[str, tuple[Any, str | None]] = {
    "gpt2": (pre_tokenizers.ByteLevel(**LEVEL), GPT2),
    "llama3": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(**LEVEL, use_regex=False),
            ]
        ),
        LLAMA3,
    ),
    "digits": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(**LEVEL)]
        ),
        None,
    ),
    "prefix space": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
}


def write(folder: Path, kind: str) -> Path:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = KINDS[kind][0]
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS * 5, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: Encoder(write(folder / kind, kind)) for kind in KINDS}


def expected(own: Encoder, texts: list[str]) -> list[list[int]]:
    found = own.tokenizer.encode_batch(texts, add_special_tokens=False)
    return [item.ids for item in found]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.text(max_size=30)
        | st.lists(
            st.sampled_from(["'s", "'S", "'ll", " ", "  ", "\n", "\r", "\t", "a", "B", "\u00e9"])
            | st.sampled_from(["1", "23", "\u0662", "\u2167", "\u00bd", ".", "\u2019", "\u017f"])
            | st.sampled_from(["\u00a0", "\u2028", "\x85", "\x1c", "\x00", "\u200b", "\u3042"])
            | st.sampled_from(["<|endoftext|>", "\u0378", "\ua7dc", "\U0001f600", "e\u0301"]),
            max_size=12,
        ).map("".join),
        max_size=6,
    )
)
def test_ids_are_those_of_the_whole_text(
    encoders: dict[str, Encoder], kind: str, texts: list[str]
) -> None:
    own = encoders[kind]
    assert [ids.tolist() for ids in own.encode(texts)] == expected(own, texts)


@pytest.mark.parametrize("kind", KINDS)
def test_which_tokenizers_are_looked_up_word_by_word(
    encoders: dict[str, Encoder], kind: str
) -> None:
    own = encoders[kind]
    assert word_pattern(json.loads(own.tokenizer.to_str())) == KINDS[kind][1]
    assert [ids.tolist() for ids in own.encode(TEXTS * 2)] == expected(own, TEXTS * 2)
    words = own._ids
    assert bool(words) == (KINDS[kind][1] is not None)
    before = dict(words)
    own.encode(TEXTS)
    assert words == before  # nothing new to learn


def test_a_token_added_later_is_found_before_words(tmp_path: Path) -> None:
    own = Encoder(write(tmp_path, "gpt2"))
    assert own._words is not None
    own.tokenizer.add_tokens([AddedToken("cat's", special=False)])
    own.tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Encoder(tmp_path)
    assert again._words is None
    assert [ids.tolist() for ids in again.encode(TEXTS)] == expected(again, TEXTS)


def test_words_are_forgotten_when_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "MAX_WORDS", 5)
    own = Encoder(write(tmp_path, "gpt2"))
    for number in range(20):
        texts = [f"word{chr(97 + number)} number {number}", *TEXTS]
        assert [ids.tolist() for ids in own.encode(texts)] == expected(own, texts)
    assert len(own._ids) < 60


def test_our_own_tokenizer_is_looked_up(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(iter(TEXTS), 300), tmp_path / "tokenizer", origin="test")
    own = Encoder(tmp_path / "tokenizer")
    assert own._words is not None
    assert [ids.tolist() for ids in own.encode(TEXTS)] == expected(own, TEXTS)
