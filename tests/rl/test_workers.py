"""The roles, one rank each, on a model of a dozen tokens."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.data.packing import pack_best_fit
from rayrlhf.generation import Completion
from rayrlhf.models.causal_lm import load_causal_lm, token_log_probs
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.rl import experience as experience_module
from rayrlhf.rl import ranks
from rayrlhf.rl.experience import (
    Experience,
    Rollout,
    RowReader,
    Rows,
    rank_microbatches,
    scatter_rows,
)
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.rollout import RolloutWorker
from rayrlhf.rl.scoring import RewardWorker
from rayrlhf.rl.workers import ActorWorker, CriticWorker, ReferenceWorker
from tests.rl.inline import EOS, SmallEngine, write_corpus

Make = Callable[..., RoleSettings]


def sample(settings: RoleSettings) -> Rollout:
    worker = RolloutWorker(settings)
    worker.engine = SmallEngine(settings.model_path)  # type: ignore[assignment]
    return worker.generate([[3, 4, 2 + i % 8] for i in range(settings.ppo.batch_size)], 0, step=0)


def actor_of(settings: RoleSettings) -> ActorWorker:
    worker = ActorWorker(settings)
    worker.start(("", 0))
    return worker


def flat(rows: Rows) -> torch.Tensor:
    by_row = dict(zip(*rows, strict=True))
    return torch.cat([by_row[i] for i in range(len(by_row))])


def experience(rollout: Rollout, old: torch.Tensor, advantages: torch.Tensor) -> Experience:
    zeros = torch.zeros_like(old)
    return Experience(
        rollout,
        old_log_probs=old,
        advantages=advantages,
        old_values=zeros,
        returns=torch.ones_like(old),
    )


def digest(worker: ActorWorker) -> str:
    weights = {
        name: part for bucket in worker.weights("float32") for name, part in (bucket or {}).items()
    }
    return hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights))).hexdigest()


@pytest.mark.parametrize("tokens", [1, 24, 4096])
def test_first_minibatch_has_ratio_1_and_clips_nothing(settings: Make, tokens: int) -> None:
    """The old log-probs come from the weights, the mode and the micro-batches of the update."""
    own = settings(actor={"learning_rate": 3e-2, "tokens_per_microbatch": tokens}, epochs=2)
    rollout, actor = sample(own), actor_of(own)
    for step in range(2):
        rows, _ = actor.log_probs(rollout, step)
        metrics = actor.update(experience(rollout, flat(rows), torch.randn(len(flat(rows)))), step)
        assert metrics["policy/first_ratio"] == 1.0
        assert metrics["policy/first_clip_fraction"] == 0.0
        assert metrics["policy/approx_kl"] > 0  # later minibatches are off-policy


@pytest.mark.parametrize("token", [0, -1])
def test_a_ratio_that_is_no_number_is_not_hidden(settings: Make, token: int) -> None:
    own = settings(actor={"tokens_per_microbatch": 1}, num_minibatches=1)  # a row each
    rollout, actor = sample(own), actor_of(own)
    old = flat(actor.log_probs(rollout, 0)[0]).clone()
    old[token] = float("nan")
    metrics = actor.update(experience(rollout, old, torch.ones_like(old)), 0)
    assert metrics["policy/first_ratio"] != metrics["policy/first_ratio"]  # NaN


@pytest.mark.parametrize("min_fill", [0.0, 0.9])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_first_micro_batches_run_once_for_both_passes(
    settings: Make,
    small_critic: Path,
    epochs: int,
    min_fill: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One minibatch that fits into memory: evaluation and update share forwards, in both roles."""
    monkeypatch.setattr(experience_module, "MIN_FILL", min_fill)
    own = settings(num_minibatches=1, epochs=epochs, actor={"tokens_per_microbatch": 4096})
    rollout = sample(own)
    (plan,) = rank_microbatches(
        range(len(rollout)), rollout.lengths, world_size=1, tokens_per_microbatch=4096
    )
    assert (len(plan) > 1) == (min_fill > 0)
    actor, critic = actor_of(own), CriticWorker(replace(own, model_path=str(small_critic)))
    critic.start(("", 0))
    calls = {"actor": 0, "critic": 0}
    for worker in (actor, critic):
        worker.model.register_forward_hook(
            lambda *_, role=worker.role: calls.update({role: calls[role] + 1})
        )
    for step in range(2):
        log_probs = flat(actor.log_probs(rollout, step)[0])
        values = flat(critic.values(rollout, step))
        assert not log_probs.requires_grad and not values.requires_grad
        batch = replace(
            experience(rollout, log_probs, torch.ones_like(log_probs)), old_values=values
        )
        actor.update(batch, step)
        critic.update(batch, step)
        assert calls == dict.fromkeys(calls, (step + 1) * epochs * len(plan))
        assert not actor._kept and not critic._kept


@pytest.mark.parametrize(("tokens", "num_kept"), [(24, 1), (50, 2), (4096, 4)])
def test_graphs_are_kept_within_the_memory_of_one_micro_batch(
    settings: Make, tokens: int, num_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro-batches of the first minibatch; the second minibatch has other weights."""
    monkeypatch.setattr(experience_module, "MIN_FILL", 1.0)
    own = settings(num_minibatches=2, actor={"tokens_per_microbatch": tokens})
    lengths = [1, 1, 5, 5, 9, 9, 12, 12]
    rollout = Rollout.from_completions(
        [[3]] * 8, [Completion([4] * n, [-1.0] * n, "length", [0] * n) for n in lengths]
    )
    monkeypatch.setattr(ranks, "minibatches", lambda *_, **__: [list(range(8))] * 2)
    actor = actor_of(own)
    actor.log_probs(rollout, 0)
    assert len(actor._kept) == num_kept
    actor.training = actor.training.model_copy(update={"backend": "fsdp"})
    actor.log_probs(rollout, 0)
    assert len(actor._kept) == 1  # a forward is collective: all ranks keep alike


@pytest.mark.parametrize("tokens", [24, 4096])
def test_a_kept_forward_changes_no_weight(settings: Make, tokens: int) -> None:
    own = settings(actor={"learning_rate": 3e-2, "tokens_per_microbatch": tokens})
    rollout = sample(own)
    ends = []
    for keeps in (True, False):
        actor = actor_of(own)
        for step in range(2):
            old = flat(actor.log_probs(rollout, step)[0])
            if not keeps:
                actor._kept = {}
            actor.update(experience(rollout, old, old - old.mean()), step)
        ends.append(digest(actor))
    assert ends[0] == ends[1]


def test_a_kept_forward_of_another_step_is_not_used(settings: Make) -> None:
    own = settings(critic_warmup_steps=1)
    rollout, actor = sample(own), actor_of(own)
    actor.log_probs(rollout, 0)
    assert not actor._kept  # the critic alone is updated in this step
    old = flat(actor.log_probs(rollout, 1)[0])
    assert actor._kept
    metrics = actor.update(experience(rollout, old, torch.ones_like(old)), 2)
    assert metrics["policy/first_ratio"] == 1.0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_engine_actor_and_reference_agree_at_the_temperature(
    settings: Make, temperature: float
) -> None:
    own = settings(temperature=temperature)
    rollout, actor, reference = sample(own), actor_of(own), ReferenceWorker(own)
    reference.start()
    rows, entropy = actor.log_probs(rollout, 0)
    log_probs = flat(rows)
    assert torch.allclose(log_probs, rollout.log_probs, atol=1e-5)
    assert torch.equal(log_probs, flat(reference.log_probs(rollout, 0)))
    assert 0 < entropy / len(log_probs) < 2.49  # ln 12


def test_log_probs_equal_those_of_a_row_alone(settings: Make) -> None:
    own = settings()
    rollout = sample(own)
    log_probs = flat(actor_of(own).log_probs(rollout, 0)[0]).split(
        rollout.response_lengths.tolist()
    )
    model = load_causal_lm(own.model_path)
    prompts = rollout.prompt_ids.split(rollout.prompt_lengths.tolist())
    for prompt, response, found in zip(prompts, rollout.responses(), log_probs, strict=True):
        ids = torch.tensor([[*prompt.tolist(), *response]])
        alone = token_log_probs(model, ids, torch.ones_like(ids))[0, len(prompt) :]
        assert torch.allclose(found, alone, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_workers", "num_minibatches", "tokens"), [(3, 2, 24), (1, 32, 4096)])
def test_16_kl_of_equal_weights_is_exactly_0(
    settings: Make, precision: str, num_workers: int, num_minibatches: int, tokens: int
) -> None:
    """Whatever the number of reference workers, with padded rows in many micro-batches.

    With 32, each has one row, whose products another algorithm computes than those of many.
    """
    own = settings(
        actor={"precision": precision, "tokens_per_microbatch": tokens},
        batch_size=32,
        num_minibatches=num_minibatches,
    )
    rollout = sample(own)
    assert len(set(rollout.lengths)) > 2
    for step in (0, 5):
        log_probs = flat(actor_of(own).log_probs(rollout, step)[0])
        parts = []
        for rank in range(num_workers):
            reference = ReferenceWorker(replace(own, rank=rank, world_size=num_workers))
            reference.start()
            parts.append(reference.log_probs(rollout, step))
        ref_log_probs = scatter_rows(parts)
        assert torch.equal(log_probs, ref_log_probs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_16_reward_model_computes_as_the_critic(
    settings: Make, small_critic: Path, precision: str
) -> None:
    own = replace(settings(critic={"precision": precision}), model_path=str(small_critic))
    rollout = sample(settings())
    critic, reward = CriticWorker(own), RewardWorker(own)
    critic.start(("", 0))
    reward.start()
    micro = RowReader(rollout, pad_id=own.pad_id).tokens(range(4))
    with torch.no_grad(), reward.autocast():
        scores = reward.model(micro.input_ids, micro.attention_mask)
    with torch.no_grad():
        assert torch.equal(scores, critic.backend(micro.input_ids, micro.attention_mask))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_15_dropout_is_off_in_every_role(
    settings: Make, small_model: Path, small_critic: Path, tmp_path: Path, mode: str
) -> None:
    """Two forwards are bit-equal on models whose folders ask for dropout, in either mode."""
    folders = []
    for source in (small_model, small_critic):
        folders.append(shutil.copytree(source, tmp_path / source.name))
        config = json.loads((folders[-1] / "config.json").read_text())
        (folders[-1] / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    policy, values = (replace(settings(), model_path=str(folder)) for folder in folders)
    rollout = sample(settings())
    actor, critic = actor_of(policy), CriticWorker(values)
    critic.start(("", 0))
    reference, reward = ReferenceWorker(policy), RewardWorker(values)
    reference.start()
    reward.start()
    for worker in (actor, critic, reference, reward):
        assert not any(module.training for module in worker.model.modules())
        worker.model.train(mode == "train")
    calls: list[Callable[[], Any]] = [
        lambda: actor.log_probs(rollout, 0)[0],
        lambda: critic.values(rollout, 0),
        lambda: reference.log_probs(rollout, 0),
        lambda: reward.score(rollout),
    ]
    for call in calls:
        assert torch.equal(flat(call()), flat(call()))


def test_a_step_with_inf_leaves_the_weights_alone(settings: Make) -> None:
    own = settings()
    rollout, actor = sample(own), actor_of(own)
    old, before = flat(actor.log_probs(rollout, 0)[0]), digest(actor)
    metrics = actor.update(experience(rollout, old, torch.full_like(old, float("inf"))), 0)
    assert metrics["policy/skipped_steps"] == own.ppo.num_minibatches
    assert digest(actor) == before


def test_reward_model_reads_its_shift_and_the_last_token(
    settings: Make, small_critic: Path
) -> None:
    own = settings()
    rollout = sample(own)
    worker = RewardWorker(replace(own, model_path=str(small_critic)))
    worker.start()
    scores = flat(worker.score(rollout))
    model = ScalarHeadModel.from_pretrained(small_critic)
    assert model.shift == 0.25
    prompts = rollout.prompt_ids.split(rollout.prompt_lengths.tolist())
    for prompt, response, score in zip(prompts, rollout.responses(), scores, strict=True):
        ids = torch.tensor([[*prompt.tolist(), *response]])
        assert score.item() == pytest.approx(
            model(ids, torch.ones_like(ids))[0, -1].item(), abs=1e-5
        )


def test_critic_starts_as_the_reward_model_and_sees_only_the_past(
    settings: Make, small_critic: Path
) -> None:
    """V before a token that follows the whole response is the reward model's score."""
    own = replace(settings(), model_path=str(small_critic))
    policy = settings()
    rollout = sample(policy)
    critic, reward = CriticWorker(own), RewardWorker(own)
    critic.start(("", 0))
    reward.start()
    scores = flat(reward.score(rollout))
    lengths = rollout.response_lengths.tolist()

    def longer(token: int) -> Rollout:
        rows = [torch.tensor([*row, token]) for row in rollout.responses()]
        return replace(
            rollout, response_ids=torch.cat(rows), response_lengths=rollout.response_lengths + 1
        )

    for token in (2, 9):
        values = flat(critic.values(longer(token), 0)).split([n + 1 for n in lengths])
        last = torch.stack([row[-1] for row in values])
        assert torch.allclose(last, scores, atol=1e-5)

    base = flat(critic.values(rollout, 0)).split(lengths)
    changed = rollout.response_ids.clone()
    long = next(i for i, n in enumerate(lengths) if n >= 3)
    place = sum(lengths[:long]) + 1  # token 1 of that row
    changed[place] = 2 + (changed[place] + 1) % 9
    other = flat(critic.values(replace(rollout, response_ids=changed), 0)).split(lengths)
    assert torch.equal(base[long][:2], other[long][:2])
    assert not torch.equal(base[long][2:], other[long][2:])


def test_critic_learns_the_returns(settings: Make, small_critic: Path) -> None:
    own = replace(
        settings(value_clip=100.0, critic={"learning_rate": 1e-2}), model_path=str(small_critic)
    )
    rollout = sample(settings())
    critic = CriticWorker(own)
    critic.start(("", 0))
    losses = []
    for step in range(4):
        values = flat(critic.values(rollout, step))
        batch = Experience(
            rollout,
            old_log_probs=values,
            advantages=values,
            old_values=values,
            returns=torch.ones_like(values),
        )
        losses.append(critic.update(batch, step)["value/loss"])
    assert losses[-1] < 0.5 * losses[0]


def test_ptx_coef_0_is_bit_equal_to_none_and_above_learns_the_corpus(
    settings: Make, corpus: Path
) -> None:
    plain = settings(actor={"learning_rate": 1e-2})
    rollout = sample(plain)
    rows = torch.tensor([[2 + (i + k) % 10 for i in range(8)] for k in range(4)])

    def run(coef: float) -> tuple[str, float, dict[str, float]]:
        actor = actor_of(settings(actor={"learning_rate": 1e-2}, ptx_coef=coef, corpus=str(corpus)))
        for step in range(3):
            old = flat(actor.log_probs(rollout, step)[0])
            metrics = actor.update(experience(rollout, old, torch.linspace(-1, 1, len(old))), step)
        held_out = -token_log_probs(actor.model.hf, rows, torch.ones_like(rows)).mean().item()
        return digest(actor), held_out, metrics

    actor = actor_of(plain)
    for step in range(3):
        old = flat(actor.log_probs(rollout, step)[0])
        actor.update(experience(rollout, old, torch.linspace(-1, 1, len(old))), step)
    without, none, _ = run(0.0)
    _, mixed, metrics = run(5.0)
    assert without == digest(actor)
    assert mixed < none - 0.2
    assert metrics["policy/first_ratio"] == 1.0
    assert 0 < metrics["ptx/loss"] < 2.6  # nats per token, about ln 12 at the start


@pytest.mark.parametrize("documents_apart", [False, True])
def test_ptx_neither_learns_nor_counts_the_filling_of_a_row(
    settings: Make, tmp_path: Path, documents_apart: bool
) -> None:
    """The loss is the mean over the documents' tokens, each document by hand."""
    documents = [[3, 4, 5, 6, 7], [8, 9, 10], [11, 2], [4, 4, 9, 3]]
    packed, filling = pack_best_fit(documents, 12, EOS)
    assert packed.shape == (2, 12) and filling == 6
    own = settings(
        corpus=str(write_corpus(tmp_path / "corpus", packed)),
        documents_apart=documents_apart,
        ptx_coef=1.0,
        ptx_batch_size=2,
        num_minibatches=1,
        actor={"tokens_per_microbatch": 12},
    )
    model = load_causal_lm(own.model_path)
    texts = [[*text, EOS] for text in documents]
    if not documents_apart:  # those of a row are one text
        kept = [list(row) for row in packed]
        texts = [row[: len(row) - _filling(row)] for row in kept]
    losses = []
    for text in texts:
        ids = torch.tensor([text])
        losses += (-token_log_probs(model, ids, torch.ones_like(ids))[0, 1:]).tolist()
    rollout, actor = sample(own), actor_of(own)
    old = flat(actor.log_probs(rollout, 0)[0])
    metrics = actor.update(experience(rollout, old, torch.zeros_like(old)), 0)
    assert metrics["ptx/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)

    # The gradient is that of the same mean: advantages of 0 add none.
    mean = sum(
        -token_log_probs(
            model, torch.tensor([text]), torch.ones(1, len(text), dtype=torch.int64)
        ).sum()
        for text in texts
    ) / len(losses)
    mean.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert metrics["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def _filling(row: list[int]) -> int:
    """Count the end-of-text tokens after the first of those that end the row."""
    count = next(i for i, token in enumerate(reversed(row)) if token != EOS)
    return count - 1


def test_seeds_of_responses_do_not_depend_on_the_engine(settings: Make) -> None:
    own = settings(samples_per_prompt=2, batch_size=8)
    worker = RolloutWorker(own)
    worker.engine = SmallEngine(own.model_path)  # type: ignore[assignment]
    prompts = [[3, 4, 5]] * 8
    whole = worker.generate(prompts, 0, step=3)
    halves = Rollout.join(
        [worker.generate(prompts[:4], 0, step=3), worker.generate(prompts[4:], 4, step=3)]
    )
    assert whole.responses() == halves.responses()
    assert len({tuple(row) for row in whole.responses()}) > 8  # one prompt, many answers
    assert whole.responses() != worker.generate(prompts, 0, step=4).responses()
