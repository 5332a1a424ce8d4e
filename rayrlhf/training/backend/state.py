"""Optimizer state on disk, in pieces that fit any backend and any number of ranks.

    optimizer-00001-of-00004-00000.safetensors         written by rank 1 of 4, its first part

A file holds fragments: the two moments of consecutive elements of a flattened parameter, as
`exp_avg/<parameter>/<first element>`. Its header lists them, each with the updates behind it. A
rank that loads reads what overlaps with the elements it holds now, from whichever files have it.
Weights are not there: those of the checkpoint's Hugging Face folder are the float32 masters.
"""

import json
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayrlhf.config import RecipeError
from rayrlhf.training.checkpoint import save_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every element."""
_NAME = re.compile(r"optimizer-(\d{5})-of-(\d{5})-\d{5}\.safetensors")

OptimizerState = MutableMapping[Tensor, dict[str, Any]]
"""`torch.optim.Optimizer.state`."""


@dataclass(frozen=True)
class Slot:
    """Where this rank's optimizer has the state of consecutive elements of a parameter."""

    name: str
    """Of the parameter."""
    offset: int
    """Elements of the flattened parameter before the first."""
    numel: int
    owner: Tensor
    """What the optimizer updates: a parameter, or a flat partition of several."""
    start: int = 0
    """Elements of the owner, flattened (of a DTensor: of its part here), before the first."""

    def share(self, rank: int, world_size: int) -> "Slot":
        """Return the part that one of `world_size` ranks writes if all have all of it."""
        first, last = (self.numel * r // world_size for r in (rank, rank + 1))
        return replace(
            self, offset=self.offset + first, numel=last - first, start=self.start + first
        )


def file_of(folder: str | Path, rank: int, world_size: int, part: int) -> Path:
    """Return the place of a part of what a rank saves."""
    return Path(folder) / f"optimizer-{rank:05d}-of-{world_size:05d}-{part:05d}.safetensors"


def save_slots(
    path: Path, slots: Iterable[Slot], state: OptimizerState, meta: Mapping[str, Any]
) -> None:
    """Write the state of `slots`, and `meta` beside; before the first update there is none."""
    tensors, fragments = {}, []
    for slot in slots:
        kept = state.get(slot.owner)
        if kept and slot.numel:
            fragments.append([slot.name, slot.offset, slot.numel, float(kept["step"])])
            for moment in MOMENTS:
                values = flat(kept[moment]).narrow(0, slot.start, slot.numel)
                tensors[_key(moment, slot.name, slot.offset)] = values
    save_tensors(path, tensors, {**meta, "fragments": fragments})


class SavedState:
    """What the ranks of a run saved in a folder; `meta` is what they wrote beside it."""

    def __init__(self, folder: str | Path) -> None:
        """Read the headers. Raises RecipeError unless the files of every rank are there."""
        paths = sorted(path for path in Path(folder).glob("*") if _NAME.fullmatch(path.name))
        found = [match.groups() for path in paths if (match := _NAME.fullmatch(path.name))]
        ranks = {int(rank) for rank, _ in found}
        if len({count for _, count in found}) != 1 or ranks != set(range(int(found[0][1]))):
            raise RecipeError(
                f"{folder}: does not hold the optimizer state of every rank "
                f"({len(paths)} files of ranks {sorted(ranks)}); copy the whole checkpoint, or "
                "start afresh in another run_dir"
            )
        self.folder = Path(folder)
        self.meta: dict[str, Any] = {}
        self._files = [safe_open(str(path), framework="pt", device="cpu") for path in paths]
        self._fragments: dict[str, list[tuple[int, int, float, int]]] = {}
        for index, file in enumerate(self._files):
            self.meta = json.loads(file.metadata()["meta"])
            for name, offset, numel, step in self.meta.pop("fragments"):
                self._fragments.setdefault(name, []).append((offset, numel, step, index))

    def check(self, names: Iterable[str]) -> None:
        """Raise RecipeError if there is state of another parameter than `names`."""
        unknown = sorted(self._fragments.keys() - set(names))
        if unknown:
            raise RecipeError(
                f"{self.folder}: has the optimizer state of {len(unknown)} parameters that this "
                f"run does not train, {unknown[0]} first; train what was trained, or start "
                "afresh in another run_dir"
            )

    def read(self, slot: Slot, targets: Mapping[str, Tensor]) -> float | None:
        """Copy the moments of a slot into `targets`, each (numel,); return the updates behind them.

        None if the parameter had no state when it was saved. Raises RecipeError if it had, but
        not of all those elements.
        """
        if slot.name not in self._fragments:
            return None
        end, num_found, updates = slot.offset + slot.numel, 0, 0.0
        for offset, numel, step, index in self._fragments[slot.name]:
            first, last = max(offset, slot.offset), min(offset + numel, end)
            if first >= last:
                continue
            for moment, target in targets.items():
                saved = self._files[index].get_slice(_key(moment, slot.name, offset))
                target[first - slot.offset : last - slot.offset].copy_(
                    saved[first - offset : last - offset]
                )
            num_found += last - first
            updates = max(updates, step)
        if num_found != slot.numel:
            raise RecipeError(
                f"{self.folder}: has the optimizer state of {num_found} of the {slot.numel} "
                f"elements of {slot.name} from {slot.offset} on; it is not of this model"
            )
        return updates

    @torch.no_grad()
    def restore(self, slots: Sequence[Slot], state: OptimizerState) -> None:
        """Make the state of every owner in `slots` from what was saved of them."""
        slots_of: dict[int, list[Slot]] = {}
        for slot in slots:
            slots_of.setdefault(id(slot.owner), []).append(slot)
        for own in slots_of.values():
            owner = own[0].owner
            moments = {moment: torch.zeros_like(owner) for moment in MOMENTS}
            updates = []
            for slot in own:
                targets = {
                    moment: flat(value).narrow(0, slot.start, slot.numel)
                    for moment, value in moments.items()
                }
                updates.append(self.read(slot, targets))
            known = [number for number in updates if number is not None]
            if known:
                # One count for a partition of several: a parameter without gradient has fewer.
                step = torch.tensor(max(known), dtype=torch.float32, device=owner.device)
                state[owner] = {"step": step, **moments}


def flat(tensor: Tensor) -> Tensor:
    """Return a flat view of a tensor; of a DTensor, of its part on this rank."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)


def _key(moment: str, name: str, offset: int) -> str:
    return f"{moment}/{name}/{offset}"
