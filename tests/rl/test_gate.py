"""The gate finds what is wrong with an engine, and says whose old log-probs to take."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.config import PPOConfig
from rayrlhf.rl.gate import Gate
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.weight_sync import sync_weights
from tests.rl.inline import SmallEngine

PROMPTS = Prompts([[3, 4, 2 + i] for i in range(8)], seed=0, batch_size=8)


class HalfTemperature(SmallEngine):
    def distribution(self, rows: torch.Tensor, temperature: float) -> torch.Tensor:
        return super().distribution(rows, temperature if temperature == 1 else temperature / 2)


class RawLogProbs(SmallEngine):
    """As vLLM's logprobs_mode=raw_logprobs: those before the temperature."""

    def distribution(self, rows: torch.Tensor, temperature: float) -> torch.Tensor:
        return super().distribution(rows, 1.0)


class TopP(SmallEngine):
    def distribution(self, rows: torch.Tensor, temperature: float) -> torch.Tensor:
        whole = super().distribution(rows, temperature)
        if not self.samples:
            return whole
        order = whole.sort(dim=-1, descending=True)
        is_kept = order.values.exp().cumsum(-1) - order.values.exp() < 0.8
        kept = torch.zeros_like(is_kept).scatter(1, order.indices, is_kept)
        return whole.masked_fill(~kept, -torch.inf).log_softmax(dim=-1)

    def generate(self, prompts: Any, *, temperature: float, **keys: Any) -> Any:
        self.samples = temperature > 0
        return super().generate(prompts, temperature=temperature, **keys)


class StaleCache(SmallEngine):
    """Keys and values of the weights before stay when new ones come."""

    old: Any = None

    def load_weights(self, weights: Any, version: int) -> int:
        self.old = deepcopy(self.model)
        return super().load_weights(weights, version)

    def reset_prefix_cache(self) -> None:
        self.old = None

    def distribution(self, rows: torch.Tensor, temperature: float) -> torch.Tensor:
        new, self.model = self.model, self.old or self.model
        found = super().distribution(rows, temperature)
        self.model = new
        return found


class MissesAnUpdate(SmallEngine):
    """It acknowledges the second version, and does not load it."""

    count = 0

    def load_weights(self, weights: Any, version: int) -> int:
        self.count += 1
        return version if self.count == 2 else super().load_weights(weights, version)


class Bfloat16(SmallEngine):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.model.to(torch.bfloat16)


class RoundedTopP(TopP, Bfloat16):
    """Both at once."""


class RoundedHalfTemperature(HalfTemperature, Bfloat16):
    """Both at once."""


class RoundedStaleCache(StaleCache, Bfloat16):
    """Both at once."""


class RoundedMissesAnUpdate(MissesAnUpdate, Bfloat16):
    """Both at once."""


class Wrong(SmallEngine):
    """Says of every token that it is half as likely again as it is."""

    def distribution(self, rows: torch.Tensor, temperature: float) -> torch.Tensor:
        return super().distribution(rows, temperature) + 0.4


class NoNumbers(SmallEngine):
    """Says nothing of how likely its sampled tokens are."""

    def generate(self, prompts: Any, *, temperature: float, **keys: Any) -> Any:
        found = super().generate(prompts, temperature=temperature, **keys)
        if temperature > 0:
            for each in found:
                each.log_probs[:] = [float("nan")] * len(each.log_probs)
        return found


@pytest.fixture
def gate_of(
    make_roles: Callable[..., Roles], settings: Callable[..., RoleSettings]
) -> Callable[..., Gate]:
    """Return gate_of(engine class, **keys): a gate whose actor has moved by one update."""

    def make(engine: type[SmallEngine], **keys: Any) -> Gate:
        own = settings(**{"kl_rollout_mismatch_max": 1e-4, "temperature": 0.7, **keys})
        roles = make_roles(own)
        worker = roles.rollout.seats[0].worker.worker
        worker.engine = engine(own.model_path)
        sync_weights(roles.actor, roles.rollout, version=0)
        with torch.no_grad():
            for weight in roles.actor.seats[0].worker.worker.model.parameters():
                weight += 0.05 * torch.randn(weight.shape)
        sync_weights(roles.actor, roles.rollout, version=1)
        return Gate(own.ppo, roles, PROMPTS)

    return make


def test_a_sound_engine_passes_and_is_probed_when_due(gate_of: Callable[..., Gate]) -> None:
    gate = gate_of(SmallEngine, gate={"every": 3})
    for step, probes, is_due in ((1, 1, False), (2, 1, False), (3, 2, True), (4, 2, False)):
        found = gate.probe(step, 1)  # the first one wherever a run starts
        assert gate.roles.rollout.seats[0].worker.worker.engine.calls == 2 * probes
        assert bool(found) is is_due
        assert all(0 <= gap < 1e-5 for gap in found.values())


@pytest.mark.parametrize("mode", ["actor", "auto"])
@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (HalfTemperature, "temperature: the engine's log-probs are those of 0.35, not of 0.7"),
        (RawLogProbs, "temperature: the engine's log-probs are those of 1, not of 0.7"),
        (TopP, "top-p, top-k or min-p: the engine keeps [78]"),
        (StaleCache, "a stale prefix cache"),
        (MissesAnUpdate, "weights of another version in an engine"),
    ],
)
def test_a_fault_is_named_and_ends_the_run(
    gate_of: Callable[..., Gate], engine: type[SmallEngine], reason: str, mode: str
) -> None:
    gate = gate_of(engine, old_log_probs=mode)
    with pytest.raises(RuntimeError, match=rf"ppo\.kl_rollout_mismatch_max=0\.0001.*{reason}"):
        gate.probe(0, 1)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (RoundedHalfTemperature, "temperature: the engine's log-probs are those of 0.35"),
        (RoundedTopP, "top-p, top-k or min-p: the engine keeps [78]"),
        (RoundedStaleCache, "a stale prefix cache"),
        (RoundedMissesAnUpdate, "weights of another version in an engine"),
        (Wrong, "none of what they know, and rounding gives less than 0.2"),
        (NoNumbers, "nats per token"),
    ],
)
def test_a_fault_is_told_from_rounding(
    gate_of: Callable[..., Gate], engine: type[SmallEngine], reason: str
) -> None:
    gate = gate_of(engine, old_log_probs="auto", kl_rollout_mismatch_max=1e-6)
    with pytest.raises(RuntimeError, match=reason):
        gate.probe(0, 1)


def test_another_dtype_is_named_or_computed_around(
    gate_of: Callable[..., Gate], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="dtype: the engines compute in bfloat16, the actor in"):
        gate_of(Bfloat16).probe(0, 1)
    gate = gate_of(Bfloat16, old_log_probs="auto")
    assert gate.probe(0, 1)["gate/sampled"] > 1e-4
    assert not gate.takes_rollout
    assert "old log-probs are the actor's" in capsys.readouterr().out
    gate.watch({"kl/rollout_mismatch": 0.05}, 1)
    for more in (0.3, float("nan")):
        with pytest.raises(RuntimeError, match="kl/rollout_mismatch="):
            gate.watch({"kl/rollout_mismatch": more}, 1)


@pytest.mark.parametrize(
    ("mode", "bound", "takes"),
    [("actor", 1e-3, False), ("rollout", 1e-3, True), ("auto", 1e-3, True), ("auto", 1e-12, False)],
)
def test_auto_takes_the_engines_log_probs_where_they_agree(
    gate_of: Callable[..., Gate], mode: str, bound: float, takes: bool
) -> None:
    gate = gate_of(SmallEngine, old_log_probs=mode, gate={"rollout_max": bound})
    gate.probe(0, 1)
    assert gate.takes_rollout is takes


def test_the_longest_prompts_are_probed(gate_of: Callable[..., Gate]) -> None:
    """Only prompts that fill blocks of the prefix cache can find it stale."""
    roles = gate_of(SmallEngine).roles
    cfg = PPOConfig(prompts="p", gate={"num_prompts": 2})  # type: ignore[arg-type]
    prompts = Prompts([[1], [1, 2, 3], [1, 2], [4, 5, 6, 7]], seed=0, batch_size=2)
    assert Gate(cfg, roles, prompts).prompts == [[4, 5, 6, 7], [1, 2, 3]]


@pytest.mark.parametrize("gap", [0.01, float("nan")])
def test_a_mismatch_of_a_step_stops_the_run(gate_of: Callable[..., Gate], gap: float) -> None:
    gate = gate_of(SmallEngine)
    assert gate.watch({"kl/rollout_mismatch": 1e-5}, 1) == {"kl/rollout_mismatch": 1e-5}
    said = r"kl/rollout_mismatch=.* ppo\.kl_rollout_mismatch_max.*Probes differ by .* only"
    with pytest.raises(RuntimeError, match=said):
        gate.watch({"kl/rollout_mismatch": gap}, 1)
    assert gate.watch({"value/loss": gap}, 1).keys() == {"value/loss"}


def test_between_probes_a_mismatch_stops_the_run_with_the_reason(
    gate_of: Callable[..., Gate],
) -> None:
    settled = []
    gate = gate_of(HalfTemperature)
    gate._settle = lambda: settled.append(True)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"Probes say temperature: the engine's log-probs"):
        gate.watch({"kl/rollout_mismatch": 0.5}, 1)
    assert settled


def test_auto_computes_around_what_rounds_in_a_step_only(
    gate_of: Callable[..., Gate], capsys: pytest.CaptureFixture[str]
) -> None:
    gate = gate_of(SmallEngine, old_log_probs="auto")
    gate.probe(0, 1)
    assert gate.takes_rollout
    gate.watch({"kl/rollout_mismatch": 0.05}, 1)
    assert not gate.takes_rollout
    assert "0.05 nats per token (in a step's responses, " in capsys.readouterr().out
    gate._probed = False
    gate.probe(1, 1)  # finds nothing, and yet
    assert not gate.takes_rollout
    gate.watch({"kl/rollout_mismatch": 0.05}, 1)
    with pytest.raises(RuntimeError, match="beyond what rounding gives, 0.2"):
        gate.watch({"kl/rollout_mismatch": 0.3}, 1)


def test_old_log_probs_of_the_engine_learn_the_same(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    """No forward pass before the update; entropy and mismatch are those of its first one."""
    found = {
        mode: train(mode, steps=3, old_log_probs=mode, num_minibatches=1, epochs=2)
        for mode in ("actor", "rollout", "auto")
    }
    assert [row["policy/first_ratio"] for row in found["actor"]] == [1] * 3
    for ours, theirs in zip(found["actor"], found["rollout"], strict=True):
        assert 1 < theirs["policy/first_ratio"] < 1 + 1e-4
        for name in ("policy/entropy", "reward/score_mean", "policy/loss", "value/loss"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-4)
        assert 0 < theirs["kl/rollout_mismatch"] < 1e-5
    clocks = ("time", "rollout/tokens")
    for ours, theirs in zip(found["rollout"], found["auto"], strict=True):
        same = {name for name in ours if not name.startswith(clocks)}
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert "gate/sampled" in found["auto"][0] and "gate/sampled" not in found["auto"][1]


def test_warm_up_of_the_critic_knows_no_entropy_without_a_forward(
    train: Callable[..., Any],
) -> None:
    first, second = train(steps=2, old_log_probs="rollout", critic_warmup_steps=1)
    assert first["policy/entropy"] is None and second["policy/entropy"] > 0
