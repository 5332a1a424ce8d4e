"""The arena's model with a stub for its engine: what fits is answered, what does not says why."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rayrlhf.config import ArenaConfig
from rayrlhf.generation import Completion
from rayrlhf.serving import answering


class StubEngine:
    """Says the number of the prompt's tokens."""

    def __init__(self, folder: str, **settings: Any) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def generate(self, prompts: list[list[int]], **settings: Any) -> list[Completion]:
        ids = [self._tokenizer.encode(str(len(prompt))) for prompt in prompts]
        return [Completion(x, [0.0] * len(x), "stop", [0] * len(x)) for x in ids]


def test_a_prompt_that_cannot_be_encoded_keeps_no_other_from_its_answer(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(answering, "Engine", StubEngine)
    cfg = ArenaConfig(models={"a": "a", "b": "b"}, prompt_format="chat", max_response_tokens=8)
    model = answering.ArenaModel(str(tmp_path), cfg, max_length=64, num_threads=1)
    special = f"what does {tokenizer.eos_token} mean?"
    good, wrong, long = model._answer(["Say it.", special, "a b c " * 60], [1, 2, 3])
    assert good.text and not good.error
    assert tokenizer.eos_token in wrong.error and not wrong.text
    assert "56 fit: shorten it" in long.error
