"""PPO without Ray: the five workers in this process behind the very groups of the package."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayrlhf.config import PPOConfig, Role
from rayrlhf.metrics import MetricsLogger, read_jsonl
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.rl import groups, waiting
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ppo import run_steps
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.rollout import RolloutWorker
from rayrlhf.rl.scoring import RewardWorker
from rayrlhf.rl.setup import Prompts, trained_model
from rayrlhf.rl.state import restore
from rayrlhf.rl.workers import ActorWorker, CriticWorker, ReferenceWorker
from rayrlhf.training.checkpoint import newest_checkpoint
from tests.rl.inline import (
    EOS,
    PAD,
    PROMPTS,
    VOCAB,
    CountingReward,
    InlineHandle,
    InlineRay,
    Metrics,
    SmallEngine,
    reward_places,
    write_corpus,
)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a vocabulary of 12."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_critic(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """A reward model on the same trunk, with a shift."""
    folder = tmp_path_factory.mktemp("critic")
    model = ScalarHeadModel.from_causal_lm(small_model, seed=3)
    model.shift = 0.25
    model.save_pretrained(folder)
    return folder


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
        defaults: dict[str, Any] = {
            "prompts": "none",
            "batch_size": 16,
            "num_minibatches": 2,
            "max_response_tokens": 6,
            "actor": {"learning_rate": 3e-3},
            "steps": 4,
        }
        if keys.get("advantage_estimator", "gae") == "gae":
            defaults["critic"] = {"learning_rate": 3e-3}
        ppo = PPOConfig(**{**defaults, **keys})
        return RoleSettings(
            ppo=ppo,
            rewards=reward_places(ppo),
            model_path=str(model),
            state_path=None,
            adapter_path=None,
            tokenizer_path=str(tiny_tokenizer),
            corpus_path=corpus,
            documents_apart=documents_apart,
            actor_ranks=actor_ranks,
            max_length=16,
            pad_id=PAD,
            eos_id=EOS,
            seed=seed,
            num_threads=1,
        )

    return make


@pytest.fixture
def inline_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the groups call their workers in this process."""
    monkeypatch.setattr(waiting, "ray", InlineRay)


@pytest.fixture
def make_roles(inline_ray: None, small_critic: Path) -> Callable[..., Roles]:
    """Return make_roles(settings): the five roles, loaded, in this process."""

    def make(
        own: RoleSettings,
        *,
        checkpoint: Path | None = None,
        critic: RoleSettings | None = None,
    ) -> Roles:
        reward = RewardWorker if own.ppo.rewards else CountingReward
        state = checkpoint / "training_state" if checkpoint else None
        actor = trained("actor", own, checkpoint, state)
        if critic is None:
            start = replace(own, model_path=str(small_critic))
            critic = trained("critic", start, state / "critic" if state else None, state)
        rollout = RolloutWorker(own)
        rollout.engine = SmallEngine(own.model_path)  # type: ignore[assignment]
        workers: dict[str, Any] = {
            "actor": ActorWorker(actor),
            **({"critic": CriticWorker(critic)} if own.ppo.has_critic else {}),
            "reference": ReferenceWorker(own),
            "reward": reward(replace(own, model_path=str(small_critic))),
        }
        for name, worker in workers.items():
            worker.start(*([("", 0)] if name in ("actor", "critic") else []))
        return Roles(
            actor=groups.ActorGroup([InlineHandle(workers["actor"])], deadline_s=60),
            critic=(
                groups.CriticGroup([InlineHandle(workers["critic"])], deadline_s=60)
                if own.ppo.has_critic
                else None
            ),
            reference=groups.ReferenceGroup([InlineHandle(workers["reference"])], deadline_s=60),
            reward=groups.RewardGroup([InlineHandle(workers["reward"])], deadline_s=60),
            rollout=groups.RolloutGroup([InlineHandle(rollout)], deadline_s=60),
        )

    return make


def trained(
    role: Role, start: RoleSettings, saved: Path | None, state: Path | None
) -> RoleSettings:
    """Return the settings of a trained role that starts, or goes on with what was saved."""
    if saved is None or state is None:
        return start
    model, adapter = trained_model(role, start.ppo, start.model_path, str(saved))
    return replace(start, model_path=model, adapter_path=adapter, state_path=str(state / role))


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
