"""Ranks of a trained role, in processes that meet as under Ray, against one alone.

Two processes take longer to start than to check, so each pair checks all there is to check.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rayrlhf.rl.experience import Experience, Rollout, RowReader
from rayrlhf.rl.ranks import RoleSettings, TrainedWorker
from rayrlhf.rl.rollout import RolloutWorker
from rayrlhf.rl.scoring import RewardWorker
from rayrlhf.rl.workers import ActorWorker, CriticWorker, ReferenceWorker
from tests.rl.inline import SmallEngine

Make = Callable[..., RoleSettings]
Plan = dict[str, RoleSettings]
"""Workers by name, whose first word is the role."""
# A small gradient's sign is rounding; eps keeps its step small.
OPTIMIZER = {"learning_rate": 3e-3, "adam_eps": 1e-3, "tokens_per_microbatch": 24}
KINDS: dict[str, type[TrainedWorker]] = {"actor": ActorWorker, "critic": CriticWorker}


def sample(settings: RoleSettings) -> Rollout:
    worker = RolloutWorker(settings)
    worker.engine = SmallEngine(settings.model_path)  # type: ignore[assignment]
    return worker.generate([[3, 4, 2 + i % 8] for i in range(settings.ppo.batch_size)], 0, step=0)


def experience(rollout: Rollout, *, bad_row: int | None = None) -> Experience:
    """Return targets that follow from the rollout alone; Inf on one row."""
    count = int(rollout.response_lengths.sum())
    targets = torch.linspace(-1, 1, count)
    if bad_row is not None:
        first = int(rollout.response_lengths[:bad_row].sum())
        targets = targets.clone()
        targets[first] = math.inf
    return Experience(
        rollout,
        old_log_probs=rollout.log_probs,
        advantages=targets,
        old_values=torch.zeros(count),
        returns=targets.flip(0) if bad_row is None else targets,
    )


def weights(worker: TrainedWorker) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in worker.backend.full_weights()}


def meet(worker: TrainedWorker, folder: Path) -> None:
    """Start this rank: rank 0 opens the meeting point, as it does for the controller."""
    place = folder / "port"
    if worker.settings.rank == 0:
        address = worker.address()
        place.with_suffix(".new").write_text(str(address[1]))
        place.with_suffix(".new").replace(place)
    while not place.exists():
        time.sleep(0.02)
    worker.start((worker.settings.host, int(place.read_text())))


def work(worker: TrainedWorker, rollout: Rollout) -> dict[str, Any]:
    """Do a step with one bad row, then a good one; return metrics, and weights after each."""
    assert isinstance(worker, ActorWorker | CriticWorker)
    found: dict[str, Any] = {"bad": worker.update(experience(rollout, bad_row=3), 0)}
    found["weights after the bad step"] = weights(worker)
    found["good"] = worker.update(experience(rollout), 1)
    found["weights after the good step"] = weights(worker)
    return found


def _rank(rank: int, folder: Path, plan: Plan, rollout: Rollout) -> None:
    torch.set_num_threads(1)
    # Without an argument it speaks of CUDA, where DeepSpeed asks it whether to end an autocast.
    enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda *device: enabled(*device or ("cpu",))
    for name, settings in plan.items():
        worker = KINDS[name.partition(" ")[0]](replace(settings, rank=rank, world_size=2))
        if dist.is_initialized():
            worker.load()
        else:
            meet(worker, folder)
        agrees = "bfloat16" in name and agrees_with_inference(worker, rollout)
        torch.save({**work(worker, rollout), "agrees": agrees}, folder / f"{name} {rank}")
    dist.destroy_process_group()


def agrees_with_inference(trained: TrainedWorker, rollout: Rollout) -> bool:
    """Tell whether reference or reward model say to the bit what the rank with its weights says."""
    alone = replace(trained.settings, rank=0, world_size=1)
    if isinstance(trained, ActorWorker):
        (indices, rows), _ = trained.log_probs(rollout, 0)
        reference = ReferenceWorker(alone)
        reference.start()
        expected = dict(zip(*reference.log_probs(rollout, 0), strict=True))
        return all(torch.equal(row, expected[i]) for i, row in zip(indices, rows, strict=True))
    reward = RewardWorker(alone)
    reward.start()
    micro = RowReader(rollout, pad_id=alone.pad_id).tokens(range(4))
    with torch.no_grad(), reward.autocast():
        scores = reward.model(micro.input_ids, micro.attention_mask)
    with torch.no_grad():
        return torch.equal(scores, trained.backend(micro.input_ids, micro.attention_mask))


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare a rank of two with one that works alone."""
    for stage in ("weights after the bad step", "weights after the good step"):
        assert found[stage].keys() == expected[stage].keys()
        for name, weight in expected[stage].items():
            torch.testing.assert_close(found[stage][name], weight, atol=1e-5, rtol=0)
    assert found["good"] == pytest.approx(expected["good"], rel=1e-4, abs=1e-6)


def skipped(found: dict[str, Any]) -> list[float]:
    """Return how many steps had been skipped after the bad and after the good update."""
    return [
        value
        for step in ("bad", "good")
        for name, value in found[step].items()
        if name.endswith("skipped_steps")
    ]


@pytest.fixture
def plan_of(settings: Make, small_critic: Path) -> Callable[..., Plan]:
    """Return plan_of(name=keys of TrainingConfig): settings of actor and critic under each.

    With `lora` in its name, both train adapters.
    """

    def make(**variants: dict[str, Any]) -> Plan:
        plan = {}
        for name, keys in variants.items():
            adapters = {"lora": {"rank": 4, "alpha": 8}} if "lora" in name else {}
            optimizer = {**OPTIMIZER, **keys, **adapters}
            own = settings(actor=optimizer, critic=optimizer, actor_ranks=2)
            plan[f"actor {name}"] = own
            plan[f"critic {name}"] = replace(own, model_path=str(small_critic))
        return plan

    return make


@pytest.fixture
def alone(settings: Make, plan_of: Callable[..., Plan]) -> dict[str, dict[str, Any]]:
    """What actor and critic do alone, under DDP in float32, with adapters and without."""
    rollout, found = sample(settings()), {}
    for name, own in plan_of(ddp={}, lora={}).items():
        worker = KINDS[name.partition(" ")[0]](own)
        worker.start(("", 0))
        found[kind_of(name)] = work(worker, rollout)
    return found


def kind_of(name: str) -> str:
    """Return which of those that work alone a worker of a plan has to equal."""
    return name.partition(" ")[0] + (" lora" if "lora" in name else "")


def run(folder: Path, plan: Plan, rollout: Rollout) -> dict[str, list[dict[str, Any]]]:
    """Let two ranks work; returns what each of them found, by name."""
    mp.spawn(_rank, (folder, plan, rollout), nprocs=2)
    return {name: [torch.load(folder / f"{name} {rank}") for rank in range(2)] for name in plan}


def test_31_two_ranks_update_as_one(
    settings: Make, plan_of: Callable[..., Plan], alone: dict[str, Any], tmp_path: Path
) -> None:
    """Ragged rows, in micro-batches of which the ranks have different numbers."""
    rollout = sample(settings())
    assert len(set(rollout.lengths)) > 2
    for name, ranks in run(tmp_path, plan_of(ddp={}, lora={}), rollout).items():
        for found in ranks:
            check(found, alone[kind_of(name)])
            assert skipped(found) == [1.0, 1.0]  # the minibatch with the bad row


@pytest.mark.slow
def test_35_zero_updates_as_ddp_and_skips_on_all_ranks_together(
    settings: Make, plan_of: Callable[..., Plan], alone: dict[str, Any], tmp_path: Path
) -> None:
    """The bad row lies on one rank. In bfloat16, reference and reward model agree to the bit.

    With offload, all is on the host between its uses, and layers run again in the backward pass.
    """
    variants: dict[str, dict[str, Any]] = {
        f"zero{stage} {precision}": {
            "backend": "deepspeed",
            "zero_stage": stage,
            "precision": precision,
        }
        for stage, precision in (
            (1, "float32"),
            (2, "float32"),
            (3, "float32"),
            (2, "bfloat16"),
            (0, "bfloat16"),
        )
    }
    offload = {
        "backend": "deepspeed",
        "zero_stage": 3,
        "offload": "cpu",
        "gradient_checkpointing": True,
    }
    variants |= {"offload float32": offload, "offload lora": offload}
    plan = plan_of(**variants)
    both = ("zero2", "offload")
    plan = {name: o for name, o in plan.items() if "actor" in name or any(b in name for b in both)}
    for name, ranks in run(tmp_path, plan, sample(settings())).items():
        first, second = (found["weights after the bad step"] for found in ranks)
        assert all(torch.equal(first[key], second[key]) for key in first), name
        for found in ranks:
            assert skipped(found) == [1.0, 1.0], name
            if "bfloat16" in name:
                assert found["agrees"], name
            else:
                check(found, alone[kind_of(name)])
