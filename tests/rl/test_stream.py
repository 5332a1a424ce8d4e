"""What runs ahead of the learner, with stubs that take their time in threads."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import PPOConfig
from rayrlhf.metrics import MetricsLogger, read_jsonl
from rayrlhf.rl import ppo, ppo_async, waiting
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.state import restore
from rayrlhf.rl.stream import make_stream
from tests.rl.threaded import StubRollout, ThreadedRay, stub_roles

PROMPTS = Prompts([[3, 4, i] for i in range(40)], seed=0, batch_size=4)


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "ray", ThreadedRay)


def config(**keys: Any) -> PPOConfig:
    return PPOConfig(prompts="p", batch_size=4, num_minibatches=1, steps=8, **keys)


def test_waiting_starts_batches_on_the_weights_of_their_step() -> None:
    engines = [StubRollout(), StubRollout()]
    stream = make_stream(config(max_staleness=2), stub_roles(engines), PROMPTS)
    for step in range(8):
        stream.advance(step, version=step)
        rollout, dropped = stream.take(step)
        assert dropped == 0
        assert len(rollout) == 4
        assert rollout.prompt_ids.tolist() == [t for p in PROMPTS.take(step) for t in p]
    expected = [(batch, max(0, batch - 2)) for batch in range(8)]
    assert engines[0].calls == engines[1].calls == expected


def test_a_slow_engine_is_waited_for() -> None:
    """Its weights come when it is done, and the learner's next steps have its part all the same."""
    engines = [StubRollout(), StubRollout([0.0, 0.3, 0.0])]
    stream = make_stream(config(max_staleness=1), stub_roles(engines), PROMPTS)
    for step in range(5):
        stream.advance(step, version=step)
        rollout, _ = stream.take(step)
        assert step - int(rollout.weight_versions.min()) == min(step, 1)
    assert engines[0].calls == engines[1].calls[: len(engines[0].calls)]


def test_what_comes_too_late_is_dropped_and_rolled_out_again() -> None:
    slow = StubRollout([0.5, 0.0])
    engines = [StubRollout(), slow]
    stream = make_stream(config(max_staleness=1, stale="drop"), stub_roles(engines), PROMPTS)
    dropped, seen = 0, []
    for step in range(8):
        if step == 4:
            time.sleep(0.6)  # the slow part is there, four versions late
        stream.advance(step, version=step)
        rollout, late = stream.take(step)
        dropped += late
        assert len(rollout) == 4
        assert step - int(rollout.weight_versions.min()) <= 1
        seen += rollout.prompt_ids[2::3].tolist()
    assert dropped >= 4  # the one that took long, and the one that was queued behind it
    assert slow.calls[:2] == [(0, 0), (1, 0)]
    again = [call for engine in engines for call in engine.calls if call[1] >= 4]
    assert {batch for batch, _ in again} >= {0, 1}
    late = PROMPTS.take(0)[2:] + PROMPTS.take(1)[2:]
    assert {prompt[2] for prompt in late} <= set(seen)


def test_weights_come_in_the_middle_of_a_response() -> None:
    """`interrupt`: an engine says which versions made a response; no batch starts on old ones."""
    engine = StubRollout([0.6])
    cfg = config(max_staleness=1, interrupt=True)
    stream = make_stream(cfg, stub_roles([engine]), PROMPTS)
    versions = []
    for step in range(4):
        stream.advance(step, version=step)
        rollout, _ = stream.take(step)
        versions.append((int(rollout.weight_versions[0]), int(rollout.last_versions[0])))
        time.sleep(0.3)
    assert versions == [(0, 0), (0, 1), (1, 2), (2, 3)]


def test_an_engine_that_has_other_weights_stops_the_run() -> None:
    engine = StubRollout()
    engine.load_weights = lambda version, *weights: 7  # type: ignore[method-assign]
    stream = make_stream(config(max_staleness=1), stub_roles([engine]), PROMPTS)
    stream.advance(0, version=0)
    with pytest.raises(RuntimeError, match="acknowledged version 7"):
        stream.take(0)


def test_a_step_is_shorter_when_rollout_and_update_take_the_same_time(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def step_s(loop: Callable[..., None], name: str, **keys: Any) -> float:
        cfg = config(**keys)
        roles = stub_roles([StubRollout([0.1]), StubRollout([0.1])], update_s=0.1)
        with MetricsLogger(tmp_path / name) as log:
            loop(cfg, roles, PROMPTS, restore(cfg, None), log, tokenizer)
        rows = read_jsonl(tmp_path / name / "metrics.jsonl")
        assert len(rows) == 8
        return median(row["time/step_s"] for row in rows[1:])

    sync = step_s(ppo.optimize, "sync")
    ahead = step_s(ppo_async.optimize, "ahead", max_staleness=1)
    assert ahead < 0.8 * sync
