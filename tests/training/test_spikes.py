"""Loss spikes: what is one, that it has no update, and that all of it resumes and is said."""

import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.config import LossSpikeConfig, Recipe, RecipeError, TrainingConfig
from rayrlhf.console import Progress
from rayrlhf.metrics import read_jsonl
from rayrlhf.training import loop
from rayrlhf.training.backend import DDPBackend, make_backend
from rayrlhf.training.pretrain import PretrainStage
from rayrlhf.training.spikes import SpikeGuard

CPU = torch.device("cpu")
MakeRecipe = Callable[..., Recipe]


def test_the_limit_by_hand() -> None:
    """Mean 2 and deviation 1 of 1, 2, 3: with a threshold of 2 the limit is 4."""
    guard = SpikeGuard(LossSpikeConfig(window=6, threshold=2.0))
    assert guard.observe(1, 1.0, 10.0) is None
    assert guard.limit("loss") == math.inf  # before half a window
    guard.observe(2, 2.0, 10.0)
    guard.observe(3, 3.0, 10.0)
    assert guard.limit("loss") == pytest.approx(4.0)
    assert guard.norm_limit(4.0) == guard.limit("grad_norm") == pytest.approx(10.0)
    assert guard.norm_limit(4.1) == guard.norm_limit(math.nan) == -1
    skip = guard.observe(4, 4.1, 10.0)
    assert skip is not None and (skip.what, skip.value, skip.step) == ("loss", 4.1, 4)
    assert guard.limit("loss") == pytest.approx(4.0)  # a spike is not among the recent
    skip = guard.observe(5, 4.0, 10.1)
    assert skip is not None and (skip.what, skip.limit) == ("grad_norm", 10.0)
    for value in (4.0, 5.0, 6.0, 7.0):  # the window moves on
        assert guard.observe(6, value, 10.0) is None
    recent = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert guard.limit("loss") == pytest.approx(
        statistics.fmean(recent) + 2 * statistics.stdev(recent)
    )


def test_a_skip_without_a_window_is_one_of_no_number() -> None:
    guard = SpikeGuard(LossSpikeConfig())
    skip = guard.observe(1, math.nan, 1.0)
    assert skip is not None and skip.limit == math.inf
    assert guard.observe(2, 1.0, math.inf) is not None


def test_many_skips_in_a_row_end_the_run() -> None:
    guard = SpikeGuard(LossSpikeConfig(window=4, threshold=1.0, max_consecutive=2))
    for step in (1, 2, 3):
        guard.observe(step, 1.0, 1.0)
    guard.observe(4, 2.0, 1.0)
    guard.observe(5, 1.0, 1.0)  # no skip: the count begins anew
    for step in (6, 7):
        assert guard.observe(step, 2.0, 1.0) is not None
    with pytest.raises(RecipeError, match=r"step 8: loss=2 .*Lower pretrain\.learning_rate"):
        guard.observe(8, 2.0, 1.0)


def test_state_is_kept_exactly(tmp_path: Path) -> None:
    guard = SpikeGuard(LossSpikeConfig(window=4, threshold=2.0, max_consecutive=1))
    for step, value in enumerate((0.1, 1 / 3, 2 / 7, 0.2, 0.3)):
        guard.observe(step, value, value / 3)
    guard.observe(6, 9.0, 1.0)
    guard.save(tmp_path)
    again = SpikeGuard(guard.cfg)
    again.load(tmp_path)
    assert (again.limit("loss"), again.limit("grad_norm")) == (
        guard.limit("loss"),
        guard.limit("grad_norm"),
    )
    with pytest.raises(RecipeError):
        again.observe(7, 9.0, 1.0)
    again.load(tmp_path / "of a run without a guard")


@pytest.mark.parametrize("limit", [-1.0, 0.5])
def test_a_norm_above_the_limit_moves_nothing(limit: float) -> None:
    backend = make_backend(
        torch.nn.Linear(2, 1, bias=False), TrainingConfig(), total_steps=9, device=CPU
    )
    backend.backward(backend(torch.ones(1, 2)).sum(), 1.0, is_last=True)
    backend.step()
    assert isinstance(backend, DDPBackend)
    (state,) = backend.optimizer.state.values()
    before = {name: value.clone() for name, value in state.items()}
    weight = next(backend.module.parameters()).clone()
    for _ in range(2):
        backend.backward(backend(torch.ones(1, 2)).sum(), 1.0, is_last=True)
        stats = backend.step(limit)
    assert stats["grad_norm"] == pytest.approx(math.sqrt(2))
    assert stats["skipped_steps"] == 2 and backend.num_steps == 3
    assert torch.equal(weight, next(backend.module.parameters()))
    for name, value in state.items():
        assert torch.equal(value, before[name])
    backend.backward(backend(torch.ones(1, 2)).sum(), 1.0, is_last=True)
    stats = backend.step(1.5)  # the gradients of the skipped ones are gone
    assert stats["grad_norm"] == pytest.approx(math.sqrt(2)) and stats["skipped_steps"] == 2
    assert not torch.equal(weight, next(backend.module.parameters()))


def run(recipe: Recipe) -> tuple[PretrainStage, list[dict[str, Any]]]:
    stage = PretrainStage(recipe)
    shutil.rmtree(stage.folder, ignore_errors=True)
    loop.run(stage, CPU)
    return stage, read_jsonl(stage.folder / "metrics.jsonl")


def test_a_run_skips_and_says_which_rows(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 9 of 12 has three times its loss: no update, and its rows named."""
    # A rate near 0, so that losses are those of the start and only the batch makes a difference.
    section = {"max_steps": 12, "learning_rate": 1e-7, "eval_every": None}
    guarded = make_recipe("on", pretrain={**section, "loss_spike": {"window": 16}})
    stage_loss = PretrainStage.loss

    def spiking(self: PretrainStage, backend: Any, micro: Any) -> Any:
        loss_sum, sums = stage_loss(self, backend, micro)
        factor = 3.0 if backend.num_steps == 8 else 1.0
        return loss_sum * factor, {name: value * factor for name, value in sums.items()}

    monkeypatch.setattr(PretrainStage, "loss", spiking)
    stage, lines = run(guarded)
    assert [line["skipped_steps"] for line in lines] == [0] * 8 + [1] * 4
    notes = read_jsonl(stage.folder / "notes.jsonl")
    assert [note["step"] for note in notes] == [9]
    assert notes[0]["what"] == "loss" and notes[0]["rows"] == stage.batch(8)
    assert notes[0]["value"] == lines[8]["loss"] > notes[0]["limit"]
    Progress("pretrain", 10, {}).show("notes", notes[0])
    said = capsys.readouterr().out
    assert (
        "step     9  skipped: loss" in said and f"4 rows of the corpus: {stage.batch(8)[0]}" in said
    )

    stage, lines = run(make_recipe("off", pretrain=section))
    assert lines[-1]["skipped_steps"] == 0
    assert not (stage.folder / "notes.jsonl").exists()


def test_without_a_spike_the_guard_changes_nothing(make_recipe: MakeRecipe) -> None:
    _, plain = run(make_recipe("off"))
    _, guarded = run(make_recipe("on", pretrain={"loss_spike": {}}))
    assert [line["loss"] for line in guarded] == [line["loss"] for line in plain]
