"""Optimizer state that leaves the device between two turns comes back to the bit."""

import json
from pathlib import Path

import pytest
import torch

from rayrlhf.config import TrainingConfig
from rayrlhf.training.backend import Backend, make_backend
from rayrlhf.training.backend.state import flat
from tests.scripts import result_of
from tests.training.test_backend import CPU, accumulate, make_net

WAYS = {
    "ddp": {},
    "fsdp": {"backend": "fsdp"},
    "zero 1": {"backend": "deepspeed", "zero_stage": 1},
    "zero 2": {"backend": "deepspeed", "zero_stage": 2},
    "zero 3": {"backend": "deepspeed", "zero_stage": 3},
}
SCRIPT = """
import json, sys
from tests.training.test_offload import WAYS, train
print("RESULT" + json.dumps({way: train(way, sys.argv[1]) for way in WAYS if way != "ddp"}))
"""


def state_bytes(backend: Backend) -> int:
    """Return what the optimizer's moments take on the device, but for single numbers."""
    tensors = [
        value
        for state in backend._optimizer().state.values()
        for name, value in state.items()
        if name != "step"
    ]
    storages = {flat(t).untyped_storage()._cdata: flat(t).untyped_storage() for t in tensors}
    return sum(s.nbytes() for s in storages.values() if s.nbytes() > 8)


def train(way: str, folder: str | Path) -> dict[str, bool]:
    """Train four steps, with rests between, and without; say what holds."""
    ends, found = [], {}
    for rests in (False, True):
        cfg = TrainingConfig.model_validate({"learning_rate": 1e-2, **WAYS[way]})
        backend = make_backend(make_net(), cfg, total_steps=4, device=CPU)
        for step in range(4):
            if rests:
                backend.rest(asleep=True)
                found["frees"] = step == 0 or state_bytes(backend) == 0
                backend.rest(asleep=True)  # it does already
            accumulate(backend, 2)  # forward and backward need no state
            if rests and step % 2:
                backend.rest(asleep=False)
            backend.step()
        backend.rest(asleep=rests)
        weights = dict(backend.full_weights())
        place = Path(folder) / f"{way} {rests}"
        place.mkdir()
        backend.save_state(place)  # asleep, too
        backend.load_state(place)
        found["holds"] = state_bytes(backend) > 0
        ends.append((weights, [path.read_bytes() for path in sorted(place.iterdir())]))
    found["same weights"] = all(torch.equal(w, ends[1][0][n]) for n, w in ends[0][0].items())
    found["same state"] = ends[0][1] == ends[1][1]
    return found


def test_a_rest_changes_nothing(tmp_path: Path) -> None:
    assert set(train("ddp", tmp_path).values()) == {True}


@pytest.mark.slow
def test_a_rest_changes_nothing_where_state_is_sharded(tmp_path: Path) -> None:
    found = result_of(SCRIPT, str(tmp_path))
    assert {way: [name for name in kept if not kept[name]] for way, kept in found.items()} == (
        {way: [] for way in WAYS if way != "ddp"}
    ), json.dumps(found)
