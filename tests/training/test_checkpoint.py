"""Checkpoints appear whole or not at all."""

from pathlib import Path

import pytest
import torch

from rayrlhf.training.checkpoint import (
    begin,
    commit,
    is_complete,
    load_tensors,
    newest_checkpoint,
    save_tensors,
    step_of,
    writing_place,
)


def write(stage: Path, step: int | None, keep: int | None = None, text: str = "x" * 100) -> Path:
    tmp = begin(stage, step)
    (tmp / "model.safetensors").write_text(text)
    (tmp / "training_state").mkdir()
    (tmp / "training_state" / "optimizer.json").write_text("{}")
    return commit(tmp, keep)


def test_commit_puts_it_in_place(tmp_path: Path) -> None:
    place = write(tmp_path, 100)
    assert place == tmp_path / "checkpoints" / "step-00000100"
    assert is_complete(place) and step_of(place) == 100
    assert not writing_place(tmp_path, 100).exists()
    assert write(tmp_path, None) == tmp_path / "final"
    assert newest_checkpoint(tmp_path) == place


def test_half_written_ones_are_never_picked(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    good = write(tmp_path, 1)
    for step, harm in ((2, "short"), (3, "missing"), (4, "no manifest"), (5, "bad manifest")):
        place = write(tmp_path, step)
        if harm == "short":
            (place / "model.safetensors").write_text("x" * 99)
        elif harm == "missing":
            (place / "training_state" / "optimizer.json").unlink()
        elif harm == "no manifest":
            (place / "manifest.json").unlink()
        else:
            (place / "manifest.json").write_text('{"files": {"a"')
        assert not is_complete(place)
    (begin(tmp_path, 6) / "model.safetensors").write_text("killed here")
    assert newest_checkpoint(tmp_path) == good


def test_begin_empties_what_a_killed_run_left(tmp_path: Path) -> None:
    (begin(tmp_path, 7) / "junk").write_text("x")
    assert not list(begin(tmp_path, 7).iterdir())


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        write(tmp_path, step, keep=2)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000010",
        "step-00000011",
    ]


def test_commit_replaces(tmp_path: Path) -> None:
    write(tmp_path, 1, text="old")
    assert (write(tmp_path, 1, text="new") / "model.safetensors").read_text() == "new"


def test_tensors_and_meta_come_back(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "t": base.t(),
        "view": base[0],
        "step": torch.tensor(3.0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.zeros(0),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"step": 3, "kl": 0.1 + 0.2})
    loaded, meta = load_tensors(tmp_path / "a.safetensors")
    assert meta == {"step": 3, "kl": 0.1 + 0.2}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


def test_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step-00000100"):
        step_of(tmp_path / "final")
