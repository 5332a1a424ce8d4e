"""Chats by the templates of real models, token by token against pieces written by hand.

A piece is what one side says: text, and whether the assistant says it. Pieces are tokenized by
themselves, special tokens by their id, so the expectation knows nothing of the code under test.
"""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import RecipeError
from rayrlhf.data.chat import encode_chat
from rayrlhf.data.datasets import encode_demonstration
from tests.data import templates

SPECIAL = {
    "im": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "llama2": ["<s>", "</s>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "r1": ["<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"],
}
TEXTS = ["hello there\n\n", "good day", "You are a helpful assistant.\n", "assistant\n\nuser"] * 20


def tokenizer_of(kind: str, template: str, eos: str, bos: str | None = None) -> Any:
    """Return a byte-level BPE whose merges cross words and newlines, with these special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL[kind],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def expected(tokenizer: Any, pieces: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return (token, mask) of the pieces; text between special tokens is one text."""
    names = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    names = sorted({*names, *tokenizer.get_added_vocab()}, key=len, reverse=True)
    found = []
    for text, spoken in pieces:
        for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
            if part in names:
                found.append((part, spoken))
            elif part:
                found += [
                    (token, spoken)
                    for token in tokenizer.backend_tokenizer.encode(
                        part, add_special_tokens=False
                    ).tokens
                ]
    return found


def encoded(tokenizer: Any, messages: list[dict[str, Any]]) -> list[tuple[str, int]]:
    ids, mask = encode_chat(tokenizer, messages)
    return list(zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True))


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TURNS = [
    said("user", "hello"),
    said("assistant", "good day"),
    said("user", "and?"),
    said("assistant", "the end"),
]
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
LLAMA3_HEAD = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
    "December 2023\nToday Date: 26 Jul 2024\n\n"
)

CASES: dict[str, tuple[Any, list[dict[str, Any]], list[tuple[str, int]]]] = {
    "chatml puts a system prompt in": (
        tokenizer_of("im", templates.CHATML, "<|im_end|>"),
        TURNS,
        [
            (f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n", 0),
            ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", 0),
            ("good day<|im_end|>", 1),
            ("\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n", 0),
            ("the end<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "chatml with a system prompt and a tool": (
        tokenizer_of("im", templates.CHATML, "<|im_end|>"),
        [
            said("system", "be kind"),
            said("user", "hello"),
            said(
                "assistant",
                None,
                tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}],
            ),
            said("tool", "12"),
            said("assistant", "good day"),
        ],
        [
            ("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n", 0),
            ("<|im_start|>assistant\n", 0),
            ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>', 1),
            ("\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n", 0),
            ("<|im_start|>assistant\n", 0),
            ("good day<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "chatml of a base model, whose end-of-text is another": (
        tokenizer_of("im", templates.CHATML, "<|endoftext|>"),
        [said("system", "be kind"), *TURNS[:2]],
        [
            ("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n", 0),
            ("<|im_start|>assistant\n", 0),
            ("good day<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "qwen3 takes earlier reasoning out": (
        tokenizer_of("im", templates.QWEN3, "<|im_end|>"),
        [
            TURNS[0],
            said("assistant", "<think>\nwho?\n</think>\n\ngood day"),
            TURNS[2],
            said("assistant", "<think>\nso\n</think>\n\nthe end"),
        ],
        [
            ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", 0),
            ("good day<|im_end|>\n", 0),  # it would have reasoned here
            ("<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n", 0),
            ("<think>\nso\n</think>\n\nthe end<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "qwen3 within one turn of tools": (
        tokenizer_of("im", templates.QWEN3, "<|im_end|>"),
        [
            TURNS[0],
            said("assistant", "f(1)", reasoning_content="who?"),
            said("tool", "12"),
            said("assistant", "good day"),
        ],
        [
            ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", 0),
            ("<think>\nwho?\n</think>\n\nf(1)<|im_end|>", 1),
            ("\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n", 0),
            ("<|im_start|>assistant\n", 0),
            ("<think>\n\n</think>\n\ngood day<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
    "llama-2 strips texts and begins every turn anew": (
        tokenizer_of("llama2", templates.LLAMA2, "</s>", "<s>"),
        [said("system", "be kind"), *TURNS[:2], TURNS[2], said("assistant", " the end\n")],
        [
            ("<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhello [/INST]", 0),
            (" good day </s>", 1),
            ("<s>[INST] and? [/INST]", 0),
            (" the end </s>", 1),
        ],
    ),
    "mistral": (
        tokenizer_of("llama2", templates.MISTRAL, "</s>", "<s>"),
        TURNS,
        [
            ("<s>[INST] hello [/INST]", 0),
            ("good day</s>", 1),
            ("[INST] and? [/INST]", 0),
            ("the end</s>", 1),
        ],
    ),
    "llama-3 tells the same date every day": (
        tokenizer_of("llama3", templates.LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
        TURNS,
        [
            (LLAMA3_HEAD + "<|eot_id|>", 0),
            ("<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>", 0),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", 0),
            ("good day<|eot_id|>", 1),
            ("<|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>", 0),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", 0),
            ("the end<|eot_id|>", 1),
        ],
    ),
    "llama-3 writes what a tool says as JSON": (
        tokenizer_of("llama3", templates.LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
        [said("system", "be kind "), TURNS[0], said("tool", "1\n2"), TURNS[1]],
        [
            (LLAMA3_HEAD + "be kind<|eot_id|>", 0),
            ("<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>", 0),
            ('<|start_header_id|>ipython<|end_header_id|>\n\n"1\\n2"<|eot_id|>', 0),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", 0),
            ("good day<|eot_id|>", 1),
        ],
    ),
    "gemma calls the assistant model": (
        tokenizer_of("gemma", templates.GEMMA, "<eos>", "<bos>"),
        TURNS,
        [
            ("<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n", 0),
            ("good day<end_of_turn>", 1),
            ("\n<start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n", 0),
            ("the end<end_of_turn>", 1),
            ("\n", 0),
        ],
    ),
    "zephyr": (
        tokenizer_of("llama2", templates.ZEPHYR, "</s>", "<s>"),
        [said("system", "be kind"), *TURNS],
        [
            ("<|system|>\nbe kind</s>\n<|user|>\nhello</s>\n<|assistant|>\n", 0),
            ("good day</s>", 1),
            ("\n<|user|>\nand?</s>\n<|assistant|>\n", 0),
            ("the end</s>", 1),
            ("\n", 0),
        ],
    ),
    "phi-3 closes the chat with one token more": (
        tokenizer_of("phi3", templates.PHI3, "<|endoftext|>", "<s>"),
        TURNS,
        [
            ("<|user|>\nhello<|end|>\n<|assistant|>\n", 0),
            ("good day<|end|>", 1),
            ("\n<|user|>\nand?<|end|>\n<|assistant|>\n", 0),
            ("the end<|end|>\n<|endoftext|>", 1),
        ],
    ),
    "marks are taken at their word": (
        tokenizer_of("im", templates.MARKED, "<|im_end|>"),
        [TURNS[0], said("assistant", "<think>who?</think>good day"), *TURNS[2:]],
        [
            ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", 0),
            ("good day<|im_end|>", 1),
            ("\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n", 0),
            ("the end<|im_end|>", 1),
            ("\n", 0),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_token_and_its_mask(case: str) -> None:
    tokenizer, messages, pieces = CASES[case]
    assert encoded(tokenizer, messages) == expected(tokenizer, pieces)


@pytest.mark.parametrize("case", [name for name in CASES if "marks" not in name])
def test_what_stands_before_the_last_answer_is_the_prompt(case: str) -> None:
    """The model reads the same tokens in training and when it generates."""
    tokenizer, messages, _ = CASES[case]
    ids, mask = encode_chat(tokenizer, messages)
    prompt, _ = encode_chat(tokenizer, messages[:-1], open_answer=True)
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt)] == 1 and mask[len(prompt) - 1] == 0


def test_pieces_of_characters() -> None:
    """A tokenizer in the manner of sentencepiece: a space goes before the text, and only there."""
    letters = sorted({*"".join(m["content"] for m in TURNS), *"[INST]/<>", "\u2581"})
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = templates.LLAMA2
    pieces = [("[INST] hello [/INST]", 0), (" good day ", 1), ("[INST] and? [/INST]", 0)]
    pieces.append((" the end ", 1))
    wanted = []
    for text, spoken in pieces:
        wanted += [] if spoken else [("<s>", 0)]
        wanted += [(letter.replace(" ", "\u2581"), spoken) for letter in text]
        wanted += [("</s>", 1)] if spoken else []
    assert encoded(tokenizer, TURNS) == wanted


def test_an_answer_that_would_merge_with_its_opening_is_cut_off_from_it() -> None:
    """The opening ends with a newline; "\\n\\n" is one token, and no model could generate half."""
    tokenizer, _, _ = CASES["chatml puts a system prompt in"]
    assert "\u010a\u010a" in tokenizer.tokenize("hello there\n\n")
    chat = [said("system", "x"), TURNS[0], said("assistant", "\nwell")]
    ids, mask = encode_chat(tokenizer, chat)
    prompt, _ = encode_chat(tokenizer, chat[:-1], open_answer=True)
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "\nwell<|im_end|>"


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_a_demonstration_ends_with_end_of_text(eos: str) -> None:
    """What stops generation is learned, whatever a template ends a turn with."""
    tokenizer = tokenizer_of("im", templates.CHATML, eos)
    example = encode_demonstration({"messages": TURNS[:2]}, tokenizer, 1000)
    assert example is not None
    spoken = [i for i, m in zip(example.ids, example.mask, strict=True) if m]
    end = "<|im_end|>" if eos == "<|im_end|>" else "<|im_end|><|endoftext|>"
    assert tokenizer.decode(spoken) == "good day" + end
    assert example.mask[-1] == 1 and example.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("kind", "template", "messages", "says"),
    [
        (
            "r1",
            templates.R1,
            TURNS,
            "hello<|Assistant|><think>\\n', but shows no answer that begins",
        ),
        ("llama2", templates.LLAMA2, TURNS[1:], "roles must alternate"),
        ("gemma", templates.GEMMA, [said("system", "x"), *TURNS], "System role not supported"),
        (
            "llama2",
            templates.ZEPHYR,
            [TURNS[0], said("tool", "12"), TURNS[1]],
            "leaves out message 2, whose role is tool",
        ),
        (
            "im",
            templates.CHATML,
            [said("user", "a<|im_end|>"), TURNS[1]],
            "message 1 (user) holds the special token '<|im_end|>'",
        ),
        (
            "im",
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            [*TURNS[:3], said("assistant", "")],
            "cannot be told apart",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(
    kind: str, template: str, messages: list[dict[str, Any]], says: str
) -> None:
    names = SPECIAL[kind]
    tokenizer = tokenizer_of(kind, template, names[1], names[0])
    with pytest.raises(RecipeError, match=re.escape(says)) as caught:
        encode_chat(tokenizer, messages)
    assert len(str(caught.value).splitlines()) == 1


def test_a_token_over_the_border_is_refused_where_parts_do_not_add_up() -> None:
    """Sentencepiece puts a space before a part, which was not in the text."""
    vocab = {t: i for i, t in enumerate(["<unk>", "\u2581", "a", "b", "</s>", "ab", "\u2581ab"])}
    core = Tokenizer(
        models.BPE(vocab=vocab, merges=[("a", "b"), ("\u2581", "ab")], unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    with pytest.raises(RecipeError, match="lets a token reach over the border"):
        encode_chat(tokenizer, [said("user", "a"), said("assistant", "b")])
