"""Folders that go live: what fits, what is taken in, what is the newest; and the gate."""

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rayrlhf.serving.gate import Gate
from rayrlhf.serving.weights import LiveWeights, Unfit, check_fit, newest, tensors
from rayrlhf.training import checkpoint
from tests.serving.engines import save_model


def write_checkpoint(stage: Path, step: int | None, value: float = 0.0) -> Path:
    place = checkpoint.begin(stage, step)
    save_model(place, value=value)
    return checkpoint.commit(place)


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    first = write_checkpoint(tmp_path, 10)
    assert newest(tmp_path) == first
    second = write_checkpoint(tmp_path, 20)
    os.utime(first / checkpoint.MANIFEST, (1, 1))
    assert newest(tmp_path) == second
    final = write_checkpoint(tmp_path, None)
    assert newest(tmp_path) == final
    for path in (first, second):
        os.utime(path / checkpoint.MANIFEST, (1, 1))
    later = write_checkpoint(tmp_path, 30)  # of a run that goes on
    os.utime(final / checkpoint.MANIFEST, (2, 2))
    assert newest(tmp_path) == later
    (later / "model.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == final


def test_what_was_taken_in_outlives_its_folder(tmp_path: Path) -> None:
    weights = LiveWeights(tmp_path / "serve")
    first, second = (save_model(tmp_path / str(value), value=value) for value in (1.0, 2.0))
    weights.start({"a": str(first), "b": str(first)})
    live = weights.take_in("a", second)
    assert weights.of("a").version == 1  # taken in is not live yet
    shutil.rmtree(second)
    weights.go_live("a", live)
    assert weights.of("a") == live and weights.of("b").version == 1
    assert dict(tensors(Path(live.folder)))["weight"][0, 0] == 2.0
    assert live.fingerprint("a").startswith("a-v2-")
    third = weights.take_in("a", first)
    weights.go_live("a", third)
    assert not Path(live.folder).exists() and first.exists()
    weights.give_up(weights.take_in("a", first))
    assert [path.name for path in (tmp_path / "serve" / "weights").iterdir()] == ["a-v3"]
    weights.start({"a": str(first)})
    assert weights.of("a").version == 1 and not (tmp_path / "serve" / "weights").exists()
    weights.start({"a": str(first), "ppo": str(first)}, keep=["ppo"])
    shutil.rmtree(first)
    assert dict(tensors(Path(weights.of("ppo").folder))) and weights.of("ppo").version == 1


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    served = save_model(tmp_path / "served")

    def refuse(folder: Path, reason: str) -> None:
        with pytest.raises(Unfit, match=reason):
            check_fit(folder, served)

    check_fit(save_model(tmp_path / "new", value=1.0), served)
    refuse(tmp_path / "none", "no such folder")
    refuse(tmp_path, r"no config\.json")
    refuse(save_model(tmp_path / "kind", architectures=["Other"]), "served: give one of that kind")
    empty = save_model(tmp_path / "empty")
    (empty / "model.safetensors").rename(empty / "pytorch_model.bin")
    refuse(empty, r"no \*\.safetensors, and nothing else is loaded")
    for name, found, reason in (
        ("shape", {"weight": torch.zeros(3, 2)}, "has the shape"),
        ("missing", {"other": torch.zeros(2, 3)}, "is missing"),
        ("extra", {"weight": torch.zeros(2, 3), "x": torch.zeros(1)}, "the served model lacks"),
    ):
        folder = save_model(tmp_path / name)
        save_file(found, str(folder / "model.safetensors"))
        refuse(folder, reason)
    cut = save_model(tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    for part in (whole[:-1], whole[:20], b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"):
        (cut / "model.safetensors").write_bytes(part)
        refuse(cut, "not a whole safetensors file")
    words = save_model(tmp_path / "words")
    (words / "tokenizer.json").write_text("[]")
    refuse(words, r"its tokenizer\.json is another one")
    listed = save_model(tmp_path / "listed")
    (listed / "config.json").write_text(json.dumps([]))
    refuse(listed, r"no config\.json")


def test_a_change_waits_for_answers_and_holds_new_ones_back() -> None:
    said: list[str] = []

    async def answer(gate: Gate, name: str, seconds: float) -> None:
        async with gate.answer():
            said.append(f"{name} begins")
            await asyncio.sleep(seconds)
            said.append(f"{name} ends")

    async def change(gate: Gate) -> None:
        async with gate.change(5):
            said.append("change")
            assert gate.inside == 0
            await asyncio.sleep(0.02)
            said.append("changed")

    async def run() -> None:
        gate = Gate()
        first = [asyncio.create_task(answer(gate, name, 0.05)) for name in "ab"]
        await asyncio.sleep(0.01)
        changes = [asyncio.create_task(change(gate)) for _ in range(2)]
        await asyncio.sleep(0.01)
        await asyncio.gather(*first, *changes, answer(gate, "c", 0))

    asyncio.run(run())
    assert said[:4] == ["a begins", "b begins", "a ends", "b ends"]
    assert said[4:6] == ["change", "changed"]
    assert said.count("change") == 2 and said.index("c ends") == said.index("c begins") + 1
    changing = [line for line in said if line.startswith("change")]
    assert changing == ["change", "changed"] * 2  # one after the other


def test_a_change_that_waits_too_long_lets_answers_go_on() -> None:
    async def run() -> None:
        gate = Gate()
        async with gate.answer():
            with pytest.raises(TimeoutError):
                async with gate.change(0.02):
                    raise AssertionError("an answer is inside")
            async with gate.answer():
                assert gate.inside == 2
        task = asyncio.create_task(cancelled(gate))
        await asyncio.sleep(0)
        task.cancel()
        async with gate.change(1):
            assert gate.inside == 0

    async def cancelled(gate: Gate) -> None:
        async with gate.answer():
            await asyncio.sleep(60)

    asyncio.run(run())
