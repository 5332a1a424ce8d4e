"""PPO with adapters: what trains, what reaches the engines, and what a checkpoint has.

A random adapter would hide errors of scale, so models train first: B starts at 0.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayrlhf.config import PPOConfig, RecipeError, parse
from rayrlhf.models import lora
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.rl import experience
from rayrlhf.rl.experience import Experience, Rollout
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ranks import RoleSettings, TrainedWorker
from rayrlhf.rl.setup import trained_model
from rayrlhf.rl.weight_sync import send_frozen, sync_weights
from rayrlhf.rl.workers import ActorWorker, CriticWorker
from tests.rl.inline import timeless
from tests.rl.test_ranks import sample

Make = Callable[..., RoleSettings]
LORA = {"rank": 4, "alpha": 8}
LINEAR = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
IDS = torch.tensor([[5, 9, 4, 10, 7, 3]])


def worker_of(group: Any) -> Any:
    return group.seats[0].worker.worker


def update(worker: TrainedWorker, rollout: Rollout, step: int = 0) -> dict[str, float]:
    """Train on targets that follow from the rollout alone."""
    targets = torch.linspace(-1, 1, int(rollout.response_lengths.sum()))
    assert isinstance(worker, ActorWorker | CriticWorker)
    return worker.update(
        Experience(
            rollout,
            old_log_probs=rollout.log_probs,
            advantages=targets,
            old_values=torch.zeros_like(targets),
            returns=targets,
        ),
        step,
    )


@pytest.fixture(scope="session")
def decided_model(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """The small model with the spread of a trained head, which adapters cannot give to it."""
    folder = tmp_path_factory.mktemp("decided")
    model = AutoModelForCausalLM.from_pretrained(small_model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("learner", ["gae", "grpo"])
def test_reward_rises_on_a_bandit(
    train: Callable[..., Any], decided_model: Path, learner: str, seed: int
) -> None:
    """The score counts token 5: a tenth of the tokens at first. All stays close to the engine."""
    rows = train(
        seed=seed,
        model=decided_model,
        steps=10,
        lora=LORA,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        actor={"learning_rate": 3e-2},
        **(
            {"batch_size": 32, "critic": {"learning_rate": 1e-2}}
            if learner == "gae"
            else {"advantage_estimator": "grpo", "batch_size": 8, "samples_per_prompt": 4}
        ),
    )
    scores = [row["reward/score_mean"] for row in rows]
    assert sum(scores[-3:]) / 3 > 2.0 + sum(scores[:2]) / 2
    assert rows[0]["kl/ref_per_response"] == 0  # new adapters change nothing
    assert rows[-1]["kl/ref_per_response"] > 0.3
    for row in rows:
        assert (row["policy/first_ratio"], row["policy/first_clip_fraction"]) == (1, 0)
        assert row["kl/rollout_mismatch"] < 1e-5


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_engines_get_base_plus_adapter_and_the_learner_keeps_both(
    make_roles: Callable[..., Roles],
    settings: Make,
    small_model: Path,
    targets: list[str] | None,
) -> None:
    own = settings(
        lora={**LORA, "target_modules": targets}, actor={"learning_rate": 3e-2, "adam_eps": 1e-3}
    )
    roles = make_roles(own)
    actor, engine = worker_of(roles.actor), worker_of(roles.rollout)
    send_frozen(own.ppo, roles.actor, roles.rollout)
    rollout = sample(own)
    base = load_file(small_model / "model.safetensors")
    for step in range(3):
        update(actor, rollout, step)
        before = {name: p.clone() for name, p in actor.model.named_parameters()}
        for _ in range(2):  # a second sync finds the same
            sync_weights(roles.actor, roles.rollout, version=step + 1)
        for name, parameter in actor.model.named_parameters():
            assert torch.equal(parameter, before[name]), name

        expected = dict(base)
        for name, a in before.items():
            if ".lora_A." in name:
                b = before[name.replace("lora_A", "lora_B")]
                assert b.abs().max() > 0
                place = name.removeprefix("hf.").partition(".lora_A.")[0] + ".weight"
                expected[place] = base[place] + 2 * (b @ a)
        found = engine.engine.model.state_dict()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-7)

    sent, frozen = (
        {name: part for ref in gathered("float32").wait() for name, part in ref.value.items()}
        for gathered in (roles.actor.weights, roles.actor.frozen_weights)
    )
    assert {name.split(".")[-2] for name in sent} == (LINEAR if targets is None else {"q_proj"})
    assert sent.keys() | frozen.keys() == base.keys() and not sent.keys() & frozen.keys()
    assert all(torch.equal(torch.as_tensor(value), base[name]) for name, value in frozen.items())


def test_resume_equals_an_uninterrupted_run(train: Callable[..., Any], tmp_path: Path) -> None:
    keys = {
        "steps": 4,
        "save_every": 2,
        "lora": LORA,
        "critic": {"learning_rate": 1e-2, "lora": {"rank": 2}},
        "kl_target": 0.5,
        "kl_horizon": 100.0,
    }
    whole = timeless(train(**keys))
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    ends = [weights_in(last), weights_in(last / "training_state" / "critic")]
    (last / "manifest.json").unlink()
    assert timeless(train(**keys)) == whole
    for end, folder in zip(ends, (last, last / "training_state" / "critic"), strict=True):
        again = weights_in(folder)
        assert again.keys() == end.keys()
        assert all(torch.equal(again[name], weight) for name, weight in end.items())
    for role, rank, others in (("actor", 4, 0), ("critic", 2, 1)):
        state = last / "training_state" / role / "optimizer-00000-of-00001-00000.safetensors"
        moments = {n: v for n, v in load_file(state).items() if n.startswith("exp_avg/")}
        adapters = [name for name in moments if ".lora_" in name]
        assert (len(adapters), len(moments)) == (2 * 7 * 2, 2 * 7 * 2 + others)  # its head
        settings = json.loads((folder_of(last, role) / "adapter/adapter_config.json").read_text())
        assert settings["r"] == rank


def folder_of(checkpoint: Path, role: str) -> Path:
    return checkpoint if role == "actor" else checkpoint / "training_state" / role


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return the merged weights and the adapter of a folder, copied."""
    files = [folder / "model.safetensors", folder / "adapter" / lora.WEIGHTS]
    return {
        f"{file.name}/{name}": weight.clone()
        for file in files
        for name, weight in load_file(file).items()
    }


@pytest.mark.parametrize("adapters", [None, LORA])
def test_checkpointed_layers_run_again_and_compute_the_same(
    train: Callable[..., Any],
    make_roles: Callable[..., Roles],
    settings: Make,
    adapters: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In both roles, whose models otherwise stay in the mode in which transformers keeps all."""
    monkeypatch.setattr(experience, "MIN_FILL", 0.0)  # one micro-batch
    rows = {}
    for again in (False, True):
        training = {"learning_rate": 1e-2, "gradient_checkpointing": again}
        keys = {"lora": adapters, "actor": training, "critic": training, "num_minibatches": 1}
        rows[again] = timeless(train(str(again), **keys, steps=2))
        roles = make_roles(settings(**keys))
        rollout = sample(settings())
        for group in (roles.actor, roles.critic):
            worker = worker_of(group)
            calls: list[int] = []
            layer = worker.model.hf.model.layers[0]
            layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            update(worker, rollout)
            assert len(calls) == (2 if again else 1)
    assert rows[True] == rows[False]


def test_an_export_is_a_plain_model_and_an_adapter_for_peft(
    settings: Make, small_model: Path, tmp_path: Path
) -> None:
    own = settings(lora=LORA, actor={"learning_rate": 3e-2})
    actor = ActorWorker(own)
    actor.start(("", 0))
    update(actor, sample(own))
    actor.export(str(tmp_path / "final"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    plain = AutoModelForCausalLM.from_pretrained(small_model)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        unadapted = plain(IDS).logits
        beside = peft.PeftModel.from_pretrained(plain, tmp_path / "final" / "adapter")
        assert (merged(IDS).logits - unadapted).abs().max() > 0.01
        torch.testing.assert_close(merged(IDS).logits, beside.eval()(IDS).logits)


def test_a_critic_trains_adapters_and_head_and_starts_as_the_reward_model(
    settings: Make, small_critic: Path, tmp_path: Path
) -> None:
    own = replace(
        settings(critic={"learning_rate": 1e-2, "lora": LORA}), model_path=str(small_critic)
    )
    critic = CriticWorker(own)
    critic.start(("", 0))
    start = ScalarHeadModel.from_pretrained(small_critic)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        assert torch.equal(critic.model(IDS, mask), start(IDS, mask))
    update(critic, sample(settings()))
    critic.save(str(tmp_path))
    saved = ScalarHeadModel.from_pretrained(tmp_path / "training_state" / "critic")
    assert saved.shift == start.shift
    with torch.no_grad():
        assert not torch.allclose(critic.model(IDS, mask), start(IDS, mask), atol=1e-3)
        torch.testing.assert_close(saved(IDS, mask), critic.model(IDS, mask))
    changed = {
        name
        for name, weight in saved.hf.state_dict().items()
        if not torch.equal(weight, start.hf.state_dict()[name])
    }
    assert {name.split(".")[-2] for name in changed} == {*LINEAR, "score"}


@pytest.mark.parametrize(
    ("ppo", "said"),
    [
        ({"lora": {"dropout": 0.1}}, "lora.dropout=0.1: PPO compares log-probs"),
        ({"actor": {"lora": {"dropout": 0.1}}}, "set dropout=0, or take it out"),
        ({"lora": {"rnk": 3}}, "ppo.lora.rnk"),
        (
            {"advantage_estimator": "rloo", "samples_per_prompt": 2, "critic": {"lora": {}}},
            "ppo.critic has no effect",
        ),
    ],
)
def test_adapters_that_make_no_sense(ppo: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse({"name": "x", "model": {"path": "m"}, "ppo": {"prompts": "p", **ppo}})
    assert said in str(caught.value)


def test_a_role_says_itself_or_both_are_told() -> None:
    def of(**keys: Any) -> list[int | None]:
        cfg = PPOConfig(prompts="p", **keys)
        found = [cfg.lora_of(role) for role in ("actor", "critic")]
        return [None if each is None else each.rank for each in found]

    assert of() == [None, None]
    assert of(lora={}) == [64, 64]
    assert of(lora={"rank": 8}, critic={"lora": {"rank": 2}}) == [8, 2]
    assert of(actor={"lora": {"rank": 4}}) == [4, None]
    assert of(lora={}, advantage_estimator="reinforce_pp") == [64, 64]  # there is no critic


@pytest.mark.parametrize(
    ("trained_with", "now", "said"),
    [
        (LORA, None, "was trained with lora, and this run has none: set ppo.lora"),
        (None, LORA, "was trained without lora, and this run has it: take lora out"),
        (LORA, {**LORA, "rank": 8}, "its adapters have rank=4, and lora.rank says 8"),
        (LORA, {**LORA, "alpha": 16}, "its adapters have alpha=8.0, and lora.alpha says 16"),
        (LORA, {**LORA, "target_modules": ["q_proj"]}, "its adapters have target_modules="),
        (LORA, {**LORA, "target_modules": ["q_prj"]}, "is called 'q_prj'"),
    ],
)
def test_a_checkpoint_with_other_adapters_is_refused_before_anything_starts(
    settings: Make,
    small_model: Path,
    tmp_path: Path,
    trained_with: dict[str, Any] | None,
    now: dict[str, Any] | None,
    said: str,
) -> None:
    actor = ActorWorker(settings(lora=trained_with))
    actor.start(("", 0))
    actor.export(str(tmp_path))
    start = str(small_model)
    kept = trained_model("actor", settings(lora=trained_with).ppo, start, str(tmp_path))
    assert kept == ((start, str(tmp_path)) if trained_with else (str(tmp_path), None))
    with pytest.raises(RecipeError) as caught:
        trained_model("actor", settings(lora=now).ppo, start, str(tmp_path))
    assert said in str(caught.value)
