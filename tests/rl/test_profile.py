"""Seconds and FLOPs per role and phase."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.metrics import read_jsonl
from rayrlhf.models.causal_lm import load_causal_lm
from rayrlhf.rl import ranks
from rayrlhf.rl.clock import NUM_SPANS, Clock, Span
from rayrlhf.rl.profile import covered, summarize
from rayrlhf.rl.scoring import RewardWorker
from rayrlhf.training.flops import model_flops
from tests.rl.test_experience import rollout


def test_covered_counts_what_overlaps_once() -> None:
    spans = [Span("a", 0, 2), Span("b", 1, 3), Span("c", 5, 6), Span("d", 5.2, 5.4)]
    assert covered(spans) == 4
    assert covered(reversed(spans)) == 4
    assert covered([]) == 0


def test_a_clock_notes_outer_phases_and_stays_small() -> None:
    clock = Clock()
    with clock.phase("outer"), clock.phase("inner"):
        clock.count(3)
    (span,) = clock.read()
    assert (span.phase, span.flops) == ("outer", 3) and span.end >= span.start
    assert clock.read() == []
    clock.count(1)  # nothing runs
    with pytest.raises(ValueError), clock.phase("fails"):
        raise ValueError
    for _ in range(NUM_SPANS + 5):
        with clock.phase("again"):
            pass
    assert {span.phase for span in clock.read()} == {"again"}


def test_seconds_are_of_the_group_and_flops_of_all_ranks() -> None:
    ranks = [[Span("update", 0, 2, 6.0)], [Span("update", 1, 4, 6.0)]]
    (phase,) = summarize({"actor": ranks}, {"actor": 6.0}, seconds=8, num_steps=2)
    assert (phase.seconds, phase.share, phase.tflop) == (2, 0.5, 6e-12)
    assert phase.utilization == 12 / (4 * 6)


def test_a_trace_has_the_phases_and_what_they_ran(tmp_path: Path) -> None:
    clock = Clock()
    clock.start_trace()
    with clock.phase("update"):
        torch.ones(8, 8) @ torch.ones(8, 8)
    clock.stop_trace(str(tmp_path / "actor-0.json.gz"))
    with gzip.open(tmp_path / "actor-0.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"update", "aten::mm"} <= names


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_profiled_run_leaves_traces_and_a_table(
    train: Callable[..., Any],
    tmp_path: Path,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    epochs: int,
) -> None:
    """The FLOPs are those of the passes that were done: none is counted twice."""
    # All roles are in this process, which can be traced but once.
    monkeypatch.setattr(Clock, "start_trace", lambda clock: None)
    monkeypatch.setattr(Clock, "stop_trace", lambda clock, path: Path(path).touch())
    train(steps=5, num_minibatches=1, epochs=epochs, profile=True, ptx_coef=0.0)
    folder = tmp_path / "run" / "profile"
    assert {path.name for path in folder.glob("*.json.gz")} == {
        "actor-0.json.gz",
        "critic-0.json.gz",
    }
    table = json.loads((folder / "table.json").read_text())
    phases = {(each["role"], each["name"]): each for each in table["phases"]}
    assert set(phases) == {
        ("rollout", "generate"),
        ("rollout", "load_weights"),
        ("actor", "log_probs"),
        ("actor", "update"),
        ("actor", "weights"),
        ("critic", "values"),
        ("critic", "update"),
        ("reference", "log_probs"),
    }
    assert 0 <= table["idle_share"] < 1
    once, back = (phases["actor", name]["tflop"] for name in ("log_probs", "update"))
    # Evaluation's forward pass is the first epoch's; a backward pass is two forward ones.
    assert back == pytest.approx((3 * epochs - 1) * once)
    assert phases["reference", "log_probs"]["tflop"] == pytest.approx(once)

    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")[2:]
    flops = model_flops(load_causal_lm(small_model), forward_only=True)
    responses = sum(row["rollout/response_length"] * 16 for row in rows) / len(rows)
    at_least = flops.per_token * (16 * 3 + responses) + flops.per_output * responses
    assert at_least < once * 1e12 < 1.5 * at_least


def test_the_flops_of_a_reward_model_are_found_once(
    settings: Callable[..., Any],
    small_critic: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an ensemble each model has its own, in every step."""
    found: list[Any] = []

    def finding(module: Any, **how: bool) -> Any:
        found.append(module)
        return model_flops(module, **how)

    monkeypatch.setattr(ranks, "model_flops", finding)
    members = [str(small_critic), shutil.copytree(small_critic, tmp_path / "other")]
    rewards = [{"members": [str(place) for place in members], "std_penalty": 0.0}]
    worker = RewardWorker(settings(profile=True, rewards=rewards))
    worker.start()
    totals = []
    for _ in range(3):
        worker.score(rollout())
        (span,) = worker.read_clock()
        totals.append(span.flops)
    assert found == [model for model in worker.models[0] for _ in range(2)]
    assert totals[0] == totals[1] == totals[2] > 0


def test_without_the_key_nothing_is_written(train: Callable[..., Any], tmp_path: Path) -> None:
    train(steps=2)
    assert not (tmp_path / "run" / "profile").exists()


def test_forward_flops_are_a_third_of_both_passes(small_model: Path) -> None:
    model = load_causal_lm(small_model)
    whole, forward = model_flops(model), model_flops(model, forward_only=True)
    tokens = {"num_tokens": 7, "num_pairs": 11, "num_outputs": 5}
    assert whole.total(**tokens) == 3 * forward.total(**tokens)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = model_flops(model, forward_only=True)
    assert frozen == forward and model_flops(model).per_token == 2 * forward.per_token
    assert torch.is_grad_enabled()
