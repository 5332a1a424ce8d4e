"""Tokenizers: train a byte-level BPE, load one for a run, encode texts.

The trained tokenizer is GPT-2's (byte-level BPE: lossless on any Unicode, no unknown token) with
six special tokens and a chat template. There is no beginning-of-text token: as in GPT-2 an
end-of-text token stands between documents.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayrlhf.config import Recipe, RecipeError
from rayrlhf.data import builtin

EOS, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (EOS, PAD, "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
# An answer ends with end-of-text, the token that stops generation; other turns with <|end|>.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_ORIGIN = "rayrlhf_origin.json"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` ids: special tokens, 256 bytes, merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return the run's tokenizer from `<run_dir>/tokenizer`.

    When `tokenizer.path` or `model.path` names it, it is copied there first (atomically). Raises
    RecipeError when it is neither there nor named.
    """
    folder = recipe.path / "tokenizer"
    source = source_of(recipe)
    if source is not None and origin_of(folder) != source:
        save_tokenizer(read_tokenizer(builtin.resolve(source)), folder, origin=source)
    if not (folder / "tokenizer_config.json").is_file():
        raise RecipeError(
            f"{folder}: no tokenizer yet: run `rayrlhf corpus` first, or set tokenizer.path"
        )
    return read_tokenizer(str(folder))


def source_of(recipe: Recipe) -> str | None:
    """Return the name of the existing tokenizer that the recipe takes; None: it trains one."""
    return recipe.tokenizer.path or recipe.model.path


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, *, origin: str) -> None:
    """Write a Hugging Face tokenizer folder in one step, replacing what is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer.save_pretrained(new)
        (new / _ORIGIN).write_text(json.dumps({"origin": origin}) + "\n", encoding="utf-8")
        new.chmod(0o755)
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        finally:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of `text` alone; a special token's name inside it stays ordinary text."""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, model_vocab_size: int) -> None:
    """Raise RecipeError when the tokenizer has an id for which the model has no row."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= model_vocab_size:
        raise RecipeError(
            f"the tokenizer has ids up to {largest}, but the model has only {model_vocab_size} "
            "rows: set tokenizer.path to the model's own tokenizer, or train the model from "
            "scratch (model.path=null)"
        )


def origin_of(folder: Path) -> str | None:
    """Return what `save_tokenizer` was told of the origin of a tokenizer; None without one."""
    file = folder / _ORIGIN
    if not file.is_file():
        return None
    return str(json.loads(file.read_text(encoding="utf-8"))["origin"])


def read_tokenizer(path: str, *, fix: str = "correct tokenizer.path") -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of a folder or hub name; RecipeError, with `fix`, without one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: no tokenizer can be loaded from here ({str(error).splitlines()[0]}): {fix}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RecipeError(
            f"{path}: {type(tokenizer).__name__} is not a fast tokenizer, one with a "
            f"tokenizer.json: {fix}"
        )
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"{path}: the tokenizer has no end-of-text token: set eos_token in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
