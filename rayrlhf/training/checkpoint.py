"""Checkpoints: written beside their place, fsynced, renamed; the newest whole one wins.

    <stage>/checkpoints/step-00000100/   HF folder + training_state/ + manifest.json
    <stage>/final/                       HF folder + manifest.json + README.md (model card)

`manifest.json` lists every file but the model card with its size and is written last, so a folder
without it, or with a file that is missing or shorter, is half-written and never picked. Tensors
are stored as safetensors, everything else as JSON: loading a checkpoint runs no code of whoever
wrote it.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rayrlhf.lineage import CARD, MANIFEST, is_complete

STATE_DIR = "training_state"
_STEP = re.compile(r"step-(\d{8})")


def begin(stage_dir: str | Path, step: int | None) -> Path:
    """Return an empty folder to write the checkpoint of `step` (None: `final`) into.

    One process calls it; the others find the same folder with `writing_place` after a barrier.
    """
    tmp = writing_place(stage_dir, step)
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True)
    return tmp


def place_of(stage_dir: str | Path, step: int | None) -> Path:
    """Return where the checkpoint of `step` (None: `final`) is, or will be."""
    root = Path(stage_dir)
    return root / "final" if step is None else root / "checkpoints" / f"step-{step:08d}"


def writing_place(stage_dir: str | Path, step: int | None) -> Path:
    """Return the folder that `begin` makes for `step` (None: `final`)."""
    place = place_of(stage_dir, step)
    return place.with_name(f".{place.name}.writing")


def commit(tmp: Path, keep: int | None = None, best: int | None = None) -> Path:
    """Make the folder from `begin` a checkpoint, and return its place.

    Every file is on the disk before the rename. `keep` removes all but that many newest
    `step-*` folders afterwards, and that of step `best`.
    """
    files = sorted(path for path in tmp.rglob("*") if path.is_file())
    sizes = {
        str(path.relative_to(tmp)): path.stat().st_size for path in files if path != tmp / CARD
    }
    for path in files:
        _fsync(path)
    (tmp / MANIFEST).write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    _fsync(tmp / MANIFEST)
    for folder in (path for path in tmp.rglob("*") if path.is_dir()):
        _fsync(folder)
    _fsync(tmp)

    place = tmp.with_name(tmp.name.removeprefix(".").removesuffix(".writing"))
    if place.exists():
        remove(place)
    tmp.rename(place)
    _fsync(place.parent)
    if keep is not None:
        for old in _steps(place.parent)[keep:]:
            if step_of(old) != best:
                remove(old)
    return place


def newest_checkpoint(stage_dir: str | Path) -> Path | None:
    """Return the newest whole `checkpoints/step-*` of a stage, or None."""
    folders = _steps(Path(stage_dir) / "checkpoints")
    return next((folder for folder in folders if is_complete(folder)), None)


def step_of(checkpoint: str | Path) -> int:
    """Return the number of optimizer steps that a `step-*` checkpoint has behind it."""
    match = _STEP.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ValueError(f"{checkpoint}: not a checkpoint; its name must be step-00000100")
    return int(match[1])


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any] | None = None
) -> None:
    """Write tensors, and `meta` as JSON in the header, to one safetensors file."""
    # Views of one storage and non-contiguous tensors are refused by safetensors.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(plain, str(path), metadata={"meta": json.dumps(dict(meta or {}))})


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU) and the meta that `save_tensors` wrote."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        names: Iterable[str] = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        meta: dict[str, Any] = json.loads(file.metadata()["meta"])
    return tensors, meta


def _steps(checkpoints: Path) -> list[Path]:
    """Return the `step-*` folders, newest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(
        (path for path in checkpoints.iterdir() if _STEP.fullmatch(path.name)), reverse=True
    )


def remove(folder: Path) -> None:
    """Remove a checkpoint; killed half-way, what is left is not taken for a whole one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
