"""Stand-ins for Ray and for vLLM: everything happens at once, in this process."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.exceptions
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rayrlhf.config import PPOConfig, Role
from rayrlhf.data.rows import write_shard
from rayrlhf.external.functions import place_of
from rayrlhf.generation import Completion
from rayrlhf.models.causal_lm import load_causal_lm
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.rl import groups
from rayrlhf.rl.experience import Rows
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.rollout import RolloutWorker
from rayrlhf.rl.scoring import RewardWorker
from rayrlhf.rl.setup import trained_model
from rayrlhf.rl.workers import ActorWorker, CriticWorker, ReferenceWorker

EOS, PAD = 0, 1
VOCAB = 12
PROMPTS = [[3, 4, 2 + i % 10] for i in range(20)]
Metrics = list[dict[str, Any]]
"""Lines of metrics.jsonl."""
BANDIT: dict[str, Any] = {
    "steps": 12,
    "batch_size": 32,
    "kl_coef": 0.0,
    "missing_eos_penalty": 0.0,
    "actor": {"learning_rate": 2e-2},
    "critic": {"learning_rate": 1e-2},
}
"""Nothing but `CountingReward` counts: the score rises to the end, and the KL with it, to more
than 2 nats."""


class Ref:
    """Stands in for an object reference."""

    def __init__(self, value: Any) -> None:
        self.value = value


class InlineRay:
    """The part of Ray that the groups use; everything is done at once, in this process."""

    exceptions = ray.exceptions

    @staticmethod
    def put(value: Any) -> Ref:
        return Ref(value)

    @staticmethod
    def get(refs: Any) -> Any:
        values = [ref.value for ref in (refs if isinstance(refs, list) else [refs])]
        for value in values:
            if isinstance(value, Exception):
                raise value
        return values if isinstance(refs, list) else values[0]

    @staticmethod
    def wait(refs: list[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        return refs[:num_returns], refs[num_returns:]


class InlineStream:
    """Stands in for a generator of references whose task is done, or died.

    As with Ray, an exception of the task is its last item.
    """

    def __init__(self, found: Any) -> None:
        self.error = found if isinstance(found, Exception) else None
        self.refs: list[Ref] = []
        try:
            for part in () if self.error else found:
                self.refs.append(Ref(part))
        except ray.exceptions.RayTaskError as error:
            self.refs.append(Ref(error))

    def completed(self) -> Ref:
        return Ref(self.error)

    def __iter__(self) -> Iterator[Ref]:
        return iter(self.refs)


class InlineMethod:
    def __init__(self, function: Callable[..., Any], num_returns: int | str = 1) -> None:
        self.function, self.num_returns = function, num_returns

    def options(self, *, num_returns: int | str = 1, concurrency_group: str = "") -> "InlineMethod":
        del concurrency_group
        return InlineMethod(self.function, num_returns)

    def remote(self, *args: Any) -> Any:
        value = self.function(*[a.value if isinstance(a, Ref) else a for a in args])
        if self.num_returns == "streaming":
            return InlineStream(value)
        return Ref(value)


class InlineHandle:
    """Stands in for a Ray actor handle."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def __getattr__(self, name: str) -> InlineMethod:
        return InlineMethod(getattr(self.worker, name))


class SmallEngine:
    """The engine's two verbs with plain transformers, for models of a dozen tokens."""

    def __init__(self, path: str) -> None:
        self.model = load_causal_lm(path)
        self.weight_version = 0
        self.calls = 0

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[Completion]:
        self.calls += 1
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = torch.tensor(prompts)  # prompts of one length only
        log_probs, tokens = [], []
        for _ in range(max_tokens):
            dist = self.distribution(rows, temperature or 1.0)
            chosen = torch.stack(
                [
                    torch.multinomial(row.exp(), 1, generator=g)
                    if temperature
                    else row.argmax(keepdim=True)
                    for row, g in zip(dist, generators, strict=True)
                ]
            )
            log_probs.append(dist.gather(1, chosen))
            tokens.append(chosen)
            rows = torch.cat([rows, chosen], dim=1)
        ids, values = torch.cat(tokens, 1).tolist(), torch.cat(log_probs, 1).tolist()
        completions = []
        for row, value in zip(ids, values, strict=True):
            end = row.index(EOS) + 1 if EOS in row else len(row)
            completions.append(
                Completion(
                    row[:end],
                    value[:end],
                    "stop" if EOS in row else "length",
                    [self.weight_version] * end,
                )
            )
        return completions

    def distribution(self, rows: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the log-probs (b, V) of the next token."""
        logits = self.model(rows).logits[:, -1].float() / temperature
        return logits.log_softmax(dim=-1)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def reset_prefix_cache(self) -> None:
        """It has none."""

    def load_weights(self, weights: Any, version: int) -> int:
        state = {name: torch.as_tensor(value).clone() for name, value in weights}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected and missing == list(self.model.all_tied_weights_keys)
        self.weight_version = version
        return version


class SmallRollout(RolloutWorker):
    """A rollout worker on it."""

    def start(self) -> None:
        self.engine = SmallEngine(self.settings.model_path)  # type: ignore[assignment]


class CountingReward(RewardWorker):
    """The score is how often token 5 occurs in the response."""

    def score(self, rollout: Any) -> Any:
        counts = [torch.tensor([float(row.count(5))]) for row in rollout.responses()]
        return Rows.of(list(range(len(rollout))), counts)


def reward_places(cfg: PPOConfig) -> tuple[tuple[str, ...], ...]:
    """Return where each of the rewards is, as setup.py does for a recipe."""
    return tuple(
        (place_of(reward.function),)
        if reward.function
        else tuple(place for place in (reward.model, reward.url, *(reward.members or ())) if place)
        for reward in cfg.rewards
    )


def timeless(rows: Metrics) -> Metrics:
    """Return the metrics without what depends on the clock or counts deaths."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(("time", "restarts/")) and name != "rollout/tokens_per_s"
        }
        for row in rows
    ]


def write_corpus(folder: Path, rows: Any) -> Path:
    """Write rows (n, T) as a corpus of one shard."""
    folder.mkdir(exist_ok=True)
    packed = np.asarray(rows, dtype=np.int32)
    shard = write_shard(folder / "train-00000.arrow", packed)
    manifest = {"row_length": packed.shape[1], "splits": {"train": {"shards": [shard]}}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def engine_model(folder: Path, tiny_model: Path, *, seed: int = 0) -> Path:
    """Write a random model as small as vLLM's attention on CPU allows: heads of 32."""
    torch.manual_seed(seed)
    config = LlamaConfig.from_pretrained(
        tiny_model, hidden_size=64, head_dim=32, max_position_embeddings=512
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def write_small_model(folder: Path) -> Path:
    """Write a Llama with a vocabulary of 12."""
    torch.manual_seed(0)
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


def write_small_critic(folder: Path, model: Path) -> Path:
    """Write a reward model on the same trunk, with a shift."""
    critic = ScalarHeadModel.from_causal_lm(model, seed=3)
    critic.shift = 0.25
    critic.save_pretrained(folder)
    return folder


def inline_settings(
    model: Path,
    tokenizer: Path,
    *,
    corpus_path: str = "",
    documents_apart: bool = False,
    actor_ranks: int = 1,
    seed: int = 0,
    **keys: Any,
) -> RoleSettings:
    """Return the settings of a toy run; `keys` are those of PPOConfig."""
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
    cfg = PPOConfig(**{**defaults, **keys})
    return RoleSettings(
        ppo=cfg,
        rewards=reward_places(cfg),
        model_path=str(model),
        state_path=None,
        adapter_path=None,
        tokenizer_path=str(tokenizer),
        corpus_path=corpus_path,
        documents_apart=documents_apart,
        actor_ranks=actor_ranks,
        max_length=16,
        pad_id=PAD,
        eos_id=EOS,
        seed=seed,
        num_threads=1,
    )


def inline_roles(
    own: RoleSettings,
    small_critic: Path,
    *,
    checkpoint: Path | None = None,
    critic: RoleSettings | None = None,
    reward: type[RewardWorker] = CountingReward,
) -> Roles:
    """Return the five roles, loaded, in this process; `waiting.ray` has to be InlineRay."""
    if own.ppo.rewards:
        reward = RewardWorker
    state = checkpoint / "training_state" if checkpoint else None
    actor = _trained("actor", own, checkpoint, state)
    if critic is None:
        start = replace(own, model_path=str(small_critic))
        critic = _trained("critic", start, state / "critic" if state else None, state)
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


def _trained(
    role: Role, start: RoleSettings, saved: Path | None, state: Path | None
) -> RoleSettings:
    """Return the settings of a trained role that starts, or goes on with what was saved."""
    if saved is None or state is None:
        return start
    model, adapter = trained_model(role, start.ppo, start.model_path, str(saved))
    return replace(start, model_path=model, adapter_path=adapter, state_path=str(state / role))
