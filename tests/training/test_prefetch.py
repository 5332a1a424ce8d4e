"""A step finds its batch read: slow storage costs waiting time at the first step only."""

import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from rayrlhf.data import rows
from rayrlhf.data.rows import PackedRows, write_shard
from rayrlhf.training.loop import Prefetch
from rayrlhf.training.stage import Stage

STEPS, READ_S = 10, 0.1


class _Slow:
    """Stands for a stage whose storage takes READ_S for a batch."""

    total_steps = STEPS

    def batch(self, step: int) -> list[int]:
        return [4 * step + i for i in range(4)]

    def costs(self, indices: Any) -> None:
        return None

    def microbatches(self, indices: Any) -> list[int]:
        time.sleep(READ_S)
        return list(indices)


def test_steps_longer_than_a_read_wait_for_the_first_batch_only() -> None:
    ahead = Prefetch(cast(Stage, _Slow()), 0, 1)
    waits = []
    for step in range(1, STEPS + 1):
        batch, waited = ahead.take(step)
        assert len(batch) == 4
        waits.append(waited)
        time.sleep(2 * READ_S)  # the step
    ahead.close()
    assert waits[0] >= READ_S
    assert sum(waits[1:]) < 0.2 * READ_S * (STEPS - 1)


def test_rows_of_many_shards_are_asked_for_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shuffled batch touches as many shards as it has rows: their latencies must not add up."""
    count, latency_s = 16, 0.1
    values = np.arange(count * 3 * 2, dtype=np.int32).reshape(count, 3, 2)
    shards = [write_shard(tmp_path / f"train-{i:05d}.arrow", values[i]) for i in range(count)]
    manifest = {"row_length": 2, "splits": {"train": {"shards": shards}}}
    monkeypatch.setattr(rows, "read_manifest", lambda folder: manifest)
    read = rows._RemoteShard._range

    def late(*args: Any) -> Any:
        time.sleep(latency_s)
        return read(*args)

    monkeypatch.setattr(rows._RemoteShard, "_range", late)
    packed = PackedRows(f"file://{tmp_path}", "train")
    wanted = [3 * i + i % 3 for i in range(count)]
    started = time.perf_counter()
    found = packed[wanted]
    took = time.perf_counter() - started
    assert found.tolist() == values.reshape(-1, 2)[wanted].tolist()
    assert took < 0.5 * count * latency_s
