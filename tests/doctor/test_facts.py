"""What a node measures of itself, and what it says where that fails."""

import shutil
import socket
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.doctor import checks, facts, network, selftest

Usage = namedtuple("Usage", "total used free")


def test_versions_are_those_that_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = facts.versions()
    assert set(found) == {"python", *facts.PACKAGES}
    assert all(found.values()), found
    fake = tmp_path / "transformers-0.0.1.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert facts.versions() == {**found, "transformers": "0.0.1"}


def test_the_hash_changes_with_any_file_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = facts.code()
    copy = tmp_path / "rayrlhf"
    shutil.copytree(own["place"], copy)
    monkeypatch.setattr(facts.rayrlhf, "__file__", str(copy / "__init__.py"))
    assert facts.code() == {"place": str(copy), "hash": own["hash"]}
    (copy / "rl" / "ppo.py").write_text("changed = True\n")
    assert facts.code()["hash"] != own["hash"]


def test_memory_is_that_of_this_machine() -> None:
    found = facts.memory()
    assert 0 < found["used"] < found["total"]
    assert 0 <= found["shm_free"] <= found["shm_total"]


def test_the_disk_is_measured_where_the_run_will_be(tmp_path: Path) -> None:
    found = facts.disk(str(tmp_path / "runs" / "x"))
    assert found["place"] == str(tmp_path)
    assert found["speed"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts.shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**40))
    closed = facts.disk("/proc/self")
    assert closed["error"]
    assert [each.status for each in checks.disk({"a": closed}, "run_dir")] == ["fail"]
    monkeypatch.setattr(facts.shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**20, 2**20))
    found = facts.disk(str(tmp_path))
    assert found["speed"] == 0 and list(tmp_path.iterdir()) == []
    assert [each.status for each in checks.disk({"a": found}, "run_dir")] == ["fail"]


def test_a_shared_folder_is_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x"
    first = facts.leave(str(folder), "one", "a")
    second = facts.leave(str(folder), "two", "b")
    assert first["made"] == [str(folder), str(folder.parent)] and second["made"] == []
    assert facts.see(str(folder), {"one": "a", "two": "b"}, 1) == []
    facts.forget(str(folder), ["one", "two"], first["made"])
    facts.forget(str(folder), ["one", "two"], first["made"])  # the other node
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    (folder / "precious").touch()
    facts.forget(str(folder), ["one"], [str(folder), str(folder.parent)])
    assert (folder / "precious").exists()


def test_a_file_that_comes_late_is_seen_and_one_that_never_does_is_named(tmp_path: Path) -> None:
    late = threading.Timer(0.4, lambda: (tmp_path / "late").write_text("x"))
    late.start()
    assert facts.see(str(tmp_path), {"late": "x"}, 10) == []
    (tmp_path / "other").write_text("of another node")
    began = time.monotonic()
    assert facts.see(str(tmp_path), {"late": "x", "other": "y", "no": "z"}, 0.3) == ["other", "no"]
    assert time.monotonic() - began < 2


def test_a_folder_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert facts.leave(str(tmp_path / "file" / "run"), "one", "a") == {"error": "Not a directory"}
    assert facts.unreadable([str(tmp_path), str(tmp_path / "no")]) == [str(tmp_path / "no")]


def test_who_has_a_port_is_named() -> None:
    import os

    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = int(server.getsockname()[1])
        free = facts.free_port("127.0.0.1")
        found = facts.ports([taken, free])
    assert list(found) == [taken]
    assert f"(pid {os.getpid()})" in found[taken]
    assert facts.ports([taken]) == {}


def test_nvidia_smi_that_fails_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(facts, "SMI_S", 0.3)
    assert "timed out" in str(facts.gpus()["error"])
    program.write_text("#!/bin/sh\nexit 9\n")
    assert "exit status 9" in str(facts.gpus()["error"])
    program.write_text("#!/bin/sh\necho $1\n")
    assert facts.gpus() | {"cuda": None} == {"smi": "-q\n", "peers": "topo\n", "cuda": None}


def test_the_cuda_of_torch_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    assert facts.torch_cuda() == torch.version.cuda
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\nhip: None = None\n")
    spec = namedtuple("Spec", "submodule_search_locations")([str(tmp_path)])
    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda _: spec)
    assert facts.torch_cuda() == "13.0"


def test_bytes_arrive_and_a_closed_port_is_an_error() -> None:
    assert "127.0.0.1" in network.interfaces().values()
    speed = network.send("127.0.0.1", network.listen("127.0.0.1"))
    assert speed > 1e6
    with pytest.raises(OSError, match="refused"):
        network.send("127.0.0.1", facts.free_port("127.0.0.1"))


def ranks(num: int, world_size: int, limit_s: float) -> list[dict[str, Any]]:
    port = facts.free_port("127.0.0.1")
    own = {"world_size": world_size, "master": "127.0.0.1", "port": port, "backend": "gloo"}
    return [{**own, "device": 0, "rank": rank, "limit_s": limit_s} for rank in range(num)]


@pytest.mark.slow
def test_a_collective_of_two_and_one_whose_other_rank_never_comes() -> None:
    found = selftest.in_process("collective", ranks(2, 2, 60), 90)
    assert [rank.get("is_right") for rank in found] == [True, True], found
    began = time.monotonic()
    (alone,) = selftest.in_process("collective", ranks(1, 2, 60), 6)
    assert alone == {"error": "not done after 6 s"}
    assert time.monotonic() - began < 12


@pytest.mark.slow
def test_a_build_and_one_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (found,) = selftest.in_process("build", [{}], 120)
    assert found["compiler"] and Path(found["folder"]).parent == tmp_path
    monkeypatch.setenv("CXX", "no-such-compiler")
    (broken,) = selftest.in_process("build", [{}], 120)
    assert "no-such-compiler" in broken["error"], broken


@pytest.mark.slow
def test_an_engine_and_one_that_is_too_slow() -> None:
    (found,) = selftest.in_process("engine", [{"max_tokens": 4}], 240)
    assert 1 <= found["num_tokens"] <= 4, found
    (slow,) = selftest.in_process("engine", [{"max_tokens": 4}], 0.5)
    assert slow == {"error": "not done after 0.5 s"}
