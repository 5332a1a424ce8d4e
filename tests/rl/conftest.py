"""PPO without Ray: the five workers in this process behind the very groups of the package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rayrlhf.metrics import MetricsLogger, read_jsonl
from rayrlhf.rl import waiting
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ppo import run_steps
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.state import restore
from rayrlhf.training.checkpoint import newest_checkpoint
from tests.rl.inline import (
    PROMPTS,
    InlineRay,
    Metrics,
    inline_roles,
    inline_settings,
    write_corpus,
    write_small_critic,
    write_small_model,
)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a vocabulary of 12."""
    return write_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small_critic(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """A reward model on the same trunk, with a shift."""
    return write_small_critic(tmp_path_factory.mktemp("critic"), small_model)


@pytest.fixture
def settings(small_model: Path, tiny_tokenizer: Path) -> Callable[..., RoleSettings]:
    """Return settings(**keys of PPOConfig)."""

    def make(
        *,
        model: Path = small_model,
        corpus: str = "",
        documents_apart: bool = False,
        actor_ranks: int = 1,
        seed: int = 0,
        **keys: Any,
    ) -> RoleSettings:
        return inline_settings(
            model,
            tiny_tokenizer,
            corpus_path=corpus,
            documents_apart=documents_apart,
            actor_ranks=actor_ranks,
            seed=seed,
            **keys,
        )

    return make


@pytest.fixture
def inline_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the groups call their workers in this process."""
    monkeypatch.setattr(waiting, "ray", InlineRay)


@pytest.fixture
def make_roles(inline_ray: None, small_critic: Path) -> Callable[..., Roles]:
    """Return make_roles(settings): the five roles, loaded, in this process."""

    def make(own: RoleSettings, **keys: Any) -> Roles:
        return inline_roles(own, small_critic, **keys)

    return make


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)


@pytest.fixture
def train(
    make_roles: Callable[..., Roles],
    settings: Callable[..., RoleSettings],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Callable[..., Metrics]:
    """Return train(name, **keys of PPOConfig): run the loop they ask for; returns its metrics."""

    def run(name: str = "run", *, seed: int = 0, **keys: Any) -> Metrics:
        own = settings(seed=seed, **keys)
        stage = tmp_path / name
        checkpoint = newest_checkpoint(stage)
        state = restore(own.ppo, checkpoint)
        roles = make_roles(own, checkpoint=checkpoint)
        prompts = Prompts(PROMPTS, seed, own.ppo.batch_size)
        with MetricsLogger(stage, start_step=state.step) as log:
            run_steps(own.ppo, roles, prompts, state, log, tokenizer)
        return read_jsonl(stage / "metrics.jsonl")

    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Rows that count up and down, so that there is something to learn."""
    return write_corpus(
        tmp_path, [[2 + (start + i) % 10 for i in range(8)] for start in range(10)] * 3
    )
