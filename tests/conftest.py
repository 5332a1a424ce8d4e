"""Fixtures that several folders of tests share: tiny models and tokenizers, built on the spot."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_ADDRESS"] = "local"  # never join a cluster that a test did not start

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests import toy

SENTENCES = (
    "The movie is a good movie.",
    "A bad film, and a long one.",
    "I like the product, it works.",
    "The senate voted on the new law today.",
    "so happy today :)",
)


FINISHED = ("tests/test_end_to_end.py", "tests/test_jobs.py")


def _starts_ray(file: Path) -> bool:
    return "mark.ray" in file.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that start Ray first: they take longest, and the others fill what is left."""
    slow = {file: _starts_ray(file) for file in {item.path for item in items}}
    items.sort(key=lambda item: not slow[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process of pytest-xdist as a whole, for the fixtures of its module.

    Those that look at one finished run, which takes minutes, go to the same process.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "finished" if file in FINISHED else file

    config.option.loadscopereorder = False  # else the files with the most tests would be first
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests measure results, not speed; one thread each keeps two cores free of contention."""
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a byte-level BPE of 300 ids; end-of-text and padding differ."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return the Hugging Face folder, tokenizer included, of a random Llama of two layers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub_model(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the hub name of a model that is in the cache of a machine without a network."""
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / "0123"
    shutil.copytree(tiny_model, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "acme/tiny"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the whole toy pipeline; return its recipe and what it printed."""
    recipe = toy.write_recipe(tmp_path_factory.mktemp("toy"))
    done = toy.run("pipeline", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return recipe, done.stdout
