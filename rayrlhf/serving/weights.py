"""The weights that are live: folders taken in, compared with what is served, and remembered.

    <run>/serve/live.json             model -> folder and version, what a new replica loads
    <run>/serve/weights/ppo-v3/       a folder that was taken in, as hard links where they work

A folder is taken in before it is loaded, since a stage that goes on removes its old checkpoints.
Only safetensors are read; nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.lineage import MANIFEST, is_complete, read_json, write_json

LIVE = "live.json"
MAX_HEADER = 100_000_000
"""Bytes of the longest header of a safetensors file, as the format has it."""
SAME = ("tokenizer.json", "chat_template.jinja")
"""Files that new weights have to share with those that are served, where both have them."""
TAKEN_IN = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


class Unfit(ValueError):
    """A folder cannot go live; the text says why, and what to give instead."""


@dataclass(frozen=True)
class Live:
    """What a model has live."""

    folder: str
    version: int
    """1 are the weights that it started with."""

    def fingerprint(self, model: str) -> str:
        """Return the name of this version in answers: other weights have another one."""
        stamps = [
            f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
            for file in sorted(Path(self.folder).glob("*.safetensors"))
        ]
        digest = hashlib.sha256("\n".join([*stamps, self.folder]).encode()).hexdigest()
        return f"{self._stem(model)}{digest[:8]}"

    def names(self, model: str, fingerprint: str) -> bool:
        """Tell whether a fingerprint is that of this version, whatever became of its files."""
        return fingerprint.startswith(self._stem(model))

    def _stem(self, model: str) -> str:
        return f"{model}-v{self.version}-"


class LiveWeights:
    """Which folder and version each model has live, on disk."""

    def __init__(self, folder: Path) -> None:
        """`folder` is that of the endpoint in the run directory, on every node that serves."""
        self._folder = folder
        self._turn = threading.Lock()

    def start(self, folders: Mapping[str, str], keep: Collection[str] = ()) -> None:
        """Begin with these folders, as version 1 each, and forget what was live before.

        Those of the models in `keep` are taken in, since they may be removed.
        """
        shutil.rmtree(self._folder / "weights", ignore_errors=True)
        begun = {
            name: self._take_in(name, folder, 1) if name in keep else Live(folder, 1)
            for name, folder in folders.items()
        }
        tree = {
            name: {"folder": live.folder, "version": live.version} for name, live in begun.items()
        }
        write_json(self._folder / LIVE, tree)

    def of(self, model: str) -> Live:
        """Return what is live of a model."""
        entry = read_json(self._folder / LIVE)[model]
        return Live(entry["folder"], entry["version"])

    def take_in(self, model: str, folder: str | Path) -> Live:
        """Keep a folder's files for the next version of a model, and return it; not live yet."""
        return self._take_in(model, folder, self.of(model).version + 1)

    def _take_in(self, model: str, folder: str | Path, version: int) -> Live:
        place = self._folder / "weights" / f"{model}-v{version}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for pattern in TAKEN_IN:
            for file in Path(folder).glob(pattern):
                _link(file, place / file.name)
        if not any(place.glob("*.safetensors")):
            shutil.rmtree(place, ignore_errors=True)
            raise Unfit(f"{folder}: its weights were removed meanwhile: give a newer folder")
        return Live(str(place), version)

    def go_live(self, model: str, live: Live) -> None:
        """Make a version the one that a new replica loads, and remove what was kept before it."""
        with self._turn:  # several models may change at a time
            before = self.of(model)
            tree = read_json(self._folder / LIVE)
            tree[model] = {"folder": live.folder, "version": live.version}
            write_json(self._folder / LIVE, tree)
        self._drop(before)

    def give_up(self, live: Live) -> None:
        """Remove a version that was taken in and did not go live."""
        self._drop(live)

    def _drop(self, live: Live) -> None:
        if Path(live.folder).parent == self._folder / "weights":
            shutil.rmtree(live.folder, ignore_errors=True)


def newest(stage: Path) -> Path | None:
    """Return the newest whole checkpoint or final model of a stage's folder; None before one."""
    folders = [stage / "final", *stage.glob("checkpoints/step-*")]
    whole = [folder for folder in folders if is_complete(folder)]
    return max(whole, key=_written, default=None)


def _written(folder: Path) -> tuple[int, bool, str]:
    # The final model may be written within the clock's tick after the last checkpoint.
    return (folder / MANIFEST).stat().st_mtime_ns, folder.name == "final", folder.name


def check_fit(folder: str | Path, served: str | Path) -> None:
    """Raise Unfit unless the weights of `folder` can take the place of those in `served`."""
    new, old = Path(folder), Path(served)
    if not new.is_dir():
        raise Unfit(f"{folder}: there is no such folder on the server: give one with config.json")
    try:
        config: Any = json.loads((new / "config.json").read_text(encoding="utf-8"))
        kind = config["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Unfit(
            f"{folder}: it has no config.json of a Hugging Face model: give a folder with "
            "config.json and model.safetensors"
        ) from None
    wanted = json.loads((old / "config.json").read_text(encoding="utf-8")).get("architectures")
    if kind != wanted:
        raise Unfit(f"{folder}: it holds a {kind}, and a {wanted} is served: give one of that kind")
    shapes, served_shapes = tensor_shapes(new), tensor_shapes(old)
    for name, shape in served_shapes.items():
        if shapes.get(name) != shape:
            found = f"has the shape {shapes[name]}" if name in shapes else "is missing"
            raise Unfit(
                f"{folder}: {name} {found}, and {shape} is served: give weights of the same shape"
            )
    extra = sorted(shapes.keys() - served_shapes.keys())
    if extra:
        raise Unfit(
            f"{folder}: it has {len(extra)} weights that the served model lacks, {extra[0]} "
            "first: give weights of the same architecture"
        )
    for name in SAME:
        files = new / name, old / name
        if all(file.is_file() for file in files):
            one, other = (file.read_bytes() for file in files)
            if one != other:
                raise Unfit(
                    f"{folder}: its {name} is another one than that of the served model: start "
                    "the endpoint with this model instead"
                )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a folder's safetensors; raises Unfit without any."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            header = _header(file)
            shapes |= {
                name: tuple(entry["shape"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise Unfit(f"{file}: not a whole safetensors file: write it again") from None
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model's folder; raises Unfit when it has none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Unfit(
            f"{folder}: it has no *.safetensors, and nothing else is loaded: save the model with "
            "save_pretrained"
        )
    return files


def _header(file: Path) -> dict[str, Any]:
    """Return a safetensors file's header; raises ValueError when the file is not whole."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
        if length > MAX_HEADER:
            raise ValueError("the header's length is out of bounds")
        header: dict[str, Any] = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if file.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError("the file is shorter or longer than its header says")
    return header


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file.resolve(), place)
    except OSError:  # another file system, or one without links
        shutil.copy2(file, place)


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and tensor of all weights in a folder, on the CPU; files are mapped, not read."""
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                yield name, opened.get_tensor(name)
